// Images through programs: every operation against plain loops, and networks of them, whose result for an image depends
// on nothing but the image, to the last bit: not on the rest of the batch, nor on the number of threads.
#include <algorithm>
#include <memory>

#include "base/error.h"
#include "image_network.h"

using namespace testing;
using espalier::Batch;
using espalier::Binary;
using espalier::Domain;
using espalier::KernelSet;
using espalier::Program;
using espalier::Quantization;
using espalier::Unary;
using espalier::Weight;
using espalier::Weight8;
using espalier::WeightFormat;
using espalier::WeightFormat8;
using espalier::Window;

namespace {

constexpr WeightFormat kFormats[] = {WeightFormat::dense, WeightFormat::unstructured, WeightFormat::block4x1};
constexpr WeightFormat8 kFormats8[] = {WeightFormat8::dense8, WeightFormat8::block1x4};

// Runs a few images, together and, for the last one, alone; both as expected. For networks of one inexact operation.
void check(Network& network, const std::string& where) {
  network.program.finish();
  const Image images[] = {network.random_image(), network.random_image(), network.random_image()};
  std::vector<Image> got = network.run({&images[0], &images[1], &images[2]});
  got.push_back(network.run({&images[2]})[0]);
  for (std::size_t s = 0; s < got.size(); ++s) {
    const Image want = network.expected(images[std::min(s, std::size_t{2})]);
    for (std::size_t o = 0; o < want.size(); ++o) {
      std::size_t wrong = 0, first = 0;
      for (std::size_t i = want[o].count(); i-- > 0;) {
        if (agrees(got[s][o].x[i], want[o].x[i], want[o].bound.empty() ? 0.0 : want[o].bound[i])) continue;
        ++wrong, first = i;
      }
      CHECK(wrong == 0, where, ": output ", o, " of image ", s, ": ", wrong, " of ", want[o].count(), " wrong, at ",
            first, " got ", got[s][o].x[first], ", expected ", want[o].x[first]);
    }
  }
}

std::string name(const KernelSet& k, int features, const Window& w) {
  const auto pair = [](Pair p) { return text(p[0], "x", p[1]); };
  return text(k.name, " ", features, " features, ", pair(w.in), " to ", pair(w.out), " kernel ", pair(w.kernel),
              " stride ", pair(w.stride), " dilation ", pair(w.dilation), " before ", pair(w.before), " align ",
              w.align);
}

// Those of networks, those at the limits of what windows may be, and others.
std::vector<Window> windows(Random& random) {
  std::vector<Window> out = {
      window({5, 7}, {1, 1}),
      window({9, 13}, {3, 3}, {1, 1}, {1, 1}, {1, 1}),
      window({11, 6}, {5, 3}, {1, 1}, {2, 1}, {2, 1}),
      window({6, 21}, {3, 5}),
      window({13, 10}, {3, 3}, {2, 2}, {1, 1}, {1, 1}),
      window({14, 14}, {3, 3}, {2, 2}, {0, 0}, {1, 1}),
      window({23, 18}, {7, 7}, {2, 2}, {3, 3}, {3, 3}),
      window({12, 17}, {3, 3}, {3, 3}),
      window({8, 19}, {3, 3}, {1, 1}, {2, 2}, {2, 2}, {2, 2}),
      window({17, 15}, {3, 3}, {2, 2}, {2, 2}, {2, 2}, {2, 2}),
      window({7, 9}, {1, 1}, {2, 2}),
      window({9, 40}, {3, 3}, {3, 2}, {1, 1}, {1, 1}),
      window({10, 33}, {2, 4}, {1, 3}, {0, 2}, {1, 1}),
      window({3, 150}, {3, 3}, {1, 1}, {1, 1}, {1, 1}),  // rows longer than a panel
      window({2, 301}, {1, 3}, {1, 2}, {0, 1}, {0, 1}),
      window({2, 200}, {1, 3}, {2, 3}, {0, 1}, {0, 1}),
      window({80, 1}, {3, 1}, {1, 1}, {1, 0}, {1, 0}),
      window({1, 90}, {1, 5}, {1, 1}, {0, 2}, {0, 2}),
      window({6, 5}, {6, 5}),                                  // one pixel, which is one lane per sequence
      window({1, 1}, {3, 3}, {1, 1}, {1, 1}, {1, 1}),          // of one pixel
      window({1, 1}, {2, 2}, {1, 1}, {4, 4}, {4, 4}),          // and more of it
      window({3, 4}, {2, 2}, {1, 1}, {5, 9}, {6, 40}),         // some see nothing but what is beyond the edges
      window({3, 4}, {2, 2}, {2, 2}, {5, 9}, {6, 40}),         //
      window({4, 3}, {2, 2}, {3, 3}, {7, 5}, {3, 11}),         //
      window({5, 4}, {1, 1}, {1, 2}, {0, 0}, {3, 9}, {7, 7}),  //
  };
  for (int i = 0; i < 40; ++i) {
    const auto pair = [&](int least, int most) {
      return Pair{least + random.below(most - least + 1), least + random.below(most - least + 1)};
    };
    const Pair kernel = pair(1, 4), dilation = pair(1, 3);
    const Pair least = {(kernel[0] - 1) * dilation[0] + 1, (kernel[1] - 1) * dilation[1] + 1};
    out.push_back(window({least[0] + random.below(12), least[1] + random.below(50)}, kernel, pair(1, 4), pair(0, 4),
                         pair(0, 4), dilation, 1 << random.below(4)));
  }
  return out;
}

constexpr int kChannels[] = {1, 3, 4, 7, 16};
int channels(Random& random) { return kChannels[random.below(5)]; }

// Calls f(network, window, features, seed) for networks that are not built yet.
template <class F>
void for_windows(std::uint64_t seed, F f) {
  for (const KernelSet* k : kernel_sets()) {
    Random random(seed);
    for (const Window& w : windows(random)) {
      for (int repeat = 0; repeat < 2; ++repeat) {
        const int features = channels(random);
        Network network(*k, 1 + random.below(3), random.bits());
        f(network, w, features);
        check(network, name(*k, features, w));
      }
    }
  }
}

}  // namespace

