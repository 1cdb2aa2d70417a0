// Quantising and its reverse, exactly, with everything a float can be.
#include <algorithm>
#include <bit>

#include "support.h"

using namespace testing;
using espalier::KernelSet;
using espalier::Quantization;
using espalier::reference::Quantized;

namespace {

// The panel after quantising `groups` groups, over a panel of sentinels.
std::vector<std::uint8_t> quantized(const KernelSet& k, const std::vector<float>& x, int features, int groups,
                                    const Quantization* fixed) {
  std::vector<std::uint8_t> panel(quantized_bytes(k, features), 0xa5);
  k.quantize(x.data(), panel.data(), features, groups, fixed);
  return panel;
}

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

void check_quantize(const KernelSet& k, const std::vector<float>& x, int features, int groups,
                    const Quantization* fixed) {
  const int nb = k.lanes * k.max_groups, lanes = k.lanes * groups;
  const std::vector<std::uint8_t> panel = quantized(k, x, features, groups, fixed);
  const Quantized got = unpack(k, panel.data(), features, lanes);
  const Quantized want = espalier::reference::quantize(x.data(), features, nb, lanes, fixed);
  for (std::size_t i = 0; i < want.q.size(); ++i) {
    const std::size_t n = static_cast<std::size_t>(lanes), lane = i % n, f = i / n;
    CHECK(got.q[i] == want.q[i], k.name, (fixed != nullptr ? " static" : " token"), ": feature ", f, " of ", features,
          " = ", x[f * static_cast<std::size_t>(nb) + lane], ": got ", got.q[i], ", expected ", want.q[i], ", scale ",
          want.scale[lane]);
  }
  for (std::size_t lane = 0; lane < want.scale.size(); ++lane)
    CHECK(same(got.scale[lane], want.scale[lane]) && got.zero[lane] == want.zero[lane], k.name, ": scale ",
          got.scale[lane], ", expected ", want.scale[lane], "; zero ", got.zero[lane], ", expected ", want.zero[lane]);
  bool untouched = true;
  for (std::size_t i = 0; i < panel.size(); ++i)
    if (i / 4 % static_cast<std::size_t>(nb) >= static_cast<std::size_t>(lanes)) untouched &= panel[i] == 0xa5;
  CHECK(untouched, k.name, ": wrote outside its lanes");

  std::vector<float> back(round_rows(features) * static_cast<std::size_t>(nb), kSentinel);
  k.dequantize(panel.data(), back.data(), features, groups);
  for (std::size_t i = 0; i < want.q.size(); ++i) {
    const std::size_t n = static_cast<std::size_t>(lanes), lane = i % n;
    const float value = (static_cast<float>(want.q[i]) - want.zero[lane]) * want.scale[lane];
    CHECK(same(back[i / n * static_cast<std::size_t>(nb) + lane], value), k.name, ": dequantised to another value");
  }
  for (std::size_t i = 0; i < back.size(); ++i)
    if (i % static_cast<std::size_t>(nb) >= static_cast<std::size_t>(lanes))
      CHECK(back[i] == kSentinel, k.name, ": dequantised outside its lanes");
}

// What a quantised panel stands for: [features][lanes].
std::vector<float> floats_of(const Quantized& panel) {
  std::vector<float> x(panel.q.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const std::size_t lane = i % panel.scale.size();
    x[i] = (static_cast<float>(panel.q[i]) - panel.zero[lane]) * panel.scale[lane];
  }
  return x;
}

// `fixed`: of the first operand; the second has scales of its own for each token.
void check_add8(const KernelSet& k, Random& random, int features, int groups, bool relu, const Quantization& fixed,
                const Quantization& out) {
  const std::size_t count = round_rows(features) * static_cast<std::size_t>(k.lanes * k.max_groups);
  const int lanes = k.lanes * groups;
  std::vector<float> x = random.normals(count);
  for (float& v : x) v *= 50.0f * fixed.scale;
  const auto a = quantized(k, x, features, groups, &fixed);
  const auto b = quantized(k, random.normals(count), features, groups, nullptr);
  std::vector<std::uint8_t> y(quantized_bytes(k, features), 0xa5);
  k.add8(a.data(), b.data(), y.data(), features, groups, relu, out);

  std::vector<float> sum = floats_of(unpack(k, a.data(), features, lanes));
  const std::vector<float> other = floats_of(unpack(k, b.data(), features, lanes));
  for (std::size_t i = 0; i < sum.size(); ++i) sum[i] = std::max(relu ? 0.0f : -kInf, sum[i] + other[i]);
  const Quantized want = espalier::reference::quantize(sum.data(), features, lanes, lanes, &out);
  const Quantized got = unpack(k, y.data(), features, lanes);
  CHECK(got.q == want.q && got.scale == want.scale && got.zero == want.zero, k.name, ": the sum of ", features,
        " features in ", groups, " groups is another");
  bool untouched = true;
  const std::size_t nb = static_cast<std::size_t>(k.lanes * k.max_groups);
  for (std::size_t i = 0; i < y.size(); ++i)
    if (i / 4 % nb >= static_cast<std::size_t>(lanes)) untouched &= y[i] == 0xa5;
  CHECK(untouched, k.name, ": added outside its lanes");
}

}  // namespace

