// Linear layers: every format, chunk and number of groups against the reference.
#include <algorithm>

#include "support.h"

using namespace testing;
using espalier::Epilogue;
using espalier::KernelSet;
using espalier::Unary;
using espalier::Weight;
using espalier::WeightFormat;

namespace {

constexpr WeightFormat kFormats[] = {WeightFormat::dense, WeightFormat::unstructured, WeightFormat::block4x1};

espalier::SparseMatrix sparse(const std::vector<float>& w, int rows, int columns) {
  return espalier::compress({w.data(), rows, columns, columns, 1});
}

struct Case {
  const KernelSet& k;
  const std::vector<float>& w;
  int rows;
  int columns;
  WeightFormat format;
  int chunk;
  int groups;
};

// One call over rows [first, last); checks the result, and that nothing else was written.
void run_case(const Case& c, const std::vector<float>& x, const Epilogue& e, int first, int last, bool in_place,
              const std::vector<int>& checked) {
  const int nb = c.k.lanes * c.k.max_groups, lanes = c.k.lanes * c.groups;
  const Weight weight(sparse(c.w, c.rows, c.columns), c.format, c.chunk, nb);
  std::vector<float> y(round_rows(c.rows) * static_cast<std::size_t>(nb), kSentinel);
  Epilogue given = e;
  if (in_place) {
    std::copy(e.residual, e.residual + y.size(), y.data());
    given.residual = y.data();
  }
  const std::vector<float> before = y;
  c.k.linear(weight.packed(), x.data(), y.data(), c.groups, first, last, given);
  const std::string where = text(c.k.name, " ", c.rows, "x", c.columns, " format ", static_cast<int>(c.format),
                                 " chunk ", c.chunk, " groups ", c.groups);
  for (int row : checked) {
    if (row < first || row >= last) continue;
    const auto want = espalier::reference::linear(c.w.data(), c.rows, c.columns, x.data(), nb, lanes, row, row + 1, e);
    compare(where.c_str(), y.data(), nb, lanes, row, row + 1, want);
  }
  bool untouched = true;
  for (std::size_t f = 0; f < round_rows(c.rows); ++f) {
    const bool mine = f >= static_cast<std::size_t>(first) && f < round_rows(last);
    for (std::size_t lane = mine ? static_cast<std::size_t>(lanes) : 0; lane < static_cast<std::size_t>(nb); ++lane)
      untouched =
          untouched && y[f * static_cast<std::size_t>(nb) + lane] == before[f * static_cast<std::size_t>(nb) + lane];
  }
  CHECK(untouched, where, ": wrote outside its rows or lanes");
}

std::vector<int> all_rows(int rows) {
  std::vector<int> out;
  for (int m = 0; m < rows; ++m) out.push_back(m);
  return out;
}

}  // namespace

TEST(small_shapes_in_every_format_chunk_and_group) {
  Random random(1);
  for (const KernelSet* k : kernel_sets()) {
    const int nb = k->lanes * k->max_groups;
    for (int rows : {1, 2, 3, 4, 5, 33, 37}) {
      for (int columns : {1, 2, 7, 16, 61}) {
        for (double sparsity : {0.0, 0.7, 1.0}) {
          const std::vector<float> w = random_weight(random, rows, columns, sparsity, 1);
          const std::vector<float> x = random.normals(static_cast<std::size_t>(columns) * static_cast<std::size_t>(nb));
          const std::vector<float> bias = random.normals(round_rows(rows));
          const std::vector<float> residual = random.normals(round_rows(rows) * static_cast<std::size_t>(nb));
          for (WeightFormat format : kFormats) {
            for (int chunk : {1, 5, 16, 64}) {
              const int groups = 1 + random.below(k->max_groups);
              const Case c{*k, w, rows, columns, format, chunk, groups};
              const int split = std::min(rows, 4 * (1 + random.below(3)));
              run_case(c, x, {bias.data(), nullptr, Unary::gelu}, 0, rows, false, all_rows(rows));
              run_case(c, x, {bias.data(), residual.data(), Unary::identity}, 0, rows, true, all_rows(rows));
              run_case(c, x, {bias.data(), residual.data(), Unary::relu}, 0, rows, true, all_rows(rows));
              run_case(c, x, {bias.data(), residual.data(), Unary::silu}, 0, split, false, all_rows(rows));
              run_case(c, x, {nullptr, residual.data(), Unary::identity}, 0, split, false, all_rows(rows));
              if (split < rows) run_case(c, x, {bias.data(), nullptr, Unary::relu}, split, rows, false, all_rows(rows));
            }
          }
        }
      }
    }
  }
}

TEST(every_number_of_groups) {
  Random random(2);
  for (const KernelSet* k : kernel_sets()) {
    const int nb = k->lanes * k->max_groups;
    const std::vector<float> w = random_weight(random, 13, 50, 0.5, 1);
    const std::vector<float> x = random.normals(50 * static_cast<std::size_t>(nb));
    for (WeightFormat format : kFormats)
      for (int groups = 1; groups <= k->max_groups; ++groups)
        run_case({*k, w, 13, 50, format, 17, groups}, x, {}, 0, 13, false, all_rows(13));
  }
}