TEST(convolutions_of_floats) {
  for_windows(100, [](Network& n, Window w, int features) {
    w.align = n.random.below(2) ? w.align : 1 << n.random.below(4);
    const int x = n.load(features, w.in, n.random.below(2));
    for (WeightFormat format : kFormats) {
      const int rows = channels(n.random), r = n.load(rows, w.out, n.random.below(2));
      n.store(n.linear(x, rows, format, 0.0, -1, Unary::identity, w), n.random.below(2));
      n.store(n.linear(x, rows, format, 0.6, r, Unary::relu, w), n.random.below(2));
    }
  });
}

// One scale for all: integers of windows are exact, and so is what is quantised again.
TEST(convolutions_of_static_integers) {
  for_windows(101, [](Network& n, const Window& w, int features) {
    const int x = n.quantize(n.load(features, w.in, n.random.below(2)),
                             Quantization{0.02f, static_cast<float>(n.random.below(256))});
    for (WeightFormat8 format : kFormats8) {
      const int rows = channels(n.random), r = n.load(rows, w.out, true);
      const Quantization to{0.03f, static_cast<float>(n.random.below(256))};
      n.store(n.linear8(x, rows, format, 0.0, -1, Unary::identity, {}, w), n.random.below(2));
      const int y = n.linear8(x, rows, format, 0.6, r, Unary::relu, to, w);
      n.store(n.dequantize(y), n.random.below(2));
      const int sum = n.add8(y, n.quantize(r, Quantization{0.02f, 128.0f}), n.random.below(2), to);
      n.store(n.dequantize(sum), n.random.below(2));
      const Window again = window(w.out, {3, 3}, {1, 1}, {1, 1}, {1, 1});
      n.store(n.linear8(y, channels(n.random), format, 0.3, -1, Unary::relu, {}, again), n.random.below(2));
    }
  });
}

