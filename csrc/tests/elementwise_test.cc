// Elementwise functions: accuracy over all magnitudes, special values, lanes left alone.
#include <algorithm>
#include <bit>

#include "support.h"

using namespace testing;
using espalier::Binary;
using espalier::KernelSet;
using espalier::Unary;

namespace {

constexpr Unary kAll[] = {Unary::identity, Unary::gelu,       Unary::gelu_tanh, Unary::relu,
                          Unary::tanh,     Unary::sigmoid,    Unary::silu,      Unary::quick_gelu,
                          Unary::erf,      Unary::exp,        Unary::sqrt,      Unary::abs,
                          Unary::neg,      Unary::reciprocal, Unary::elu,       Unary::softplus};
constexpr const char* kNames[] = {"identity", "gelu", "gelu_tanh", "relu", "tanh", "sigmoid",    "silu", "quick_gelu",
                                  "erf",      "exp",  "sqrt",      "abs",  "neg",  "reciprocal", "elu",  "softplus"};

std::vector<float> apply(const KernelSet& k, Unary op, std::vector<float> x) {
  const std::size_t nb = static_cast<std::size_t>(k.lanes * k.max_groups), n = x.size();
  x.resize((n + nb - 1) / nb * nb);
  std::vector<float> y(x.size());
  k.unary(op, x.data(), y.data(), static_cast<int>(x.size() / nb), k.max_groups);
  y.resize(n);
  return y;
}

}  // namespace

// Every 3001st float of both signs, the denormals and the infinities among them, and finer steps where functions bend.
TEST(accuracy_over_all_magnitudes) {
  std::vector<float> x;
  for (std::uint64_t bits = 0; bits <= 0xff800000u; bits += 3001) {
    const float value = std::bit_cast<float>(static_cast<std::uint32_t>(bits));
    if (!std::isnan(value)) x.push_back(value);
  }
  for (int i = -400000; i <= 400000; ++i) x.push_back(static_cast<float>(i) * 2.5e-4f);
  for (const KernelSet* k : kernel_sets()) {
    for (std::size_t u = 0; u < std::size(kAll); ++u) {
      const std::vector<float> y = apply(*k, kAll[u], x);
      double worst_absolute = 0.0, worst_relative = 0.0;
      for (std::size_t i = 0; i < x.size(); ++i) {
        const double want = espalier::reference::unary(kAll[u], x[i]);
        if (std::isnan(want) && std::isinf(x[i])) continue;  // 0 * inf: see special_values
        const bool denormal = kAll[u] == Unary::reciprocal && std::fabs(want) > 3.4028235e38;
        if (denormal) continue;
        CHECK(agrees(y[i], want, espalier::reference::unary_bound(kAll[u], x[i], want)), k->name, " ", kNames[u], "(",
              x[i], ") = ", y[i], ", expected ", want);
        if (std::isfinite(want) && std::fabs(x[i]) < 100.0f) {
          const double error = std::fabs(y[i] - want);
          worst_absolute = std::max(worst_absolute, std::fabs(want) < 1e3 ? error : 0.0);
          if (std::fabs(want) > 1.2e-38) worst_relative = std::max(worst_relative, error / std::fabs(want));
        }
      }
      std::cerr << "      " << k->name << " " << kNames[u] << ": absolute " << worst_absolute << ", relative "
                << worst_relative << "\n";
    }
  }
}

TEST(special_values) {
  for (const KernelSet* k : kernel_sets()) {
    for (std::size_t u = 0; u < std::size(kAll); ++u)
      CHECK(std::isnan(apply(*k, kAll[u], {kNan})[0]), k->name, " ", kNames[u], "(NaN) must be NaN");
    CHECK(apply(*k, Unary::exp, {kInf})[0] == kInf);
    CHECK(apply(*k, Unary::exp, {-kInf})[0] == 0.0f);
    CHECK(apply(*k, Unary::sigmoid, {kInf})[0] == 1.0f);
    CHECK(apply(*k, Unary::sigmoid, {-kInf})[0] == 0.0f);
    CHECK(apply(*k, Unary::tanh, {kInf})[0] == 1.0f);
    CHECK(apply(*k, Unary::tanh, {-kInf})[0] == -1.0f);
    CHECK(apply(*k, Unary::erf, {-kInf})[0] == -1.0f);
    CHECK(apply(*k, Unary::gelu, {kInf})[0] == kInf);
    CHECK(apply(*k, Unary::relu, {-kInf})[0] == 0.0f);
    CHECK(std::isnan(apply(*k, Unary::sqrt, {-1.0f})[0]));
    CHECK(apply(*k, Unary::reciprocal, {0.0f})[0] == kInf);
    CHECK(apply(*k, Unary::softplus, {kInf})[0] == kInf);
    CHECK(apply(*k, Unary::elu, {-kInf})[0] == -1.0f);
  }
}

