// Linear layers of integers: every format, width and epilogue against the reference, to the last bit, on every kernel
// set and on emulations of those that do not run here.
#include <algorithm>

#include "base/error.h"
#include "engine/weights8.h"
#include "support.h"

using namespace testing;
using espalier::Epilogue;
using espalier::KernelSet;
using espalier::Matrix8;
using espalier::Quantization;
using espalier::Unary;
using espalier::Weight8;
using espalier::WeightFormat8;

namespace {

constexpr WeightFormat8 kFormats[] = {WeightFormat8::dense8, WeightFormat8::block1x4};

struct Layer {
  int rows;
  int columns;
  std::vector<std::int16_t> w;
  std::vector<float> scales;
  std::vector<float> bias;

  Layer(Random& random, int m, int k)
      : rows(m), columns(k), w(static_cast<std::size_t>(m) * static_cast<std::size_t>(k)) {
    for (int i = 0; i < m; ++i) scales.push_back(0.001f * static_cast<float>(1 + random.below(1000)));
    bias = random.normals(round_rows(m));
  }
  Matrix8 matrix() const { return espalier::compress8(w.data(), rows, columns, scales.data()); }
};

// Values within [-largest, largest], in blocks of four that are kept with probability 1 - sparsity.
Layer random_layer(Random& random, int rows, int columns, int largest, double sparsity) {
  Layer layer(random, rows, columns);
  for (std::size_t i = 0, keep = 0; i < layer.w.size(); ++i) {
    const std::size_t k = i % static_cast<std::size_t>(columns);
    if (k % 4 == 0) keep = random.unit() >= sparsity;
    if (keep) layer.w[i] = static_cast<std::int16_t>(random.below(2 * largest + 1) - largest);
  }
  return layer;
}

std::vector<std::uint8_t> quantized(const KernelSet& k, const std::vector<float>& x, int features, int groups,
                                    const Quantization* fixed) {
  std::vector<std::uint8_t> panel(quantized_bytes(k, features));
  k.quantize(x.data(), panel.data(), features, groups, fixed);
  return panel;
}

std::vector<float> random_panel(Random& random, const KernelSet& k, int features) {
  return random.normals(round_rows(features) * static_cast<std::size_t>(k.lanes * k.max_groups));
}

// Rows [first, last) of one panel; checks the result, and that nothing else was written.
void check_rows(const KernelSet& k, const Layer& layer, const Weight8& weight, const std::vector<std::uint8_t>& x,
                int groups, int first, int last, const Epilogue& e) {
  const int nb = k.lanes * k.max_groups, lanes = k.lanes * groups;
  const std::string where = text(k.name, " ", layer.rows, "x", layer.columns, " format ",
                                 static_cast<int>(weight.packed().format), " groups ", groups);
  std::vector<float> y(round_rows(layer.rows) * static_cast<std::size_t>(nb), kSentinel);
  k.linear8(weight.packed(), x.data(), y.data(), groups, first, last, e);
  const auto input = unpack(k, x.data(), layer.columns, lanes);
  const auto want =
      espalier::reference::linear8(layer.w.data(), layer.scales.data(), layer.rows, layer.columns, input, e, nb);
  bool untouched = true;
  for (int m = 0; m < static_cast<int>(round_rows(layer.rows)); ++m) {
    for (int lane = 0; lane < nb; ++lane) {
      const float got = y[static_cast<std::size_t>(m * nb + lane)];
      if (m >= first && m < last && lane < lanes) {
        const float sum = want[static_cast<std::size_t>(m * lanes + lane)];
        const double value = espalier::reference::unary(e.act, sum);
        CHECK(agrees(got, value, espalier::reference::unary_bound(e.act, sum, value)), where, ": row ", m, " lane ",
              lane, ": got ", got, ", expected ", value);
      } else if (m < first || m >= static_cast<int>(round_rows(last)) || lane >= lanes) {
        untouched &= got == kSentinel;
      }
    }
  }
  CHECK(untouched, where, ": wrote outside its rows or lanes");
}

void check_layer(const KernelSet& k, const Layer& layer, const std::vector<std::uint8_t>& x, int groups) {
  for (WeightFormat8 format : kFormats)
    check_rows(k, layer, Weight8(layer.matrix(), format, k), x, groups, 0, layer.rows,
               {layer.bias.data(), nullptr, {}, {}});
}

// An input whose integers are `low` and `high` by turns, with that zero point.
std::vector<std::uint8_t> extreme_panel(const KernelSet& k, int columns, int low, int high, float zero) {
  const Quantization fixed{1.0f, zero};
  const std::size_t nb = static_cast<std::size_t>(k.lanes * k.max_groups);
  std::vector<float> x(round_rows(columns) * nb);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>((i / nb + i % nb) % 2 ? low : high) - zero;
  return quantized(k, x, columns, k.max_groups, &fixed);
}

}  // namespace