// Each window is rounded on its own, with a scale that what is beyond the edges has no part in.
TEST(convolutions_of_integers_of_each_window) {
  for_windows(102, [](Network& n, Window w, int features) {
    w.align = n.random.below(2) ? w.align : 1 << n.random.below(4);
    const int x = n.load(features, w.in, n.random.below(2));
    for (WeightFormat8 format : kFormats8) {
      const int rows = channels(n.random), r = n.load(rows, w.out, true);
      n.store(n.linear8(x, rows, format, 0.0, -1, Unary::identity, {}, w), n.random.below(2));
      n.store(n.dequantize(n.linear8(x, rows, format, 0.6, r, Unary::relu, Quantization{0.02f, 3.0f}, w)), true);
    }
  });
}

TEST(pools) {
  for_windows(103, [](Network& n, const Window& w, int features) {
    const int x = n.load(features, w.in, n.random.below(2));
    n.store(n.max_pool(x, w), n.random.below(2));
    const int q = n.quantize(x, Quantization{0.02f, static_cast<float>(n.random.below(256))});
    n.store(n.dequantize(n.max_pool(q, w)), n.random.below(2));
    n.store(n.mean_pool(x, w, false), n.random.below(2));
    n.store(n.mean_pool(x, w, true), n.random.below(2));
  });
}

TEST(concat_spread_mean_and_parts_of_outputs) {
  for (const KernelSet* k : kernel_sets()) {
    for (const Pair extent : {Pair{1, 1}, {1, 3}, {5, 4}, {9, 16}, {31, 7}}) {
      for (int features : kChannels) {
        for (bool planes : {false, true}) {
          Network n(*k, 1 + features % 3, 104);
          const int x = n.load(features, extent, planes), y = n.load(5, extent, !planes),
                    z = n.load(features, {1, 1}, false);
          n.store(n.concat({x, y, x}), planes, features, 5);
          n.store(n.concat({y}), !planes);
          n.store(n.concat({y, x, y, y}), planes);
          n.store(n.mean(x), planes);
          n.store(n.spread(z, extent), planes);
          n.store(n.binary(Binary::mul, x, n.spread(z, extent)), !planes);
          for (Binary op : {Binary::max, Binary::min}) n.store(n.binary(op, n.spread(z, extent), x), planes);
          n.store(x, planes, features - 1, 1);
          check(n, text(k->name, " ", extent[0], "x", extent[1], " features ", features));
        }
      }
    }
  }
}

// One number per sequence on all of its tokens.
TEST(spread_over_tokens) {
  Random random(105);
  for (const KernelSet* k : kernel_sets()) {
    for (int threads : {1, 2}) {
      Program p(*k, threads);
      const int x = p.add_load("x", 3, Domain::sequence, 0), y = p.add_load("y", 3, Domain::token, 1);
      p.add_store("sum", p.add_binary("sum", Binary::add, y, p.add_spread("spread", x, Domain::token)), 0, 3);
      p.finish();
      for (int sequences : {1, 2, 7, 40}) {
        Batch b;
        std::vector<int> sequence_of;
        for (int s = 0; s < sequences; ++s) {
          b.rows.push_back(s), b.starts.push_back(0), b.lengths.push_back(1 + random.below(30));
          sequence_of.insert(sequence_of.end(), size(b.lengths.back()), s);
        }
        b.widths = b.lengths;
        const std::vector<float> numbers = random.normals(size(sequences * 3)),
                                 tokens = random.normals(sequence_of.size() * 3);
        std::vector<float> out(tokens.size(), kSentinel);
        b.floats = {numbers.data(), tokens.data()};
        b.outputs = {out.data()};
        p.run(b);
        bool same = true;
        for (std::size_t i = 0; i < out.size(); ++i)
          same = same && out[i] == tokens[i] + numbers[size(sequence_of[i / 3]) * 3 + i % 3];
        CHECK(same, k->name, " sequences ", sequences);
      }
    }
  }
}

