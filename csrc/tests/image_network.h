// Networks on images, run through a program and in plain loops.
#pragma once

#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "engine/program.h"
#include "support.h"

namespace testing {

using Pair = espalier::Window::Pair;  // rows, columns
using MaybeWindow = std::optional<espalier::Window>;
using MaybeQuantization = std::optional<espalier::Quantization>;

inline std::size_t size(int n) { return static_cast<std::size_t>(n); }
inline int area(Pair p) { return p[0] * p[1]; }

// A window with as large a result as fits. `after`: rows below, columns on the right.
espalier::Window window(Pair in, Pair kernel, Pair stride = {1, 1}, Pair before = {}, Pair after = {},
                        Pair dilation = {1, 1}, int align = 1);

// A value of one image, [feature][pixel].
struct Map {
  int features = 0;
  int pixels = 0;
  std::vector<float> x;
  std::vector<double> bound;  // the error that the operation which gives it may make, or empty for none
  espalier::reference::Quantized q;

  Map(int f, int p) : features(f), pixels(p), x(size(f * p)) {}
  float& at(int f, int p) { return x[size(f * pixels + p)]; }
  float at(int f, int p) const { return x[size(f * pixels + p)]; }
  std::size_t count() const { return x.size(); }
};

using Image = std::vector<Map>;  // its inputs, or its outputs

// The values of `random` decide on the weights: networks of the same seed, built alike, are the same. Ids of values are
// the program's.
class Network {
 public:
  Network(const espalier::KernelSet& k, int threads, std::uint64_t seed) : random(seed), program(k, threads) {}

  int load(int features, Pair extent, bool planes);
  int linear(int x, int rows, espalier::WeightFormat format, double sparsity, int residual, espalier::Unary act,
             const MaybeWindow& w = {});
  int quantize(int x, const MaybeQuantization& fixed);
  int dequantize(int x);
  int add8(int a, int b, bool relu, const espalier::Quantization& to);
  int linear8(int x, int rows, espalier::WeightFormat8 format, double sparsity, int residual, espalier::Unary act,
              const MaybeQuantization& to = {}, const MaybeWindow& w = {});
  int max_pool(int x, const espalier::Window& w);
  int mean_pool(int x, const espalier::Window& w, bool count_edges);
  int unary(int x, espalier::Unary op);
  int binary(espalier::Binary op, int a, int b);
  int concat(const std::vector<int>& parts);
  int spread(int x, Pair extent);
  int mean(int x);
  void store(int x, bool planes);
  void store(int x, bool planes, int first, int width);

  Image random_image();
  Image expected(const Image& image) const;  // in plain loops
  std::vector<Image> run(const std::vector<const Image*>& images);

  int features(int x) const { return program.values()[size(x)].features; }
  Pair extent(int x) const { return extents_[size(x)]; }

  Random random;
  espalier::Program program;

 private:
  using Values = std::vector<Map>;
  using Step = std::function<Map(const Values&, const Image&)>;
  struct Port {
    int features;
    int lanes;
    bool planes;
  };
  int add(int id, Pair extent, Step step);

  std::vector<Port> inputs_, outputs_;
  std::vector<std::pair<int, int>> stored_;  // value and first feature
  std::vector<Step> steps_;                  // [value]
  std::vector<Pair> extents_;                // [value]
};

}  // namespace testing