TEST(lanes_beyond_the_groups_stay_and_in_place_works) {
  Random random(7);
  for (const KernelSet* k : kernel_sets()) {
    const int nb = k->lanes * k->max_groups;
    for (int groups = 1; groups <= k->max_groups; ++groups) {
      const std::vector<float> x = random.normals(static_cast<std::size_t>(5 * nb));
      std::vector<float> y(x.size(), kSentinel), z = x;
      k->unary(Unary::gelu, x.data(), y.data(), 5, groups);
      k->unary(Unary::gelu, z.data(), z.data(), 5, groups);
      for (int i = 0; i < 5 * nb; ++i) {
        const std::size_t at = static_cast<std::size_t>(i);
        if (i % nb < groups * k->lanes)
          CHECK(y[at] == z[at]);
        else
          CHECK(y[at] == kSentinel && z[at] == x[at]);
      }
    }
  }
}

TEST(binary_operations) {
  Random random(8);
  for (const KernelSet* k : kernel_sets()) {
    const int nb = k->lanes * k->max_groups, features = 7;
    std::vector<float> a = random.normals(static_cast<std::size_t>(features * nb)), b = random.normals(a.size());
    a[0] = kInf, b[1] = kNan, b[2] = 0.0f, a[3] = -0.0f, a[4] = 1e30f, b[4] = 1e30f, a[5] = 1e-42f;
    a[6] = kNan, a[7] = b[7] = kNan, a[8] = -kInf, b[9] = kInf;
    for (Binary op : {Binary::add, Binary::sub, Binary::mul, Binary::div, Binary::max, Binary::min}) {
      for (int mode = 0; mode < 3; ++mode) {  // panel, vector, one number
        for (int groups = 1; groups <= k->max_groups; ++groups) {
          std::vector<float> y(a.size(), kSentinel);
          k->binary(op, a.data(), b.data(), y.data(), features, groups, mode > 0, mode == 2 ? 0 : 1);
          for (int i = 0; i < features * nb; ++i) {
            const std::size_t at = static_cast<std::size_t>(i);
            if (i % nb >= groups * k->lanes) {
              CHECK(y[at] == kSentinel);
              continue;
            }
            const float other = mode == 0 ? b[at] : mode == 1 ? b[static_cast<std::size_t>(i / nb)] : b[0];
            const float want = static_cast<float>(espalier::reference::binary(op, a[at], other));
            CHECK(y[at] == want || (std::isnan(y[at]) && std::isnan(want)), k->name, ": ", y[at],
                  " != ", want);  // correctly rounded
          }
        }
      }
    }
  }
}

TEST(transpose_in) {
  Random random(9);
  for (const KernelSet* k : kernel_sets()) {
    const int nb = k->lanes * k->max_groups;
    for (int features : {1, 3, 8, 17, 64}) {
      for (int count = 1; count <= nb; ++count) {
        const std::vector<float> data = random.normals(static_cast<std::size_t>(count * features));
        std::vector<const float*> rows;
        for (int i = 0; i < count; ++i) rows.push_back(random.below(4) == 0 ? nullptr : data.data() + i * features);
        std::vector<float> panel(round_rows(features) * static_cast<std::size_t>(nb), kSentinel);
        k->transpose_in(rows.data(), count, panel.data(), features);
        compare(k->name, panel.data(), nb, count, 0, features,
                espalier::reference::transpose_in(rows.data(), count, features));
      }
    }
  }
}

// Runs of every length, at every place, of every kind, against a plain loop. What stands between runs may be anything.
TEST(copy_lanes) {
  Random random(10);
  for (const KernelSet* k : kernel_sets()) {
    const int nb = k->lanes * k->max_groups;
    for (int round = 0; round < 2000; ++round) {
      const int rows = 1 + random.below(9), densest = 1 + random.below(k->lanes);
      std::vector<espalier::LaneRun> runs;
      std::vector<int> lengths;
      std::vector<std::vector<float>> sources;
      for (int lane = random.below(densest); lane < nb; lane += lengths.back() + random.below(densest)) {
        const bool same = random.below(4) == 0;
        // A row is read up to two vectors past the run's start, and not a float further.
        const std::size_t floats = static_cast<std::size_t>((same ? 0 : rows - 1) * nb + 2 * k->lanes);
        sources.push_back(random.normals(floats));
        runs.push_back({sources.back().data(), same ? 0 : nb, lane, random.below(2) == 0});
        lengths.push_back(std::min(nb - lane, 1 + random.below(random.below(3) == 0 ? k->lanes : densest)));
      }
      std::vector<float> y(static_cast<std::size_t>(rows * nb + k->lanes), kSentinel);
      k->copy_lanes(runs.data(), static_cast<int>(runs.size()), rows, y.data());
      bool same = true;
      for (int r = 0; r < rows; ++r) {
        for (std::size_t i = 0; i < runs.size(); ++i) {
          for (int l = 0; l < lengths[i]; ++l)
            same = same && y[static_cast<std::size_t>(r * nb + runs[i].lane + l)] ==
                               runs[i].x[r * runs[i].stride + (runs[i].every_second ? 2 : 1) * l];
        }
      }
      CHECK(same, k->name, " rows ", rows, " runs ", runs.size());
    }
  }
}