// A panel of one group is copied together, unless its chunk is too wide for that.
TEST(one_group_and_chunks_of_all_widths) {
  Random random(6);
  for (const KernelSet* k : kernel_sets()) {
    const int nb = k->lanes * k->max_groups, rows = 37, columns = 600;
    const std::vector<float> w = random_weight(random, rows, columns, 0.0, 1);
    const std::vector<float> x = random.normals(static_cast<std::size_t>(columns) * static_cast<std::size_t>(nb));
    for (int chunk : {100, 256, 257, 600})
      run_case({*k, w, rows, columns, WeightFormat::dense, chunk, 1}, x, {}, 0, rows, false, all_rows(rows));
  }
}

TEST(empty_and_full_rows_side_by_side) {
  Random random(3);
  for (const KernelSet* k : kernel_sets()) {
    const int nb = k->lanes * k->max_groups, rows = 11, columns = 300;
    std::vector<float> w(static_cast<std::size_t>(rows) * columns);
    for (int m = 0; m < rows; m += 3)
      for (int i = 0; i < columns; ++i)
        w[static_cast<std::size_t>(m) * columns + static_cast<std::size_t>(i)] = random.normal();
    const std::vector<float> x = random.normals(static_cast<std::size_t>(columns) * static_cast<std::size_t>(nb));
    for (WeightFormat format : kFormats)
      run_case({*k, w, rows, columns, format, 128, k->max_groups}, x, {}, 0, rows, false, all_rows(rows));
  }
}

// Magnitudes that a float barely holds, in weights and activations, infinities that come of them, and NaN.
TEST(outliers_denormals_and_nan) {
  Random random(4);
  for (const KernelSet* k : kernel_sets()) {
    const int nb = k->lanes * k->max_groups, rows = 9, columns = 40;
    std::vector<float> w = random_weight(random, rows, columns, 0.5, 1);
    std::vector<float> x = random.normals(static_cast<std::size_t>(columns) * static_cast<std::size_t>(nb));
    const float nasty[] = {1e30f, -1e30f, 1e-40f, -0.0f, 0.0f, 1e-30f};
    for (std::size_t i = 0; i < x.size(); i += 7) x[i] = nasty[i % 6];
    for (std::size_t i = 0; i < w.size(); i += 11) w[i] = i % 2 ? 1e-41f : -0.0f;
    for (WeightFormat format : kFormats)
      run_case({*k, w, rows, columns, format, 16, k->max_groups}, x, {}, 0, rows, false, all_rows(rows));
    // A NaN or infinity in one token reaches that token alone, and every row whose weight reads it.
    for (float bad : {kNan, kInf, -kInf}) {
      std::vector<float> poisoned = random.normals(x.size());
      const int lane = random.below(nb), column = random.below(columns);
      poisoned[static_cast<std::size_t>(column * nb + lane)] = bad;
      for (WeightFormat format : kFormats) {
        const Weight weight(sparse(w, rows, columns), format, 16, nb);
        std::vector<float> y(round_rows(rows) * static_cast<std::size_t>(nb));
        k->linear(weight.packed(), poisoned.data(), y.data(), k->max_groups, 0, rows, {});
        for (int m = 0; m < rows; ++m) {
          const bool reads = w[static_cast<std::size_t>(m * columns + column)] != 0.0f;
          for (int l = 0; l < nb; ++l) {
            const float got = y[static_cast<std::size_t>(m * nb + l)];
            if (l != lane) CHECK(std::isfinite(got), k->name, ": a bad value reached another token");
            if (l == lane && reads) CHECK(!std::isfinite(got), k->name, ": a bad value was lost");
          }
        }
      }
    }
    w[3] = kNan;
    const std::vector<float> ones(x.size(), 1.0f);
    for (WeightFormat format : kFormats)
      run_case({*k, w, rows, columns, format, 16, 1}, ones, {}, 0, rows, false, all_rows(rows));
  }
}

// Layers of real models, in every format that would be measured; a sample of rows.
TEST(layers_of_real_models) {
  Random random(5);
  for (const LayerShape& shape : layer_shapes()) {
    const std::vector<float> w = random_weight(random, shape.rows, shape.columns, shape.sparsity, shape.pattern);
    const espalier::SparseMatrix matrix = sparse(w, shape.rows, shape.columns);
    std::vector<int> checked = {0, shape.rows - 1};
    for (int i = 0; i < 4; ++i) checked.push_back(random.below(shape.rows));
    for (const KernelSet* k : kernel_sets()) {
      const int nb = k->lanes * k->max_groups;
      const std::vector<float> x =
          random.normals(static_cast<std::size_t>(shape.columns) * static_cast<std::size_t>(nb));
      const std::vector<float> bias = random.normals(round_rows(shape.rows));
      for (const auto& candidate : espalier::candidates(espalier::stats(matrix), k->lanes, k->max_groups))
        run_case({*k, w, shape.rows, shape.columns, candidate.format, candidate.chunk, k->max_groups}, x,
                 {bias.data(), nullptr, Unary::gelu}, 0, shape.rows, false, checked);
    }
  }
}
