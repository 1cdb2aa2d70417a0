#include "engine/weights8.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "engine/weights.h"

namespace espalier {

namespace {

constexpr int kLargest = 255;  // of |w|, and of an activation

int round_up(int n, int step) { return (n + step - 1) / step * step; }

template <class T>
Buffer<T> to_buffer(const std::vector<T>& from) {
  Buffer<T> out(from.size());
  std::copy(from.begin(), from.end(), out.data());
  return out;
}

void check_row(const std::int16_t* row, int columns, int number) {
  std::int64_t heaviest = 0;
  for (int k = 0; k < columns; ++k) {
    if (std::abs(row[k]) > kLargest)
      fail("an integer weight less its zero point is " + std::to_string(row[k]) + "; it must be within [-255, 255]");
    heaviest += kLargest * std::abs(row[k]);
  }
  if (heaviest > std::numeric_limits<std::int32_t>::max())
    fail("row " + std::to_string(number) + " of an integer weight may sum to " + std::to_string(heaviest) +
         ", which does not fit 32 bits; run this layer in float32");
}

// Four neighbouring inputs' weights, or what of them is not packed yet.
using Inputs = std::array<int, kFeatureBlock>;

bool is_zero(const Inputs& w) { return w == Inputs{}; }

// 255 times this, of either sign, fits 16 bits.
constexpr int kLargestSum16 = 128;

// Takes as much of `rest` as one block may hold, so that no two neighbours add up to more than 16 bits hold.
Inputs take_block(Inputs& rest, bool sums_16_bit) {
  Inputs block;
  for (std::size_t i = 0; i < kFeatureBlock; ++i) {
    int low = -128, high = 127;
    if (sums_16_bit && i % 2 == 1) {
      low = std::max(low, -kLargestSum16 - std::min(0, block[i - 1]));
      high = std::min(high, kLargestSum16 - std::max(0, block[i - 1]));
    }
    block[i] = std::clamp(rest[i], low, high);
    rest[i] -= block[i];
  }
  return block;
}

// Where dense8 keeps its blocks: in the tiles of a kernel set, of a matrix of `groups` groups of inputs.
class DenseTiles {
 public:
  DenseTiles(const KernelSet& k, int groups)
      : rows_(k.tile_rows), width_(k.tile_columns / kFeatureBlock), across_(groups / width_) {}

  int groups() const { return across_ * width_; }  // that fill tiles
  std::size_t bytes(int rows) const { return size(round_up(rows, rows_)) * size(groups()) * kFeatureBlock; }
  std::size_t at(int row, int group) const {
    const std::size_t tile = size(row / rows_) * size(across_) + size(group / width_);
    return ((tile * size(rows_) + size(row % rows_)) * size(width_) + size(group % width_)) * kFeatureBlock;
  }