TEST(small_shapes_in_every_format_and_width) {
  Random random(70);
  for (const KernelSet* k : kernel_sets_and_emulations()) {
    for (int rows : {1, 3, 4, 5, 33, 37}) {
      for (int columns : {1, 2, 3, 4, 5, 16, 61}) {
        for (double sparsity : {0.0, 0.7, 1.0}) {
          const Layer layer = random_layer(random, rows, columns, columns % 2 ? 255 : 127, sparsity);
          const Quantization fixed{0.02f, static_cast<float>(random.below(256))};
          const int groups = 1 + random.below(k->max_groups), split = std::min(rows, 4 * (1 + random.below(3)));
          const auto x =
              quantized(*k, random_panel(random, *k, columns), columns, groups, random.below(2) ? &fixed : nullptr);
          const auto residual = random_panel(random, *k, rows);
          for (WeightFormat8 format : kFormats) {
            const Weight8 weight(layer.matrix(), format, *k);
            check_rows(*k, layer, weight, x, groups, 0, rows, {layer.bias.data(), nullptr, {}, {}});
            check_rows(*k, layer, weight, x, groups, 0, split, {nullptr, residual.data(), {}, {}});
            if (split < rows)
              check_rows(*k, layer, weight, x, groups, split, rows, {layer.bias.data(), residual.data(), {}, {}});
            check_rows(*k, layer, weight, x, groups, 0, rows, {layer.bias.data(), residual.data(), Unary::relu, {}});
            check_rows(*k, layer, weight, x, groups, 0, split, {nullptr, residual.data(), Unary::silu, {}});
          }
        }
      }
    }
  }
}

// Around the edges of a matrix unit's tiles, which take 32 outputs and 64 inputs: whole ones, parts, and calls that
// begin and end within one.
TEST(whole_tiles_and_what_is_left_of_them) {
  Random random(78);
  for (const KernelSet* k : kernel_sets_and_emulations()) {
    for (const auto& [rows, columns] :
         {std::pair{1, 64}, {32, 60}, {31, 61}, {33, 65}, {16, 124}, {70, 128}, {64, 191}, {45, 203}, {97, 66}}) {
      Layer layer = random_layer(random, rows, columns, rows % 2 ? 255 : 127, 0.2);
      std::fill_n(layer.w.begin() + rows / 2 * columns, columns, std::int16_t{0});
      const Weight8 weight(layer.matrix(), WeightFormat8::dense8, *k);
      for (int groups = 1; groups <= k->max_groups; ++groups) {
        const Quantization fixed{0.02f, static_cast<float>(groups % 3 * 255 / 2)};
        const auto x = quantized(*k, random_panel(random, *k, columns), columns, groups, &fixed);
        for (int first = 0, last; first < rows; first = last) {
          last = std::min(rows, first + 4 * (1 + random.below(10)));
          check_rows(*k, layer, weight, x, groups, first, last, {layer.bias.data(), nullptr, {}, {}});
        }
      }
    }
  }
}

// A panel of one group is copied together, unless it has too many inputs for that.
TEST(one_group_of_many_inputs) {
  Random random(79);
  for (const KernelSet* k : kernel_sets_and_emulations()) {
    for (int columns : {4093, 4096, 4097}) {
      const Layer layer = random_layer(random, 6, columns, 127, 0.0);
      check_layer(*k, layer, quantized(*k, random_panel(random, *k, columns), columns, 1, nullptr), 1);
    }
  }
}

