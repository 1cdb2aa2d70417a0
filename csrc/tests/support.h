// What several tests need: kernel sets that run here, numbers, panels, layer shapes.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "engine/weights.h"
#include "kernels/reference/ref.h"
#include "kernels/select.h"

namespace testing {

inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kSentinel = -12345.75f;

// Kernel sets of this build that this processor can run.
std::vector<const espalier::KernelSet*> kernel_sets();

// And emulations of those for other processors, which have 8 bit kernels alone.
std::vector<const espalier::KernelSet*> kernel_sets_and_emulations();

// Deterministic on every platform, unlike the standard distributions.
class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  std::uint64_t bits() { return engine_(); }
  int below(int n) { return static_cast<int>(bits() % static_cast<std::uint64_t>(n)); }
  double unit() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  float normal() {  // near enough: a sum of uniform numbers
    double sum = -6.0;
    for (int i = 0; i < 12; ++i) sum += unit();
    return static_cast<float>(sum);
  }
  std::vector<float> normals(std::size_t n) {
    std::vector<float> out(n);
    for (float& x : out) x = normal();
    return out;
  }

 private:
  std::mt19937_64 engine_;
};

struct LayerShape {
  std::string name;
  int rows = 0;
  int columns = 0;
  double sparsity = 0.0;
  int pattern = 1;  // rows that share their zeros
};

// Every line of tests/shapes/*.txt: "name rows columns sparsity pattern". Never empty.
std::vector<LayerShape> layer_shapes();

// A dense [rows][columns] matrix with that share of zeros.
std::vector<float> random_weight(Random& random, int rows, int columns, double sparsity, int pattern);

inline std::size_t round_rows(int n) {
  return static_cast<std::size_t>((n + espalier::kRowBlock - 1) / espalier::kRowBlock * espalier::kRowBlock);
}

// Whether a kernel's result is what the reference says: NaN for NaN, the same infinity, or within the bound.
inline bool agrees(double got, double want, double bound) {
  if (std::isnan(want)) return std::isnan(got);
  if (std::isinf(want)) return got == want;
  if (std::fabs(want) > 3.4028235e38 && std::isinf(got)) return (got > 0) == (want > 0);  // beyond a float's range
  return std::fabs(got - want) <= bound;
}

// A quantised panel as the tests want it, whatever the set keeps in it.
espalier::reference::Quantized unpack(const espalier::KernelSet& k, const std::uint8_t* panel, int features, int lanes);

inline std::size_t quantized_bytes(const espalier::KernelSet& k, int features) {
  return (round_rows(features) + espalier::kQuantizedExtra * sizeof(float)) *
         static_cast<std::size_t>(k.lanes * k.max_groups);
}

// Compares features [first, last) of a panel with a reference of `lanes` lanes.
void compare(const char* where, const float* panel, int width, int lanes, int first, int last,
             const espalier::reference::Result& want);

}  // namespace testing