 private:
  static std::size_t size(int n) { return static_cast<std::size_t>(n); }
  int rows_, width_, across_;
};

struct Entry {
  Inputs weights;
  std::uint16_t offset;
};

// Whether two blocks may be added in 16 bits.
bool fit_16_bit(const Inputs& a, const Inputs& b) {
  for (std::size_t i = 0; i < kFeatureBlock; i += 2) {
    int above = 0, below = 0;
    for (int w : {a[i], a[i + 1], b[i], b[i + 1]}) (w > 0 ? above : below) += w;
    if (above > kLargestSum16 || below < -kLargestSum16) return false;
  }
  return true;
}

int largest_sum(const Inputs& w) {
  int largest = 0;
  for (std::size_t i = 0; i < kFeatureBlock; i += 2)
    largest = std::max({largest, std::abs(w[i]), std::abs(w[i + 1]), std::abs(w[i] + w[i + 1])});
  return largest;
}

// A row's blocks in pairs, empty blocks added where one finds no partner. The heaviest chooses first, and takes the
// heaviest that fits.
std::vector<Entry> in_pairs(std::vector<Entry> entries, bool sums_16_bit) {
  if (sums_16_bit)
    std::stable_sort(entries.begin(), entries.end(),
                     [](const Entry& a, const Entry& b) { return largest_sum(a.weights) > largest_sum(b.weights); });
  constexpr std::size_t kReach = 64;  // partners looked at, so that long rows do not take forever
  std::vector<Entry> pairs;
  std::vector<bool> taken(entries.size());
  for (std::size_t i = 0; i < entries.size(); ++i) {
    if (taken[i]) continue;
    pairs.push_back(entries[i]);
    std::size_t j = i + 1;
    const std::size_t end = std::min(entries.size(), j + kReach);
    while (j < end && (taken[j] || (sums_16_bit && !fit_16_bit(entries[i].weights, entries[j].weights)))) ++j;
    if (j == end) {
      pairs.push_back({Inputs{}, entries[i].offset});
    } else {
      pairs.push_back(entries[j]);
      taken[j] = true;
    }
  }
  return pairs;
}

}  // namespace

Matrix8 compress8(const std::int16_t* values, int rows, int columns, const float* scales) {
  require(rows > 0 && columns > 0 && columns <= kMaxColumns,
          "an integer weight must have at least one row, and from 1 to 65536 columns");
  Matrix8 out;
  out.rows = rows;
  out.columns = columns;
  out.starts.resize(static_cast<std::size_t>(rows) + 1);
  out.starts[0] = 0;
  out.scales.resize(static_cast<std::size_t>(rows));
  std::vector<std::uint16_t> groups;
  std::vector<std::int16_t> blocks;
  for (int m = 0; m < rows; ++m) {
    const std::int16_t* row = values + static_cast<std::ptrdiff_t>(m) * columns;
    check_row(row, columns, m);
    if (!std::isfinite(scales[m])) fail("the scale of row " + std::to_string(m) + " of a weight is not finite");
    out.scales[static_cast<std::size_t>(m)] = scales[m];
    for (int k = 0; k < columns; k += kFeatureBlock) {
      const int n = std::min(kFeatureBlock, columns - k);
      const auto nonzeros = n - std::count(row + k, row + k + n, 0);
      if (nonzeros == 0) continue;
      out.nonzeros += nonzeros;
      groups.push_back(static_cast<std::uint16_t>(k / kFeatureBlock));
      blocks.insert(blocks.end(), row + k, row + k + n);
      blocks.resize(groups.size() * kFeatureBlock);
    }
    if (groups.size() > UINT32_MAX) fail("an integer weight has more than 2^32 blocks");
    out.starts[static_cast<std::size_t>(m) + 1] = static_cast<std::uint32_t>(groups.size());
  }
  out.groups = to_buffer(groups);
  out.values = to_buffer(blocks);
  return out;
}

Weight8::Weight8(const Matrix8& matrix, WeightFormat8 format, const KernelSet& kernels) : nonzeros_(matrix.nonzeros) {
  const int rows = round_up(matrix.rows, kRowBlock), groups = round_up(matrix.columns, kFeatureBlock) / kFeatureBlock;
  const int stride = kernels.lanes * kernels.max_groups * kFeatureBlock / offset_unit(kernels.lanes);
  const DenseTiles tiles(kernels, groups);
  const int dense_groups = format == WeightFormat8::dense8 ? tiles.groups() : 0;
  if (dense_groups > 0) {
    dense_.resize(tiles.bytes(matrix.rows));
    dense_.zero();
  }
  scales_.resize(static_cast<std::size_t>(rows));
  scales_.zero();
  std::copy(matrix.scales.data(), matrix.scales.data() + matrix.rows, scales_.data());
  sums_.resize(static_cast<std::size_t>(rows));
  sums_.zero();
  starts_.resize(static_cast<std::size_t>(rows) + 1);
  std::vector<std::int8_t> blocks;
  std::vector<std::uint16_t> offsets;
  for (int m = 0; m < rows; ++m) {
    starts_[static_cast<std::size_t>(m)] = static_cast<std::uint32_t>(offsets.size() / 2);
    if (m >= matrix.rows) continue;
    std::vector<Entry> entries;
    for (std::uint32_t b = matrix.starts[static_cast<std::size_t>(m)];
         b < matrix.starts[static_cast<std::size_t>(m) + 1]; ++b) {
      const int group = matrix.groups[b];
      Inputs rest;
      std::copy_n(matrix.values.data() + static_cast<std::size_t>(b) * kFeatureBlock, kFeatureBlock, rest.begin());
      for (int w : rest) sums_[static_cast<std::size_t>(m)] += w;
      if (group < dense_groups) {
        const Inputs body = take_block(rest, kernels.sums_16_bit);
        std::copy(body.begin(), body.end(), dense_.data() + tiles.at(m, group));
      }
      while (!is_zero(rest))
        entries.push_back({take_block(rest, kernels.sums_16_bit), static_cast<std::uint16_t>(group * stride)});
    }
    for (const Entry& entry : in_pairs(std::move(entries), kernels.sums_16_bit)) {
      blocks.insert(blocks.end(), entry.weights.begin(), entry.weights.end());
      offsets.push_back(entry.offset);
    }
  }
  if (offsets.size() > UINT32_MAX) fail("an integer weight has more than 2^32 blocks");
  starts_[static_cast<std::size_t>(rows)] = static_cast<std::uint32_t>(offsets.size() / 2);
  blocks_ = to_buffer(blocks);
  offsets_ = to_buffer(offsets);
  packed_ = {format,          matrix.rows,    matrix.columns, dense_.data(), blocks_.data(),
             offsets_.data(), starts_.data(), scales_.data(), sums_.data()};
}

double time_linear8(const KernelSet& kernels, const Weight8& weight) {
  const PackedWeight8& w = weight.packed();
  const std::size_t nb = static_cast<std::size_t>(kernels.lanes) * static_cast<std::size_t>(kernels.max_groups);
  const std::size_t columns = static_cast<std::size_t>(round_up(w.columns, kFeatureBlock));
  Buffer<float> x(columns * nb), y(static_cast<std::size_t>(round_up(w.rows, kRowBlock)) * nb);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 17) * 0.0625f - 0.5f;
  Buffer<std::uint8_t> quantized((columns + kQuantizedExtra * sizeof(float)) * nb);
  kernels.quantize(x.data(), quantized.data(), w.columns, kernels.max_groups, nullptr);
  double best = 1e30;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    kernels.linear8(w, quantized.data(), y.data(), kernels.max_groups, 0, w.rows, {});
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

}  // namespace espalier