TEST(every_number_of_groups_and_a_residual_in_place) {
  Random random(71);
  for (const KernelSet* k : kernel_sets_and_emulations()) {
    const Layer layer = random_layer(random, 13, 70, 127, 0.4);
    for (int groups = 1; groups <= k->max_groups; ++groups) {
      const auto x = quantized(*k, random_panel(random, *k, 70), 70, groups, nullptr);
      check_layer(*k, layer, x, groups);
      const auto residual = random_panel(random, *k, 13);
      for (WeightFormat8 format : kFormats) {
        const Weight8 weight(layer.matrix(), format, *k);
        std::vector<float> y(residual.size()), in_place = residual;
        k->linear8(weight.packed(), x.data(), y.data(), groups, 0, 13, {nullptr, residual.data(), {}, {}});
        k->linear8(weight.packed(), x.data(), in_place.data(), groups, 0, 13, {nullptr, in_place.data(), {}, {}});
        const int nb = k->lanes * k->max_groups;
        for (int i = 0; i < 13 * nb; ++i)
          if (i % nb < groups * k->lanes)
            CHECK(y[static_cast<std::size_t>(i)] == in_place[static_cast<std::size_t>(i)]);
      }
    }
  }
}

// Every weight and every activation as large as it can be, and of every sign: nothing saturates on the way.
TEST(extreme_weights_and_activations) {
  Random random(72);
  const std::vector<std::vector<int>> patterns = {{127},
                                                  {-128},
                                                  {127, -128},
                                                  {-127, 127},
                                                  {128},
                                                  {255},
                                                  {-255},
                                                  {255, -255},
                                                  {127, 127, -128, -128},
                                                  {64, 65},
                                                  {-64, -65},
                                                  {1, 127, 0, 128},
                                                  {-128, 0, -1, -127}};
  for (const KernelSet* k : kernel_sets_and_emulations()) {
    for (int columns : {1, 7, 64}) {
      for (const std::vector<int>& pattern : patterns) {
        Layer layer(random, 5, columns);
        for (std::size_t i = 0; i < layer.w.size(); ++i)
          layer.w[i] = static_cast<std::int16_t>(pattern[i % static_cast<std::size_t>(columns) % pattern.size()]);
        std::fill_n(layer.w.begin() + columns, columns, std::int16_t{0});
        for (float zero : {0.0f, 128.0f, 255.0f})
          for (const auto& [low, high] : {std::pair{0, 255}, {255, 255}, {0, 0}, {255, 0}})
            check_layer(*k, layer, extreme_panel(*k, columns, low, high, zero), k->max_groups);
      }
    }
  }
}

TEST(random_weights_of_the_full_range_and_outliers) {
  Random random(73);
  for (const KernelSet* k : kernel_sets_and_emulations()) {
    for (int largest : {1, 100, 127, 255}) {
      const Layer layer = random_layer(random, 9, 203, largest, 0.3);
      std::vector<float> x = random_panel(random, *k, 203);
      for (std::size_t i = 0; i < x.size(); i += 97) x[i] *= 1000.0f;
      check_layer(*k, layer, quantized(*k, x, 203, k->max_groups, nullptr), k->max_groups);
    }
  }
}

// What the sum of 32 bits holds just fits at the widest weight; a heavier row is refused.
TEST(longest_rows) {
  Random random(74);
  for (const KernelSet* k : kernel_sets()) {
    for (const auto& [columns, value] : {std::pair{65536, 127}, {65536, -128}, {33025, 255}, {33025, -255}}) {
      Layer layer(random, 1, columns);
      std::fill(layer.w.begin(), layer.w.end(), static_cast<std::int16_t>(value));
      if (value == -128) layer.w[0] = layer.w[1] = layer.w[2] = layer.w[3] = -127;
      if (value == -128) std::fill_n(layer.w.begin(), 2000, std::int16_t{-100});
      for (float zero : {0.0f, 255.0f})
        check_layer(*k, layer, extreme_panel(*k, columns, zero == 0.0f ? 255 : 0, zero == 0.0f ? 255 : 0, zero),
                    k->max_groups);
    }
  }
  const std::vector<std::int16_t> heavy(33026, 255);
  const float scale = 1.0f;
  CHECK_THROWS(espalier::compress8(heavy.data(), 1, 33026, &scale), "does not fit 32 bits");
}

TEST(tokens_that_are_not_finite_stay_so) {
  Random random(75);
  for (const KernelSet* k : kernel_sets_and_emulations()) {
    const Layer layer = random_layer(random, 6, 20, 127, 0.0);
    std::vector<float> x = random_panel(random, *k, 20);
    x[3] = kNan, x[static_cast<std::size_t>(k->lanes * k->max_groups)] = kInf;
    const auto panel = quantized(*k, x, 20, 1, nullptr);
    check_layer(*k, layer, panel, 1);
    std::vector<float> y(8 * static_cast<std::size_t>(k->lanes * k->max_groups));
    k->linear8(Weight8(layer.matrix(), WeightFormat8::dense8, *k).packed(), panel.data(), y.data(), 1, 0, 6, {});
    CHECK(std::isnan(y[0]) && std::isnan(y[3]) && std::isfinite(y[1]), k->name);
  }
}

