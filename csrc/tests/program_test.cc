// A small network run in batches of many shapes: a sequence's result depends on nothing but the sequence, to the last
// bit: not on its neighbours, its place in the batch, the number of threads, or how panels are cut.
#include <algorithm>
#include <memory>
#include <thread>

#include "base/error.h"
#include "engine/program.h"
#include "support.h"

using namespace testing;
using espalier::Batch;
using espalier::KernelSet;
using espalier::Program;
using espalier::Quantization;
using espalier::Unary;
using espalier::Weight;
using espalier::Weight8;
using espalier::WeightFormat;
using espalier::WeightFormat8;

namespace {

constexpr int kWords = 50, kPlaces = 300, kFeatures = 24, kInner = 40, kHeads = 3, kOutputs = 4;
constexpr int kWidths[kOutputs] = {kFeatures, kFeatures, kFeatures, 2};
constexpr bool kPerToken[kOutputs] = {true, false, false, true};

// Which kind of linear layers a network has: floats in a format, or integers with activations quantised per token or,
// from one layer to the next without floats in between, with one scale for all.
enum class Kind { dense, unstructured, block4x1, dense8_per_token, block1x4_per_token, block1x4_static };
constexpr Kind kKinds[] = {
    Kind::dense,          Kind::unstructured, Kind::block4x1, Kind::dense8_per_token, Kind::block1x4_per_token,
    Kind::block1x4_static};

struct Network {
  std::vector<float> words, places, gamma, beta;
  Network(const KernelSet& k, int threads, Kind kind) {
    Random random(50);
    words = random.normals(kWords * kFeatures), places = random.normals(kPlaces * kFeatures);
    gamma = random.normals(kFeatures), beta = random.normals(kFeatures);
    program = std::make_unique<Program>(k, threads);
    Program& p = *program;
    const Quantization fixed{0.03f, 120.0f};
    const auto quantize = [&](int x) {
      return p.add_quantize("quantize", x,
                            kind == Kind::block1x4_static ? std::optional<Quantization>(fixed) : std::nullopt);
    };
    // `quantized`: the result too, where the network is one that does so.
    const auto linear = [&](int x, int rows, int columns, int residual, Unary act, bool quantized = false) {
      const bool dense = kind == Kind::dense || kind == Kind::dense8_per_token;
      std::vector<float> w = random_weight(random, rows, columns, dense ? 0.0 : 0.6, 1);
      const std::vector<float> bias = random.normals(static_cast<std::size_t>(rows));
      if (kind <= Kind::block4x1) {
        const WeightFormat format = static_cast<WeightFormat>(kind);
        Weight weight(espalier::compress({w.data(), rows, columns, columns, 1}), format, 9, p.panel_width());
        return p.add_linear("linear", x, std::move(weight), bias.data(), residual, act);
      }
      std::vector<std::int16_t> integers;
      for (float v : w) integers.push_back(static_cast<std::int16_t>(std::clamp(v * 40.0f, -127.0f, 127.0f)));
      const std::vector<float> scales(static_cast<std::size_t>(rows), 0.02f);
      Weight8 weight(espalier::compress8(integers.data(), rows, columns, scales.data()),
                     dense ? WeightFormat8::dense8 : WeightFormat8::block1x4, k);
      const bool chained = quantized && kind == Kind::block1x4_static;
      const int in = p.values()[static_cast<std::size_t>(x)].quantized ? x : quantize(x);
      return p.add_linear8("linear8", in, std::move(weight), bias.data(), residual, act,
                           chained ? std::optional<Quantization>(fixed) : std::nullopt);
    };
    int x = p.add_embed("embed", kFeatures,
                        {{words.data(), nullptr, nullptr, kWords, 0}, {places.data(), nullptr, nullptr, kPlaces, 1}});
    x = p.add_layer_norm("norm", x, gamma.data(), beta.data(), 1e-12f);
    for (int layer = 0; layer < 2; ++layer) {
      const int qkv = linear(x, 3 * kFeatures, kFeatures, -1, Unary::identity);
      const int a =
          p.add_attention("attention", qkv, qkv, qkv,
                          {kHeads, kFeatures / kHeads, kFeatures / kHeads, 0, kFeatures, 2 * kFeatures, 0.35f, -1});
      x = p.add_layer_norm("norm", linear(a, kFeatures, kFeatures, x, Unary::identity), gamma.data(), beta.data(),
                           1e-12f);
      const int h = linear(x, kInner, kFeatures, -1, Unary::gelu, true);
      x = p.add_layer_norm("norm", linear(h, kFeatures, kInner, x, Unary::identity), gamma.data(), nullptr, 1e-12f);
    }
    p.add_store("tokens", x, 0, kFeatures);
    const int first = p.add_select("first", x, 0);
    p.add_store("pooled", linear(first, kFeatures, kFeatures, -1, Unary::tanh), 0, kFeatures);
    p.add_store("mean", p.add_l2_normalize("normalize", p.add_mean("mean", x, 1e-9f), 1e-12f), 0, kFeatures);
    p.add_store("spans", linear(x, 2, kFeatures, -1, Unary::identity), 0, 2);
    p.finish();
  }
  std::unique_ptr<Program> program;
};

using Sequence = std::vector<std::int32_t>;
using Results = std::vector<std::vector<float>>;  // [output]

// Runs a batch; gives each sequence its own results.
std::vector<Results> run(Program& program, const std::vector<const Sequence*>& sequences,
                         const std::vector<float>* key_bias = nullptr) {
  Batch b;
  Sequence ids, columns;
  for (const Sequence* s : sequences) {
    b.rows.push_back(static_cast<std::int32_t>(b.rows.size()));
    b.starts.push_back(0);
    b.lengths.push_back(static_cast<std::int32_t>(s->size()));
    b.widths.push_back(b.lengths.back());
    for (std::size_t i = 0; i < s->size(); ++i) ids.push_back((*s)[i]), columns.push_back(static_cast<std::int32_t>(i));
  }
  b.indices = {ids.data(), columns.data()};
  if (key_bias != nullptr) b.key_bias = key_bias->data();
  std::vector<std::vector<float>> out(kOutputs);
  for (int o = 0; o < kOutputs; ++o) {
    out[static_cast<std::size_t>(o)].assign(
        (kPerToken[o] ? ids.size() : sequences.size()) * static_cast<std::size_t>(kWidths[o]), kNan);
    b.outputs.push_back(out[static_cast<std::size_t>(o)].data());
  }
  program.run(b);
  std::vector<Results> results;
  std::size_t token = 0;
  for (std::size_t s = 0; s < sequences.size(); token += sequences[s++]->size()) {
    Results mine;
    for (int o = 0; o < kOutputs; ++o) {
      const std::size_t width = static_cast<std::size_t>(kWidths[o]);
      const auto begin =
          out[static_cast<std::size_t>(o)].begin() + static_cast<std::ptrdiff_t>((kPerToken[o] ? token : s) * width);
      mine.emplace_back(begin, begin + static_cast<std::ptrdiff_t>((kPerToken[o] ? sequences[s]->size() : 1) * width));
    }
    results.push_back(mine);
  }
  return results;
}

std::vector<Sequence> corpus() {
  Random random(51);
  std::vector<Sequence> out;
  for (int length : {1, 2, 3, 5, 7, 8, 9, 12, 16, 17, 24, 25, 31, 40, 64, 100, 129, 257, 300}) {
    Sequence s;
    for (int i = 0; i < length; ++i) s.push_back(random.below(kWords));
    out.push_back(s);
  }
  return out;
}

}  // namespace