namespace {

// How a network's linear layers are: floats in a format; integers of one scale for all, handed on as such where they
// can be; or integers of each window.
enum class Kind { dense, unstructured, block4x1, dense8_static, block1x4_static, dense8_windows };
constexpr Kind kKinds[] = {Kind::dense,         Kind::unstructured,    Kind::block4x1,
                           Kind::dense8_static, Kind::block1x4_static, Kind::dense8_windows};
bool of_floats(Kind kind) { return kind <= Kind::block4x1; }

int layer(Network& n, Kind kind, int x, int rows, int residual, Unary act, const MaybeWindow& w, bool hand_on = false) {
  if (of_floats(kind)) {
    const auto format = static_cast<WeightFormat>(kind);
    return n.linear(x, rows, format, format == WeightFormat::dense ? 0.0 : 0.6, residual, act, w);
  }
  const Quantization fixed{0.03f, 90.0f};
  const bool fixed_scale = kind != Kind::dense8_windows, quantized = n.program.values()[size(x)].quantized;
  if (!quantized && (fixed_scale || !w)) x = n.quantize(x, fixed_scale ? std::optional(fixed) : std::nullopt);
  const auto format = kind == Kind::block1x4_static ? WeightFormat8::block1x4 : WeightFormat8::dense8;
  return n.linear8(x, rows, format, format == WeightFormat8::dense8 ? 0.0 : 0.6, residual, act,
                   fixed_scale && hand_on ? std::optional(fixed) : std::nullopt, w);
}

// Convolutions with and without residual, squeeze and excitation, branches that are put together.
std::unique_ptr<Network> small_network(const KernelSet& k, int threads, Kind kind) {
  auto network = std::make_unique<Network>(k, threads, 106);
  Network& n = *network;
  const Pair whole = {37, 26}, half = {19, 13};
  const Window same = window(half, {3, 3}, {1, 1}, {1, 1}, {1, 1}), point = window(half, {1, 1});
  const int image = n.load(3, whole, true);
  int x = layer(n, kind, image, 16, -1, Unary::relu, window(whole, {5, 3}, {2, 2}, {2, 1}, {2, 1}, {1, 1}, 4));
  n.store(x, false);
  const int narrow = layer(n, kind, x, 7, -1, Unary::relu, point, true);
  const int wide = layer(n, kind, layer(n, kind, narrow, 7, -1, Unary::silu, same, true), 16, x, Unary::relu, point);
  const int squeezed = layer(n, kind, n.mean(wide), 4, -1, Unary::relu, {});
  const int gates = layer(n, kind, squeezed, 16, -1, Unary::sigmoid, {});
  x = n.binary(Binary::mul, wide, n.spread(gates, half));
  const int most = n.max_pool(x, same), even = n.mean_pool(x, same, false);
  x = n.concat({layer(n, kind, x, 5, -1, Unary::relu, same), most, n.binary(Binary::min, even, x)});
  // What a window reads is read once more behind it, where its memory could be taken too early.
  x = n.binary(Binary::add, x, layer(n, kind, x, n.features(x), -1, Unary::identity, same));
  const int shortcut = layer(n, kind, x, 9, -1, Unary::identity, window(half, {1, 1}, {2, 2}));
  x = n.unary(x, Unary::relu);
  const Window down = window(half, {3, 3}, {2, 2}, {1, 1}, {1, 1});
  x = layer(n, kind, x, 9, shortcut, Unary::relu, down);
  n.store(x, true, 1, 8);
  n.store(layer(n, kind, x, 6, -1, Unary::tanh, window(down.out, down.out)), true);
  n.store(layer(n, kind, n.mean(x), 10, -1, Unary::identity, {}), false);
  n.program.finish();
  return network;
}

// The largest difference, as part of the largest value, or of 1.
double difference(const Map& got, const Map& want) {
  double largest = 1.0, difference = 0.0;
  for (std::size_t i = 0; i < want.count(); ++i) {
    largest = std::max(largest, std::fabs(static_cast<double>(want.x[i])));
    const double d = std::fabs(static_cast<double>(got.x[i]) - want.x[i]);
    difference = std::isnan(d) ? kInf : std::max(difference, d);
  }
  return difference / largest;
}

// Builds with `build(threads)`; checks that no image's result depends on its batch or the threads, and that it is what
// plain loops give, within `tolerance`.
template <class Build>
void check_network(const std::string& where, double tolerance, Build build) {
  const auto alone = build(1);
  std::vector<Image> images, want;
  for (int i = 0; i < 5; ++i) {
    images.push_back(alone->random_image());
    want.push_back(alone->run({&images.back()})[0]);
    const Image expected = alone->expected(images.back());
    for (std::size_t o = 0; o < expected.size(); ++o) {
      const double off = difference(want.back()[o], expected[o]);
      CHECK(off <= tolerance, where, ": output ", o, " of image ", i, " is ", off, " off");
    }
  }
  Image bad = images[0];
  for (Map& map : bad) std::fill(map.x.begin(), map.x.end(), kNan);
  for (int threads : {1, 2, 3}) {
    const auto network = build(threads);
    Random random(107);
    for (int count : {1, 2, 3, 5, 5}) {
      std::vector<const Image*> batch;
      std::vector<std::size_t> chosen;
      for (int s = 0; s < count; ++s) {
        chosen.push_back(size(random.below(6)));
        batch.push_back(chosen.back() < 5 ? &images[chosen.back()] : &bad);
      }
      const std::vector<Image> got = network->run(batch);
      for (std::size_t s = 0; s < batch.size(); ++s)
        for (std::size_t o = 0; chosen[s] < 5 && o < got[s].size(); ++o)
          CHECK(got[s][o].x == want[chosen[s]][o].x, where, " threads ", threads, " batch of ", count, ": output ", o,
                " of image ", s, " differs from that of the image alone");
    }
  }
}

}  // namespace