// A quantised result is what quantising the floats gives, bit for bit, rows in one call or several.
TEST(quantising_in_the_epilogue) {
  Random random(76);
  for (const KernelSet* k : kernel_sets_and_emulations()) {
    const int nb = k->lanes * k->max_groups;
    for (int rows : {1, 2, 3, 4, 6, 31, 32, 40, 71}) {
      const Layer layer = random_layer(random, rows, 72, 127, 0.3);
      const auto residual = random_panel(random, *k, rows);
      const Quantization out{0.01f * static_cast<float>(1 + random.below(9)), static_cast<float>(random.below(256))};
      const int groups = 1 + random.below(k->max_groups), split = std::min(rows, 4 * (1 + random.below(10)));
      const auto x = quantized(*k, random_panel(random, *k, 72), 72, groups, nullptr);
      for (WeightFormat8 format : kFormats) {
        const Weight8 weight(layer.matrix(), format, *k);
        for (Unary act : {Unary::identity, Unary::gelu, Unary::relu}) {
          Epilogue e{layer.bias.data(), act == Unary::gelu ? nullptr : residual.data(), act, nullptr};
          std::vector<float> y(round_rows(rows) * static_cast<std::size_t>(nb));
          k->linear8(weight.packed(), x.data(), y.data(), groups, 0, rows, e);
          const auto want = unpack(*k, quantized(*k, y, rows, groups, &out).data(), rows, k->lanes * groups);
          std::vector<float> storage(quantized_bytes(*k, rows) / sizeof(float), kSentinel);
          e.quantization = &out;
          k->linear8(weight.packed(), x.data(), storage.data(), groups, 0, split, e);
          if (split < rows) k->linear8(weight.packed(), x.data(), storage.data(), groups, split, rows, e);
          const auto got = unpack(*k, reinterpret_cast<const std::uint8_t*>(storage.data()), rows, k->lanes * groups);
          CHECK(got.q == want.q && got.scale == want.scale && got.zero == want.zero, k->name, " rows ", rows,
                " groups ", groups, " act ", static_cast<int>(act));
        }
      }
    }
  }
}

TEST(real_layer_shapes) {
  Random random(77);
  for (const LayerShape& shape : layer_shapes()) {
    const Layer layer = random_layer(random, std::min(shape.rows, 64), shape.columns, 127, shape.sparsity);
    for (const KernelSet* k : kernel_sets())
      check_layer(*k, layer,
                  quantized(*k, random_panel(random, *k, shape.columns), shape.columns, k->max_groups, nullptr),
                  k->max_groups);
  }
}

TEST(bad_weights_are_refused) {
  const std::vector<float> scales = {1.0f, kInf};
  std::vector<std::int16_t> w(8, 3);
  CHECK_THROWS(espalier::compress8(w.data(), 2, 4, scales.data()), "not finite");
  CHECK_THROWS(espalier::compress8(w.data(), 0, 4, scales.data()), "at least one row");
  CHECK_THROWS(espalier::compress8(w.data(), 1, 65537, scales.data()), "65536 columns");
  for (std::int16_t bad : {256, -256, 32767, -32768}) {
    w[5] = bad;
    CHECK_THROWS(espalier::compress8(w.data(), 1, 8, scales.data()), "within [-255, 255]");
  }
}

TEST(counts) {
  const std::vector<std::int16_t> w = {0, 0, 0, 0, 1, 0, 0, 0, 0, 5, 5, 0, 0, 0, 0, 0, 0, 0, 0, 200};
  const std::vector<float> scales = {1.0f, 2.0f};
  const Matrix8 matrix = espalier::compress8(w.data(), 2, 10, scales.data());
  CHECK(matrix.nonzeros == 4 && matrix.blocks() == 4, matrix.nonzeros, " ", matrix.blocks());
  const KernelSet& k = *kernel_sets().front();
  CHECK(Weight8(matrix, WeightFormat8::block1x4, k).blocks() == 6, "200 takes two blocks, and rows are even");
  CHECK(Weight8(matrix, WeightFormat8::dense8, k).blocks() == 12 + 2, "four rows of three, and what is left of 200");
}