TEST(results_do_not_depend_on_the_batch_or_the_threads) {
  const std::vector<Sequence> sequences = corpus();
  for (const KernelSet* k : kernel_sets()) {
    for (Kind kind : kKinds) {
      Network alone(*k, 1, kind);
      std::vector<Results> want;
      for (const Sequence& s : sequences) want.push_back(run(*alone.program, {&s})[0]);
      for (const Results& r : want)
        for (const auto& values : r)
          for (float v : values) CHECK(std::isfinite(v));
      for (int threads : {1, 2, 3, 5}) {
        Network network(*k, threads, kind);
        Random random(52);
        for (int round = 0; round < 12; ++round) {
          std::vector<std::size_t> chosen;
          for (int n = round == 0 ? 1 : 1 + random.below(25); n > 0; --n)
            chosen.push_back(static_cast<std::size_t>(random.below(static_cast<int>(sequences.size()))));
          std::vector<const Sequence*> batch;
          for (std::size_t i : chosen) batch.push_back(&sequences[i]);
          const std::vector<Results> got = run(*network.program, batch);
          for (std::size_t i = 0; i < chosen.size(); ++i)
            for (int o = 0; o < kOutputs; ++o)
              CHECK(got[i][static_cast<std::size_t>(o)] == want[chosen[i]][static_cast<std::size_t>(o)], k->name,
                    " kind ", static_cast<int>(kind), " threads ", threads, " batch of ", chosen.size(), " sequence ",
                    i, " of length ", batch[i]->size(), " output ", o);
        }
      }
    }
  }
}

TEST(callers_take_turns) {
  const std::vector<Sequence> sequences = corpus();
  for (const KernelSet* k : kernel_sets()) {
    Network network(*k, 2, Kind::block1x4_static);
    std::vector<Results> want;
    for (const Sequence& s : sequences) want.push_back(run(*network.program, {&s})[0]);
    std::vector<int> wrong(4);
    std::vector<std::thread> callers;
    for (std::size_t c = 0; c < wrong.size(); ++c)
      callers.emplace_back([&, c] {
        for (std::size_t i = 0; i < 20; ++i) {
          const std::size_t s = (i * 3 + c) % sequences.size();
          wrong[c] += run(*network.program, {&sequences[s]})[0] != want[s];
        }
      });
    for (std::thread& t : callers) t.join();
    for (int n : wrong) CHECK(n == 0, k->name);
  }
}

