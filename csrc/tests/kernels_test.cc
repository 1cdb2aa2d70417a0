// Every kernel of every instruction set that runs here, against its reference.
#include <algorithm>
#include <vector>

#include "base/error.h"
#include "support.h"

using namespace espalier;  // NOLINT: tests speak of little else
using testing::agrees;
using testing::Random;

namespace {

std::size_t width_of(const KernelSet& k) { return static_cast<std::size_t>(k.lanes * k.max_groups); }

SparseMatrix sparse(const std::vector<float>& w, int rows, int columns) {
  return compress({w.data(), rows, columns, columns, 1});
}

void linear_case(const KernelSet& k, Random& random, int rows, int columns, double sparsity, int pattern, int groups) {
  const std::size_t nb = width_of(k);
  const std::vector<float> w = testing::random_weight(random, rows, columns, sparsity, pattern);
  const SparseMatrix matrix = sparse(w, rows, columns);
  const std::vector<float> x = random.normals(static_cast<std::size_t>(columns) * nb);
  const std::vector<float> residual = random.normals(testing::round_rows(rows) * nb);
  std::vector<float> bias = random.normals(testing::round_rows(rows));
  const int lanes = groups * k.lanes;
  for (const Candidate& c : candidates(stats(matrix), k.lanes, k.max_groups)) {
    const Weight weight(matrix, c.format, c.chunk, static_cast<int>(nb));
    for (const Epilogue& e : {Epilogue{bias.data(), residual.data(), Unary::identity},
                              Epilogue{bias.data(), nullptr, Unary::gelu}, Epilogue{}}) {
      std::vector<float> y(testing::round_rows(rows) * nb, testing::kSentinel);
      std::vector<int> bounds(4);
      weight.split_rows(3, bounds);
      CHECK(bounds.front() == 0 && bounds.back() == rows, "rows are not covered");
      for (int part = 0; part < 3; ++part)
        k.linear(weight.packed(), x.data(), y.data(), groups, bounds[static_cast<std::size_t>(part)],
                 bounds[static_cast<std::size_t>(part) + 1], e);
      const auto want = reference::linear(w.data(), rows, columns, x.data(), static_cast<int>(nb), lanes, 0, rows, e);
      testing::compare(k.name, y.data(), static_cast<int>(nb), lanes, 0, rows, want);
      for (int lane = lanes; lane < static_cast<int>(nb); ++lane)
        CHECK(y[static_cast<std::size_t>(lane)] == testing::kSentinel, "a lane beyond the groups was written");
    }
  }
}

}  // namespace

TEST(linear_odd_sizes) {
  Random random(1);
  for (const KernelSet* k : testing::kernel_sets())
    for (const auto& [rows, columns] : {std::pair{1, 1}, {2, 7}, {4, 3}, {5, 64}, {7, 257}, {13, 800}, {66, 31}})
      for (double sparsity : {0.0, 0.5, 0.9, 1.0})
        for (int groups = 1; groups <= k->max_groups; ++groups)
          linear_case(*k, random, rows, columns, sparsity, groups % 2 ? 1 : 4, groups);
}

TEST(linear_layer_shapes) {
  Random random(2);
  for (const KernelSet* k : testing::kernel_sets()) {
    for (const testing::LayerShape& s : testing::layer_shapes()) {
      const int rows = std::min(s.rows, 256);  // the columns decide how a row is summed
      linear_case(*k, random, rows, s.columns, s.sparsity, s.pattern, k->max_groups);
    }
  }
}

TEST(linear_keeps_nan_and_infinity_in_their_lanes) {
  for (const KernelSet* k : testing::kernel_sets()) {
    const std::size_t nb = width_of(*k);
    const std::vector<float> w = {1, 0, 2, 0, 3, 0};
    std::vector<float> x(3 * nb, 1.0f), y(4 * nb);
    x[0] = testing::kNan;
    x[2 * nb + 1] = testing::kInf;
    x[nb + 2] = testing::kNan;  // meets a zero in the first row
    const SparseMatrix matrix = sparse(w, 2, 3);
    const Weight weight(matrix, WeightFormat::unstructured, 3, static_cast<int>(nb));
    k->linear(weight.packed(), x.data(), y.data(), 1, 0, 2, {});
    CHECK(std::isnan(y[0]) && std::isinf(y[1]) && y[2] == 3.0f && y[3] == 3.0f);
  }
}

TEST(unary_everywhere) {
  for (const KernelSet* k : testing::kernel_sets()) {
    const std::size_t nb = width_of(*k);
    std::vector<float> x;
    for (float scale = 1e-40f; scale < 1e38f; scale *= 1.7f) x.insert(x.end(), {scale, -scale});
    for (float v = -12.0f; v < 12.0f; v += 0.00371f) x.push_back(v);
    x.insert(x.end(), {0.0f, -0.0f, testing::kNan, testing::kInf, -testing::kInf});
    const int features = static_cast<int>((x.size() + nb - 1) / nb);
    x.resize(static_cast<std::size_t>(features) * nb, 0.5f);
    for (Unary op : {Unary::identity, Unary::gelu, Unary::gelu_tanh, Unary::relu, Unary::tanh, Unary::sigmoid,
                     Unary::erf, Unary::exp, Unary::sqrt, Unary::abs, Unary::neg, Unary::elu, Unary::softplus}) {
      std::vector<float> y(x.size());
      k->unary(op, x.data(), y.data(), features, k->max_groups);
      for (std::size_t i = 0; i < x.size(); ++i) {
        const double want = reference::unary(op, x[i]);
        // x times a factor that vanishes: NaN by the formula, and nothing to hold a kernel to.
        if (std::isinf(x[i]) && std::isnan(want)) continue;
        CHECK(agrees(y[i], want, reference::unary_bound(op, x[i], want)), k->name, " op ", static_cast<int>(op), " x ",
              x[i], " got ", y[i], " want ", want);
      }
    }
  }
}

