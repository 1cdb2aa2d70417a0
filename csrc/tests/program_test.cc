// A small network: the answer for a token must not depend on its batch, its place or the number of threads.
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#include "base/error.h"
#include "engine/program.h"
#include "support.h"

using namespace espalier;  // NOLINT: tests speak of little else
using testing::Random;

namespace {

constexpr int kFeatures = 12, kRows = 20;

struct Network {
  std::vector<float> table;
  std::unique_ptr<Program> program;
};

Network build(const KernelSet& k, int threads) {
  Random random(7);
  Network n;
  n.table = random.normals(kRows * kFeatures);
  n.program = std::make_unique<Program>(k, threads);
  Program& p = *n.program;
  const auto weight = [&](int rows, int columns, WeightFormat format) {
    const std::vector<float> w = testing::random_weight(random, rows, columns, 0.5, 1);
    return Weight(compress({w.data(), rows, columns, columns, 1}), format, 5, p.panel_width());
  };
  const std::vector<float> gamma(kFeatures, 1.0f);
  Table table;
  table.floats = n.table.data();
  table.rows = kRows;
  int x = p.add_embed("embed", kFeatures, {table});
  const int qkv = p.add_linear("qkv", x, weight(3 * kFeatures, kFeatures, WeightFormat::dense), nullptr, -1, {});
  const int mixed = p.add_attention("attention", qkv, qkv, qkv, {3, 4, 4, 0, kFeatures, 2 * kFeatures, 0.5f, -1});
  x = p.add_linear("out", mixed, weight(kFeatures, kFeatures, WeightFormat::unstructured), nullptr, x, {});
  x = p.add_layer_norm("norm", x, gamma.data(), nullptr, 1e-5f);
  const int h = p.add_linear("up", x, weight(30, kFeatures, WeightFormat::block4x1), nullptr, -1, Unary::gelu);
  x = p.add_linear("down", h, weight(kFeatures, 30, WeightFormat::unstructured), nullptr, x, {});
  p.add_store("tokens", x, 0, kFeatures);
  p.add_store("first", p.add_select("select", x, 0), 0, kFeatures);
  p.add_store("mean", p.add_l2_normalize("l2", p.add_mean("pool", x, 1e-9f), 1e-12f), 1, 3);
  p.finish();
  return n;
}

std::vector<std::vector<float>> run(Program& p, const std::vector<std::int32_t>& lengths,
                                    const std::vector<std::int32_t>& ids) {
  Batch b;
  b.lengths = lengths;
  b.rows.resize(lengths.size());
  std::iota(b.rows.begin(), b.rows.end(), 0);
  b.starts.assign(lengths.size(), 0);
  b.columns = 1000;
  b.indices = {ids.data()};
  std::vector<std::vector<float>> out = {std::vector<float>(ids.size() * kFeatures),
                                         std::vector<float>(lengths.size() * kFeatures),
                                         std::vector<float>(lengths.size() * 3)};
  for (auto& o : out) b.outputs.push_back(o.data());
  p.run(b);
  return out;
}

}  // namespace

TEST(answers_do_not_depend_on_company) {
  Random random(8);
  for (const KernelSet* k : testing::kernel_sets()) {
    Network alone = build(*k, 1);
    for (int threads : {1, 2, 3, 5}) {
      Network together = build(*k, threads);
      for (int round = 0; round < 12; ++round) {
        std::vector<std::int32_t> lengths, ids;
        for (int s = 0, n = 1 + random.below(9); s < n; ++s) lengths.push_back(1 + random.below(round < 6 ? 20 : 300));
        for (std::int32_t length : lengths)
          for (int i = 0; i < length; ++i) ids.push_back(random.below(kRows));
        const auto got = run(*together.program, lengths, ids);
        std::size_t at = 0;
        for (std::size_t s = 0; s < lengths.size(); ++s) {
          const std::size_t n = static_cast<std::size_t>(lengths[s]);
          const std::vector<std::int32_t> own(ids.begin() + static_cast<long>(at),
                                              ids.begin() + static_cast<long>(at + n));
          const auto want = run(*alone.program, {lengths[s]}, own);
          const auto same = [](const std::vector<float>& part, const std::vector<float>& all, std::size_t first) {
            return std::equal(part.begin(), part.end(), all.begin() + static_cast<long>(first));
          };
          CHECK(same(want[0], got[0], at * kFeatures), k->name, " threads ", threads, " tokens of sequence ", s);
          CHECK(same(want[1], got[1], s * kFeatures), k->name, " threads ", threads, " first of sequence ", s);
          CHECK(same(want[2], got[2], s * 3), k->name, " threads ", threads, " mean of sequence ", s);
          at += n;
        }
      }
    }
  }
}

TEST(several_callers) {
  Network n = build(kernels_for(current_isa()), 2);
  const std::vector<std::int32_t> lengths = {5, 9}, ids = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14};
  const auto want = run(*n.program, lengths, ids);
  std::vector<int> wrong(4);
  std::vector<std::thread> callers;
  for (std::size_t t = 0; t < wrong.size(); ++t)
    callers.emplace_back([&, t] {
      for (int i = 0; i < 50; ++i) wrong[t] += run(*n.program, lengths, ids) != want;
    });
  for (std::thread& caller : callers) caller.join();
  CHECK(std::accumulate(wrong.begin(), wrong.end(), 0) == 0);
}

TEST(bad_batches_are_refused) {
  Network n = build(kernels_for(current_isa()), 1);
  CHECK_THROWS(run(*n.program, {2}, {0, kRows}), "outside");
  CHECK_THROWS(run(*n.program, {2}, {0, -1}), "outside");
  CHECK_THROWS(run(*n.program, {0}, {}), "empty");
}

TEST(corrupt_weights_are_refused) {
  Random random(9);
  const std::vector<std::uint32_t> counts = {2, 1};
  const std::vector<std::uint8_t> gaps = {0, 255, 3, 9}, byte(3, 1);
  const std::vector<std::uint16_t> low(3, 7);
  CHECK(decode({2, 300, counts, gaps, low, byte, byte}).nonzeros() == 3);
  CHECK_THROWS(decode({2, 100, counts, gaps, low, byte, byte}), "row");
  CHECK_THROWS(decode({2, 300, counts, std::span(gaps).first(3), low, byte, byte}), "row");
  for (int round = 0; round < 2000; ++round) {
    std::vector<std::uint8_t> noise(static_cast<std::size_t>(random.below(9)));
    for (auto& b : noise) b = static_cast<std::uint8_t>(random.bits() % 5 ? random.below(4) : 255);
    const std::vector<std::uint32_t> c = {static_cast<std::uint32_t>(random.below(4)), 1};
    try {
      CHECK(decode({2, 600, c, noise, low, byte, byte}).columns == 600);
    } catch (const Error&) {
    }
  }
}