// Integers that fall on the other side of a half are a step apart.
TEST(results_do_not_depend_on_the_batch_or_the_threads) {
  for (const KernelSet* k : kernel_sets())
    for (Kind kind : kKinds)
      check_network(text(k->name, " kind ", static_cast<int>(kind)), of_floats(kind) ? 2e-5 : 0.1,
                    [&](int threads) { return small_network(*k, threads, kind); });
}

// Operations in any order, on whatever stands there already.
TEST(random_networks) {
  for (const KernelSet* k : kernel_sets()) {
    for (std::uint64_t seed = 200; seed < 320; ++seed) {
      const Kind kind = kKinds[seed % 6];
      const auto build = [&](int threads) {
        auto network = std::make_unique<Network>(*k, threads, seed);
        Network& n = *network;
        Random& random = n.random;
        const int more = random.below(3) == 0 ? 20 : 3;
        const Pair extent = {4 + random.below(more), 5 + random.below(more)};
        std::vector<int> values = {n.load(channels(random), extent, true), n.load(channels(random), {1, 1}, false)};
        std::vector<int> read(100);
        const auto any = [&](int like) {  // a value of the same extent
          std::vector<int> found;
          for (int v : values)
            if (like < 0 || n.extent(v) == n.extent(like)) found.push_back(v);
          // The latest three more often than others.
          const int from = std::max(0, random.below(3) ? static_cast<int>(found.size()) - 3 : 0);
          const int v = found[size(from + random.below(static_cast<int>(found.size()) - from))];
          ++read[size(v)];
          return v;
        };
        const Unary acts[] = {Unary::identity, Unary::relu, Unary::tanh};
        for (int i = 0; i < 20; ++i) {
          const int x = any(-1), y = any(x);
          const Pair e = n.extent(x);
          const auto pair = [&](int most) { return Pair{1 + random.below(most), 1 + random.below(most)}; };
          const Pair kernel = {std::min(e[0], 1 + random.below(3)), std::min(e[1], 1 + random.below(3))};
          const bool same = random.below(3) != 0;
          const Pair after = {(kernel[0] - 1) / 2, (kernel[1] - 1) / 2};
          const Pair before = {kernel[0] - 1 - after[0], kernel[1] - 1 - after[1]};
          const Window w = window(e, kernel, same ? Pair{1, 1} : pair(3), before, after);
          const Unary act = acts[random.below(3)];
          switch (random.below(9)) {
            case 0:
            case 1:
              values.push_back(layer(n, kind, x, channels(random), -1, act, w));
              break;
            case 2:
              values.push_back(layer(n, kind, x, n.features(y), same ? y : -1, act, w));
              break;
            case 3:
              values.push_back(layer(n, kind, x, channels(random), -1, act, {}));
              break;
            case 4:
              values.push_back(random.below(2) ? n.max_pool(x, w) : n.mean_pool(x, w, random.below(2)));
              break;
            case 5:
              values.push_back(n.unary(x, act));
              break;
            case 6:
              values.push_back(n.features(x) == n.features(y) ? n.binary(Binary::max, x, y) : n.concat({x, y}));
              break;
            case 7:
              values.push_back(e == Pair{1, 1} ? n.spread(x, extent) : n.mean(x));
              break;
            case 8:
              values.push_back(n.features(x) == n.features(y) ? n.binary(Binary::sub, y, x) : n.unary(y, act));
              break;
          }
        }
        for (int v : values)
          if (read[size(v)] == 0 || random.below(4) == 0) n.store(v, random.below(2));
        n.program.finish();
        return network;
      };
      check_network(text(k->name, " seed ", seed), of_floats(kind) ? 1e-4 : kInf, build);
    }
  }
}

