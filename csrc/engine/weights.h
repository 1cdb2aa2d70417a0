// Weights as models bring them, and as kernels want them.
#pragma once

#include <cstdint>
#include <span>

#include "base/buffer.h"
#include "kernels/kernel_set.h"
#include "kernels/select.h"

namespace espalier {

// A dense M x K matrix anywhere in memory; strides in elements.
struct DenseView {
  const float* data = nullptr;
  int rows = 0;
  int columns = 0;
  std::int64_t row_stride = 0;
  std::int64_t column_stride = 0;
};

// The nonzeros of an M x K matrix, row by row, columns ascending. Independent of the machine: what a plan stores.
struct SparseMatrix {
  int rows = 0;
  int columns = 0;
  Buffer<std::uint32_t> starts;   // [M + 1]
  Buffer<std::uint16_t> indices;  // [nonzeros]
  Buffer<float> values;           // [nonzeros]
  std::int64_t nonzeros() const { return starts.size() == 0 ? 0 : starts[static_cast<std::size_t>(rows)]; }
};

inline constexpr int kMaxColumns = 65536;  // column indices are 16 bits wide

// NaN counts as a nonzero; -0.0 does not.
SparseMatrix compress(const DenseView& view);
// The form plans store: nonzeros per row, the zeros before each (255 stands for 255 zeros and no nonzero), and the
// bytes of the values apart. Throws Error when the parts contradict each other.
struct EncodedMatrix {
  int rows = 0;
  int columns = 0;
  std::span<const std::uint32_t> counts;
  std::span<const std::uint8_t> gaps;
  std::span<const std::uint16_t> low;    // bits 0-15
  std::span<const std::uint8_t> middle;  // bits 16-23
  std::span<const std::uint8_t> top;     // bits 24-31
};
SparseMatrix decode(const EncodedMatrix& encoded);
// Throws Error when starts are not ascending, or an index is out of range or not ascending.
void check(const SparseMatrix& matrix);
WeightStats stats(const SparseMatrix& matrix);

// A weight packed for one kernel set, with the memory it stands in.
class Weight {
 public:
  Weight(const SparseMatrix& matrix, WeightFormat format, int chunk, int panel_width);
  Weight(Weight&&) = default;
  Weight& operator=(Weight&&) = default;

  const PackedWeight& packed() const { return packed_; }
  std::int64_t nonzeros() const { return nonzeros_; }
  std::size_t bytes() const { return values_.size() * sizeof(float) + offsets_.size() * 2 + starts_.size() * 4; }

 private:
  void pack_dense(const SparseMatrix& matrix);
  void pack_unstructured(const SparseMatrix& matrix, int panel_width);
  void pack_blocks(const SparseMatrix& matrix, int panel_width);

  PackedWeight packed_;
  std::int64_t nonzeros_ = 0;
  Buffer<float> values_;
  Buffer<std::uint16_t> offsets_;
  Buffer<std::uint32_t> starts_;
};

// Best of a few timed runs of one full panel through `weight`, in seconds.
double time_linear(const KernelSet& kernels, const Weight& weight);

}  // namespace espalier