TEST(norms) {
  Random random(3);
  for (const KernelSet* k : testing::kernel_sets()) {
    const int nb = static_cast<int>(width_of(*k));
    for (int features : {1, 2, 5, 64, 384}) {
      for (int groups = 1; groups <= k->max_groups; ++groups) {
        std::vector<float> x = random.normals(static_cast<std::size_t>(features * nb)), y(x.size());
        for (float& v : x) v = v * 3.0f + 100.0f;
        const std::vector<float> gamma = random.normals(static_cast<std::size_t>(features)), beta = gamma;
        const int lanes = groups * k->lanes;
        if (features > 1) {  // with one feature the result is all rounding
          k->layer_norm(x.data(), y.data(), features, groups, gamma.data(), beta.data(), 1e-12f);
          const auto want = reference::layer_norm(x.data(), features, nb, lanes, gamma.data(), beta.data(), 1e-12f);
          testing::compare("layer_norm", y.data(), nb, lanes, 0, features, want);
        }
        k->softmax(x.data(), y.data(), features, groups);
        testing::compare("softmax", y.data(), nb, lanes, 0, features,
                         reference::softmax(x.data(), features, nb, lanes));
        k->l2_normalize(x.data(), y.data(), features, groups, 1e-12f);
        testing::compare("l2", y.data(), nb, lanes, 0, features,
                         reference::l2_normalize(x.data(), features, nb, lanes, 1e-12f));
      }
    }
  }
}

TEST(attention_lengths_and_masks) {
  Random random(4);
  for (const KernelSet* k : testing::kernel_sets()) {
    const int nb = static_cast<int>(width_of(*k)), lanes = k->lanes;
    for (int length : {1, 7, 8, 9, 17, 40, 255, 256, 257, 300}) {
      const int d = length % 2 ? 8 : 6, dv = length % 2 ? 5 : 8;
      const int groups = (length + lanes - 1) / lanes;
      const auto rows = [&](int size) { return random.normals(static_cast<std::size_t>(length * size)); };
      const std::vector<float> q = rows(d), key = rows(d), v = rows(dv);
      // One panel per group keeps the layout simple; NB is the stride all the same.
      const auto panels = [&](const std::vector<float>& source, int size) {
        std::vector<float> out(static_cast<std::size_t>(groups * size * nb), 0.25f);
        for (int t = 0; t < length; ++t)
          for (int f = 0; f < size; ++f)
            out[static_cast<std::size_t>((t / lanes * size + f) * nb + t % lanes)] =
                source.empty() ? 0.0f : source[static_cast<std::size_t>(t * size + f)];
        return out;
      };
      const std::vector<float> qp = panels(q, d), kp = panels(key, d), vp = panels(v, dv);
      std::vector<float> op = panels({}, dv);
      std::vector<const float*> qs, ks, vs;
      std::vector<float*> os;
      for (int g = 0; g < groups; ++g) {
        qs.push_back(qp.data() + g * d * nb);
        ks.push_back(kp.data() + g * d * nb);
        vs.push_back(vp.data() + g * dv * nb);
        os.push_back(op.data() + g * dv * nb);
      }
      const long stride = length + nb;
      std::vector<float> bias = random.normals(static_cast<std::size_t>(length * stride));
      std::vector<float> scratch(static_cast<std::size_t>(k->attention_scratch(dv)));
      for (float masked : {0.0f, -10000.0f, -3.4028235e38f}) {
        for (bool all : {false, true}) {
          std::vector<float> key_bias(static_cast<std::size_t>(length), 0.0f);
          for (int t = 0; t < length; ++t)
            if (all || t % 3 == 1) key_bias[static_cast<std::size_t>(t)] = masked;
          AttentionTask task;
          task.q = qs.data();
          task.k = ks.data();
          task.v = vs.data();
          task.out = os.data();
          task.length = length;
          task.last_group = groups;
          task.head_size = d;
          task.value_size = dv;
          task.scale = 0.4f;
          task.key_bias = masked == 0.0f ? nullptr : key_bias.data();
          task.bias = all ? nullptr : bias.data();
          task.bias_stride = stride;
          task.scratch = scratch.data();
          k->attention(task);
          const auto want = reference::attention(q, key, v, length, d, dv, 0.4f, task.key_bias, task.bias, stride);
          for (int t = 0; t < length; ++t) {
            for (int f = 0; f < dv; ++f) {
              const std::size_t i = static_cast<std::size_t>(f * length + t);
              const float got = op[static_cast<std::size_t>((t / lanes * dv + f) * nb + t % lanes)];
              CHECK(agrees(got, want.value[i], want.bound[i]), k->name, " length ", length, " mask ", masked, " got ",
                    got, " want ", want.value[i], " within ", want.bound[i]);
            }
          }
        }
      }
    }
  }
}

TEST(selection) {
  ArchFlags none, avx2, avx512, arm;
  avx2.avx2 = avx512.avx2 = avx512.avx512 = arm.neon = true;
  CHECK(select_isa(none, "") == Isa::scalar);
  CHECK(select_isa(avx2, "") == Isa::avx2);
  CHECK(select_isa(avx512, "") == Isa::avx512);
  CHECK(select_isa(avx512, "avx2") == Isa::avx2);
  CHECK(select_isa(avx512, "scalar") == Isa::scalar);
  CHECK(select_isa(arm, "avx512") == Isa::neon);
  CHECK_THROWS(select_isa(avx2, "sse9"), "scalar, neon, avx2, avx512");
}
