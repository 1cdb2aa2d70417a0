// Weights of small integers, as models bring them and as kernels want them.
#pragma once

#include <cstdint>

#include "base/buffer.h"
#include "kernels/kernel_set.h"
#include "kernels/select.h"

namespace espalier {

// The blocks of 1 output x 4 inputs that hold a nonzero of an M x K matrix w of integers in [-255, 255], row by row,
// inputs ascending; row m stands for scales[m] * w[m]. Independent of the machine.
struct Matrix8 {
  int rows = 0;
  int columns = 0;
  std::int64_t nonzeros = 0;
  Buffer<std::uint32_t> starts;  // [M + 1]
  Buffer<std::uint16_t> groups;  // [blocks]: first input / 4
  Buffer<std::int16_t> values;   // [blocks][4]
  Buffer<float> scales;          // [M]
  std::int64_t blocks() const { return starts.size() == 0 ? 0 : starts[static_cast<std::size_t>(rows)]; }
};

// values: [M][K]; scales: [M]. Throws Error for a value out of range, a scale that is not finite, and a row so heavy
// that its sum over activations of 255 would not fit 32 bits.
Matrix8 compress8(const std::int16_t* values, int rows, int columns, const float* scales);

// A weight packed for one kernel set, with the memory it stands in.
class Weight8 {
 public:
  Weight8(const Matrix8& matrix, WeightFormat8 format, const KernelSet& kernels);
  Weight8(Weight8&&) = default;
  Weight8& operator=(Weight8&&) = default;

  const PackedWeight8& packed() const { return packed_; }
  std::int64_t nonzeros() const { return nonzeros_; }
  // Blocks of 1 output x 4 inputs that a token costs.
  std::int64_t blocks() const { return static_cast<std::int64_t>(dense_.size() + blocks_.size()) / kFeatureBlock; }
  std::size_t bytes() const {
    return dense_.size() + blocks_.size() + offsets_.size() * 2 + (starts_.size() + scales_.size() + sums_.size()) * 4;
  }

 private:
  PackedWeight8 packed_;
  std::int64_t nonzeros_ = 0;
  Buffer<std::int8_t> dense_;
  Buffer<std::int8_t> blocks_;
  Buffer<std::uint16_t> offsets_;
  Buffer<std::uint32_t> starts_;
  Buffer<float> scales_;
  Buffer<std::int32_t> sums_;
};

// Best of a few timed runs of one full panel through `weight`, in seconds.
double time_linear8(const KernelSet& kernels, const Weight8& weight);

}  // namespace espalier