TEST(what_does_not_fit_is_refused) {
  const KernelSet& k = *kernel_sets().front();
  Program p(k, 1);
  const auto weight = [&](int rows, int columns) {
    const std::vector<float> w(size(rows * columns), 1.0f);
    return Weight(espalier::compress({w.data(), rows, columns, columns, 1}), WeightFormat::dense, 8, p.panel_width());
  };
  const auto weight8 = [&](int rows, int columns) {
    const std::vector<std::int16_t> w(size(rows * columns), 1);
    const std::vector<float> scales(size(rows), 1.0f);
    return Weight8(espalier::compress8(w.data(), rows, columns, scales.data()), WeightFormat8::dense8, k);
  };
  const auto conv = [&](int x, int columns, int residual, const Window& w) {
    return p.add_linear("conv", x, weight(6, columns), nullptr, residual, Unary::relu, w);
  };
  const auto conv8 = [&](int x, int columns, const Window& w) {
    return p.add_linear8("conv", x, weight8(6, columns), nullptr, -1, Unary::relu, {}, w);
  };
  const Window same = window({5, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}), other = window({5, 5}, {3, 3});
  const Window strided = window({5, 4}, {3, 3}, {2, 2}, {1, 1}, {1, 1});
  const int x = p.add_load("x", 6, Domain{20}, 0, true), tokens = p.add_load("tokens", 6, Domain::token, 1);
  const int one = p.add_load("one", 6, Domain::sequence, 2), q = p.add_quantize("q", x, Quantization{1.0f, 3.0f});
  const int each = p.add_quantize("each", x, std::nullopt), plain = p.add_load("plain", 6, Domain{25}, 3);
  for (int id : {tokens, one, plain}) {
    CHECK_THROWS(conv(id, 54, -1, same), "does not fit the image");
    CHECK_THROWS(conv8(id, 54, same), "does not fit the image");
    CHECK_THROWS(p.add_max_pool("pool", id, same), "does not fit the image");
    CHECK_THROWS(p.add_mean_pool("pool", id, same, true), "does not fit the image");
    CHECK_THROWS(p.add_binary("sum", Binary::add, x, id), "differ in shape");
    CHECK_THROWS(p.add_concat("concat", {x, id}), "differ in shape");
  }
  CHECK_THROWS(conv(x, 54, -1, other), "does not fit the image");
  CHECK_THROWS(conv8(q, 72, other), "does not fit the image");
  const auto damaged = [&](auto change, const char* fragment) {
    Window w = same;
    change(w);
    CHECK_THROWS(conv(x, 54, -1, w), fragment);
    CHECK_THROWS(conv8(x, 54, w), fragment);
    CHECK_THROWS(p.add_max_pool("pool", x, w), fragment);
    CHECK_THROWS(p.add_mean_pool("pool", x, w, false), fragment);
  };
  for (int bad : {0, -1, -2147483647}) {
    damaged([&](Window& w) { w.in[1] = bad; }, "must be positive");
    damaged([&](Window& w) { w.out[0] = bad; }, "must be positive");
    damaged([&](Window& w) { w.kernel[1] = bad; }, "must be positive");
    damaged([&](Window& w) { w.stride[0] = bad; }, "must be positive");
    damaged([&](Window& w) { w.dilation[1] = bad; }, "must be positive");
    damaged([&](Window& w) { w.align = bad; }, "must be positive");
  }
  damaged([&](Window& w) { w.before[0] = -1; }, "must be positive");
  for (int bad : {32769, 2147483647}) {
    damaged([&](Window& w) { w.kernel[1] = bad; }, "at most 32768");
    damaged([&](Window& w) { w.stride[0] = bad; }, "at most 32768");
    damaged([&](Window& w) { w.dilation[1] = bad; }, "at most 32768");
    damaged([&](Window& w) { w.before[0] = bad; }, "at most 32768");
    damaged([&](Window& w) { w.align = bad; }, "at most 32768");
  }
  damaged([&](Window& w) { w.kernel = {32768, 32768}; }, "too many inputs");
  damaged([&](Window& w) { w.out[1] = 65536, w.stride[1] = 32768; }, "does not fit");
  damaged([&](Window& w) { w.in = {65536, 65536}; }, "does not fit");
  damaged([&](Window& w) { w.out = {65536, 65536}; }, "does not fit");
  CHECK_THROWS(conv(x, 53, -1, same), "weight does not fit its input");
  CHECK_THROWS(conv(x, 6, -1, same), "weight does not fit its input");
  CHECK_THROWS(conv8(q, 54, same), "weight does not fit its input");  // 6 features are 8 there
  CHECK_THROWS(conv8(each, 72, same), "one scale and zero point for all");
  CHECK_THROWS(conv(q, 72, -1, same), "reads a quantised value");
  CHECK_THROWS(conv8(99, 72, same), "does not exist");
  CHECK_THROWS(conv(x, 54, x, strided), "residual does not fit");
  CHECK_THROWS(conv(x, 54, q, same), "reads a quantised value");
  CHECK_THROWS(p.add_max_pool("pool", each, same), "one scale and zero point for all");
  CHECK_THROWS(p.add_mean_pool("pool", q, same, true), "reads a quantised value");
  CHECK_THROWS(p.add_mean_pool("pool", -1, same, true), "does not exist");
  CHECK_THROWS(p.add_concat("concat", {}), "at least one value");
  CHECK_THROWS(p.add_concat("concat", {x, q}), "reads a quantised value");
  CHECK_THROWS(p.add_spread("spread", x, Domain{20}), "one lane per sequence");
  CHECK_THROWS(p.add_spread("spread", tokens, Domain{20}), "one lane per sequence");
  CHECK_THROWS(p.add_spread("spread", one, Domain{-1}), "one lane per sequence");
  CHECK_THROWS(p.add_load("load", 3, Domain::token, 0, true), "planes are of pixels");
  CHECK_THROWS(p.add_load("load", 3, Domain{-5}, 0), "planes are of pixels");
  CHECK_THROWS(p.add_store("store", tokens, 0, 6, true), "planes are of pixels");
  CHECK_THROWS(p.add_select("select", x, 0), "reads tokens");
  CHECK_THROWS(p.add_attention("attention", x, x, x, {1, 2, 2, 0, 2, 4, 1.0f, -1}), "reads tokens");
  // And what does fit, in the same program.
  p.add_store("y", conv(x, 54, conv(x, 54, -1, same), same), 0, 6, true);
  p.add_store("z", conv8(q, 72, strided), 0, 6);
  p.finish();
}