// A key bias that masks the tail gives what leaving the tail out gives, up to rounding; NaN in the masked tail's bias
// would not, so only finite masks are promised.
TEST(masking_is_like_leaving_out) {
  for (const KernelSet* k : kernel_sets()) {
    Network network(*k, 2, Kind::dense);
    const Sequence full = corpus()[15];
    const Sequence part(full.begin(), full.begin() + 37);
    std::vector<float> bias(full.size(), 0.0f);
    std::fill(bias.begin() + 37, bias.end(), -3.4028235e38f);
    const Results masked = run(*network.program, {&full}, &bias)[0], cut = run(*network.program, {&part})[0];
    for (std::size_t i = 0; i < part.size() * kFeatures; ++i)
      CHECK(std::fabs(masked[0][i] - cut[0][i]) <= 1e-4f, k->name);
    CHECK(masked[1] == cut[1] || std::fabs(masked[1][0] - cut[1][0]) <= 1e-4f);
  }
}

TEST(what_does_not_fit_is_refused) {
  const KernelSet& k = *kernel_sets().front();
  Network network(k, 1, Kind::dense);
  Sequence bad = {1, 2, kWords};
  CHECK_THROWS(run(*network.program, {&bad}), "index 50 is outside the 50 rows");
  bad[2] = -1;
  CHECK_THROWS(run(*network.program, {&bad}), "index -1");
  const Sequence empty;
  CHECK_THROWS(run(*network.program, {&empty}), "empty");
  CHECK(run(*network.program, {}).empty());
  CHECK_THROWS(network.program->add_unary("late", 0, Unary::relu), "finished");
  Program p(k, 1);
  CHECK_THROWS(p.add_unary("x", 0, Unary::relu), "does not exist");
  CHECK_THROWS(p.finish(), "no outputs");
  const int x = p.add_load("x", 8, espalier::Domain::token, 0);
  CHECK_THROWS(p.add_store("y", x, 4, 5), "out of range");
  CHECK_THROWS(p.add_attention("a", x, x, x, {3, 3, 3, 0, 0, 0, 1.0f, -1}), "do not fit");
  CHECK_THROWS(p.add_select("s", 7, 0), "does not exist");
  const int q = p.add_quantize("q", x, std::nullopt);
  CHECK_THROWS(p.add_unary("u", q, Unary::relu), "reads a quantised value");
  CHECK_THROWS(p.add_store("y", q, 0, 8), "reads a quantised value");
  CHECK_THROWS(p.add_quantize("q", q, std::nullopt), "reads a quantised value");
  CHECK_THROWS(p.add_dequantize("d", x), "reads one of floats");
  CHECK_THROWS(p.add_dequantize("d", 9), "does not exist");
  CHECK_THROWS(p.add_add8("a", q, x, false, {1.0f, 0.0f}), "reads one of floats");
  CHECK_THROWS(p.add_add8("a", q, q, false, {0.0f, 0.0f}), "scale must be positive");
  for (float scale : {0.0f, -1.0f, kNan, kInf})
    CHECK_THROWS(p.add_quantize("q", x, Quantization{scale, 0.0f}), "scale must be positive");
  for (float zero : {-1.0f, 256.0f, 0.5f, kNan})
    CHECK_THROWS(p.add_quantize("q", x, Quantization{1.0f, zero}), "zero point must be an integer");
  const std::vector<std::int16_t> w(24, 1);
  const std::vector<float> scales(3, 1.0f);
  const auto weight = [&](int columns) {
    return Weight8(espalier::compress8(w.data(), 3, columns, scales.data()), WeightFormat8::dense8, k);
  };
  CHECK_THROWS(p.add_linear8("l", q, weight(7), nullptr, -1, Unary::relu, {}), "does not fit its input");
  CHECK_THROWS(p.add_linear8("l", x, weight(8), nullptr, -1, Unary::relu, {}), "reads one of floats");
  CHECK_THROWS(p.add_linear8("l", q, weight(8), nullptr, x, Unary::identity, {}), "residual does not fit");
  CHECK_THROWS(p.add_linear8("l", q, weight(8), nullptr, -1, Unary::relu, Quantization{0.0f, 1.0f}), "scale must be");
}

TEST(profile_counts_runs) {
  Network network(*kernel_sets().front(), 2, Kind::dense);
  const Sequence s = {1, 2, 3};
  run(*network.program, {&s});
  run(*network.program, {&s});
  for (const auto& p : network.program->profile()) CHECK(p.calls == 2 && p.seconds >= 0.0);
  network.program->reset_profile();
  for (const auto& p : network.program->profile()) CHECK(p.calls == 0 && p.seconds == 0.0);
}