TEST(sums_are_those_of_floats_rounded_again) {
  Random random(61);
  for (const KernelSet* k : kernel_sets_and_emulations())
    for (int features : {1, 3, 4, 7, 64})
      for (int groups = 1; groups <= k->max_groups; ++groups)
        for (bool relu : {false, true})
          for (const float zero : {0.0f, 117.0f, 255.0f}) {
            check_add8(*k, random, features, groups, relu, {0.02f, 128.0f}, {0.031f, zero});
            check_add8(*k, random, features, groups, relu, {3e38f, zero}, {0.5f, 3.0f});  // sums that overflow
          }
}

TEST(every_width_and_number_of_features) {
  Random random(60);
  for (const KernelSet* k : kernel_sets_and_emulations()) {
    for (int features : {1, 2, 3, 4, 5, 8, 31, 64}) {
      const std::vector<float> x =
          random.normals(round_rows(features) * static_cast<std::size_t>(k->lanes * k->max_groups));
      for (int groups = 1; groups <= k->max_groups; ++groups) {
        check_quantize(*k, x, features, groups, nullptr);
        for (float zero : {0.0f, 3.0f, 128.0f, 255.0f}) {
          const Quantization fixed{0.013f, zero};
          check_quantize(*k, x, features, groups, &fixed);
        }
      }
    }
  }
}

// Ties, the numbers beside them, every magnitude, and what is no number.
TEST(every_kind_of_float) {
  std::vector<float> all = {0.0f, -0.0f, kNan, -kNan, kInf, -kInf, 3.4028235e38f, -3.4028235e38f, 1e-45f, -1e-45f};
  for (int i = -600; i <= 600; ++i) {
    const float tie = static_cast<float>(i) * 0.5f;
    for (float v : {tie, std::nextafter(tie, kInf), std::nextafter(tie, -kInf)}) all.push_back(v);
  }
  for (std::uint64_t bits = 0; bits <= 0xffffffffu; bits += 1000003)
    all.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(bits)));
  for (const KernelSet* k : kernel_sets_and_emulations()) {
    const std::size_t nb = static_cast<std::size_t>(k->lanes * k->max_groups);
    std::vector<float> x = all;
    x.resize((all.size() / nb / 4 + 1) * 4 * nb);
    for (float scale : {1.0f, 0.1f, 0.0039215689f, 1.1754944e-38f, 1e-45f, 3e38f, 1.0f / 3.0f}) {
      for (float zero : {0.0f, 127.0f, 255.0f}) {
        const Quantization fixed{scale, zero};
        check_quantize(*k, x, static_cast<int>(x.size() / nb), k->max_groups, &fixed);
      }
    }
  }
}

TEST(nan_becomes_zero_as_in_onnx_runtime) {
  for (const KernelSet* k : kernel_sets_and_emulations()) {
    const std::vector<float> x(static_cast<std::size_t>(4 * k->lanes * k->max_groups), kNan);
    const Quantization fixed{0.5f, 77.0f};
    const auto panel = quantized(*k, x, 4, 1, &fixed);
    for (int q : unpack(*k, panel.data(), 4, k->lanes).q) CHECK(q == 0, k->name);
  }
}

// Tokens of every awkward kind side by side: each has its own range.
TEST(awkward_tokens) {
  const float tiny = 1e-45f, huge = 3.4028235e38f;
  const std::vector<std::vector<float>> tokens = {
      {0, 0, 0, 0, 0},          {-0.0f, 0, 0, 0, 0},    {1, 1, 1, 1, 1},         {-1, -1, -1, -1, -1},
      {0.5f, -0.5f, 1, -1, 2},  {kNan, 1, 2, 3, 4},     {1, 2, 3, 4, kNan},      {kInf, 0, 0, 0, 0},
      {-kInf, kInf, 1, 2, 3},   {huge, -huge, 1, 2, 3}, {huge, huge, 0, 0, 0},   {tiny, 0, 0, 0, 0},
      {200 * tiny, 0, 0, 0, 0}, {1000, 1e-3f, 0, 0, 0}, {-1000, 1e-3f, 0, 0, 0}, {127.5f, 127.5f, -127.5f, 0, 1},
  };
  for (const KernelSet* k : kernel_sets_and_emulations()) {
    const std::size_t nb = static_cast<std::size_t>(k->lanes * k->max_groups);
    for (std::size_t first = 0; first < tokens.size(); ++first) {
      std::vector<float> x(8 * nb, 7.0f);
      for (std::size_t lane = 0; lane < nb; ++lane)
        for (std::size_t f = 0; f < 5; ++f) x[f * nb + lane] = tokens[(first + lane) % tokens.size()][f];
      check_quantize(*k, x, 5, k->max_groups, nullptr);
    }
  }
}

// What is not finite must not come out as a plausible number.
TEST(a_token_that_is_not_finite_has_a_scale_that_is_none) {
  for (const KernelSet* k : kernel_sets_and_emulations()) {
    for (float bad : {kNan, kInf, -kInf}) {
      std::vector<float> x(static_cast<std::size_t>(4 * k->lanes * k->max_groups), 1.0f);
      x[static_cast<std::size_t>(2 * k->lanes * k->max_groups)] = bad;
      const auto panel = quantized(*k, x, 4, 1, nullptr);
      const Quantized got = unpack(*k, panel.data(), 4, k->lanes);
      CHECK(std::isnan(got.scale[0]) && got.zero[0] == 0.0f, k->name);
      CHECK(got.scale[1] == 1.0f / 255.0f, k->name, ": a neighbour has changed");
    }
  }
}
