#include "image_network.h"

#include <algorithm>
#include <limits>

using espalier::Binary;
using espalier::Domain;
using espalier::Quantization;
using espalier::Unary;
using espalier::Weight;
using espalier::Weight8;
using espalier::WeightFormat;
using espalier::WeightFormat8;
using espalier::Window;
using espalier::reference::kEpsilon;

namespace testing {

namespace {

int round_up(int n, int step) { return (n + step - 1) / step * step; }

// Calls f(tap, output pixel, row, column) for what each tap reads, beyond the edges too.
template <class F>
void for_taps(const Window& w, F f) {
  for (int i = 0; i < w.kernel[0]; ++i)
    for (int j = 0; j < w.kernel[1]; ++j)
      for (int y = 0; y < w.out[0]; ++y)
        for (int x = 0; x < w.out[1]; ++x)
          f(i * w.kernel[1] + j, y * w.out[1] + x, y * w.stride[0] - w.before[0] + i * w.dilation[0],
            x * w.stride[1] - w.before[1] + j * w.dilation[1]);
}

bool inside(const Window& w, int row, int column) {
  return row >= 0 && row < w.in[0] && column >= 0 && column < w.in[1];
}

// What a window shows of [feature][pixel]: [tap][feature][pixel], features rounded up to a multiple of `align`.
template <class T>
std::vector<T> shown(const std::vector<T>& image, int features, const Window& w, int align, T edge) {
  const int each = round_up(features, align), pixels = area(w.out);
  std::vector<T> out(size(w.taps() * each * pixels));
  for_taps(w, [&](int tap, int pixel, int row, int column) {
    for (int f = 0; f < features; ++f)
      out[size((tap * each + f) * pixels + pixel)] =
          inside(w, row, column) ? image[size((f * w.in[0] + row) * w.in[1] + column)] : edge;
  });
  return out;
}

void activate(Map& map, Unary op) {
  map.bound.clear();
  for (float& v : map.x) {
    const double y = espalier::reference::unary(op, v);
    map.bound.push_back(espalier::reference::unary_bound(op, v, y));
    v = static_cast<float>(y);
  }
}

Map quantized(Map map, const MaybeQuantization& fixed) {
  map.q = espalier::reference::quantize(map.x.data(), map.features, map.pixels, map.pixels, fixed ? &*fixed : nullptr);
  return map;
}

}  // namespace

Window window(Pair in, Pair kernel, Pair stride, Pair before, Pair after, Pair dilation, int align) {
  Window w{in, {}, kernel, stride, dilation, before, align};
  for (std::size_t i = 0; i < 2; ++i)
    w.out[i] = (in[i] + before[i] + after[i] - (kernel[i] - 1) * dilation[i] - 1) / stride[i] + 1;
  return w;
}

int Network::add(int id, Pair extent, Step step) {
  CHECK(size(id) == steps_.size());
  steps_.push_back(std::move(step));
  extents_.push_back(extent);
  return id;
}

int Network::load(int features, Pair extent, bool planes) {
  const int input = static_cast<int>(inputs_.size());
  inputs_.push_back({features, area(extent), planes});
  return add(program.add_load("load", features, Domain{area(extent)}, input, planes), extent,
             [=](const Values&, const Image& image) { return image[size(input)]; });
}

int Network::linear(int x, int rows, WeightFormat format, double sparsity, int residual, Unary act,
                    const MaybeWindow& w) {
  const int inputs = features(x), columns = w ? w->taps() * round_up(inputs, w->align) : inputs;
  const int pattern = format == WeightFormat::block4x1 ? 4 : 1;
  std::vector<float> weight = random_weight(random, rows, columns, sparsity, pattern);
  for (float& v : weight) v /= std::sqrt(static_cast<float>(columns));
  const std::vector<float> bias = random.normals(size(rows));
  const int chunk = random.below(3) == 0 ? espalier::max_chunk(program.panel_width()) : 1 + random.below(40);
  Weight packed(espalier::compress({weight.data(), rows, columns, columns, 1}), format, chunk, program.panel_width());
  return add(program.add_linear("linear", x, std::move(packed), bias.data(), residual, act, w), w ? w->out : extent(x),
             [=](const Values& values, const Image&) {
               const Map& in = values[size(x)];
               Map out(rows, w ? area(w->out) : in.pixels);
               const std::vector<float> panel = w ? shown(in.x, inputs, *w, w->align, 0.0f) : in.x;
               const float* addend = residual < 0 ? nullptr : values[size(residual)].x.data();
               const auto result =
                   espalier::reference::linear(weight.data(), rows, columns, panel.data(), out.pixels, out.pixels, 0,
                                               rows, {bias.data(), addend, act, nullptr});
               std::copy(result.value.begin(), result.value.end(), out.x.begin());
               out.bound = result.bound;
               return out;
             });
}

int Network::quantize(int x, const MaybeQuantization& fixed) {
  return add(program.add_quantize("quantize", x, fixed), extent(x),
             [=](const Values& values, const Image&) { return quantized(values[size(x)], fixed); });
}

int Network::dequantize(int x) {
  return add(program.add_dequantize("dequantize", x), extent(x), [=](const Values& values, const Image&) {
    Map out = values[size(x)];
    out.bound.clear();
    for (std::size_t i = 0; i < out.count(); ++i) {
      const std::size_t pixel = i % size(out.pixels);
      out.x[i] = (static_cast<float>(out.q.q[i]) - out.q.zero[pixel]) * out.q.scale[pixel];
    }
    return out;
  });
}

int Network::add8(int a, int b, bool relu, const Quantization& to) {
  return add(program.add_add8("add8", a, b, relu, to), extent(a), [=](const Values& values, const Image&) {
    const Map &p = values[size(a)], &q = values[size(b)];
    Map out(p.features, p.pixels);
    const auto value = [&](const Map& map, std::size_t i) {
      const std::size_t pixel = i % size(map.pixels);
      return (static_cast<float>(map.q.q[i]) - map.q.zero[pixel]) * map.q.scale[pixel];
    };
    for (std::size_t i = 0; i < out.count(); ++i)
      out.x[i] = std::max(relu ? 0.0f : std::numeric_limits<float>::lowest(), value(p, i) + value(q, i));
    return quantized(out, to);
  });
}

int Network::linear8(int x, int rows, WeightFormat8 format, double sparsity, int residual, Unary act,
                     const MaybeQuantization& to, const MaybeWindow& w) {
  const bool floats = !program.values()[size(x)].quantized;
  const int inputs = features(x), align = !w ? 1 : floats ? w->align : espalier::kFeatureBlock;
  const int each = round_up(inputs, align), columns = (w ? w->taps() : 1) * each;
  std::vector<std::int16_t> weight(size(rows * columns));
  // What rounds up the features of floats is zero. Quantised, it may be anything, and its weights are zero.
  for (int i = 0; i < rows * columns; ++i)
    if (random.unit() >= sparsity && (floats || i % columns % each < inputs))
      weight[size(i)] = static_cast<std::int16_t>(random.below(255) - 127);
  std::vector<float> scales;
  for (int m = 0; m < rows; ++m)
    scales.push_back(static_cast<float>(0.01 * (1.0 + random.unit()) / std::sqrt(columns)));
  const std::vector<float> bias = random.normals(size(rows));
  Weight8 packed(espalier::compress8(weight.data(), rows, columns, scales.data()), format, program.kernels());
  return add(program.add_linear8("linear8", x, std::move(packed), bias.data(), residual, act, to, w),
             w ? w->out : extent(x), [=](const Values& values, const Image&) {
               const Map& in = values[size(x)];
               Map out(rows, w ? area(w->out) : in.pixels);
               espalier::reference::Quantized panel = in.q;
               if (floats) {
                 const std::vector<float> seen = shown(in.x, inputs, *w, align, 0.0f);
                 panel = espalier::reference::quantize(seen.data(), columns, out.pixels, out.pixels, nullptr);
               } else if (w) {
                 panel.q = shown(in.q.q, inputs, *w, align, static_cast<int>(in.q.zero[0]));
                 panel.scale.assign(size(out.pixels), in.q.scale[0]);
                 panel.zero.assign(size(out.pixels), in.q.zero[0]);
               }
               const float* addend = residual < 0 ? nullptr : values[size(residual)].x.data();
               out.x = espalier::reference::linear8(weight.data(), scales.data(), rows, columns, panel,
                                                    {bias.data(), addend, act, nullptr}, out.pixels);
               activate(out, act);
               return to ? quantized(out, to) : out;
             });
}

int Network::max_pool(int x, const Window& w) {
  const bool integers = program.values()[size(x)].quantized;
  return add(program.add_max_pool("max", x, w), w.out, [=](const Values& values, const Image&) {
    const Map& in = values[size(x)];
    Map out(in.features, area(w.out));
    if (integers) {
      out.q = {std::vector<int>(out.count()), std::vector<float>(size(out.pixels), in.q.scale[0]),
               std::vector<float>(size(out.pixels), in.q.zero[0])};
      for_taps(w, [&](int, int pixel, int row, int column) {
        for (int f = 0; f < in.features && inside(w, row, column); ++f) {
          int& q = out.q.q[size(f * out.pixels + pixel)];
          q = std::max(q, in.q.q[size(f * in.pixels + row * w.in[1] + column)]);
        }
      });
      return out;
    }
    std::fill(out.x.begin(), out.x.end(), -kInf);
    for_taps(w, [&](int, int pixel, int row, int column) {
      for (int f = 0; f < in.features && inside(w, row, column); ++f)
        out.at(f, pixel) = std::max(out.at(f, pixel), in.at(f, row * w.in[1] + column));
    });
    return out;
  });
}

int Network::mean_pool(int x, const Window& w, bool count_edges) {
  return add(program.add_mean_pool("mean", x, w, count_edges), w.out, [=](const Values& values, const Image&) {
    const Map& in = values[size(x)];
    Map out(in.features, area(w.out));
    for (int f = 0; f < in.features; ++f) {
      std::vector<double> sum(size(out.pixels)), absolute(sum), count(sum);
      for_taps(w, [&](int, int pixel, int row, int column) {
        const bool within = inside(w, row, column);
        const double v = within ? in.at(f, row * w.in[1] + column) : 0.0;
        sum[size(pixel)] += v, absolute[size(pixel)] += std::fabs(v), count[size(pixel)] += within || count_edges;
      });
      for (int p = 0; p < out.pixels; ++p) {
        const double n = std::max(1.0, count[size(p)]);
        out.at(f, p) = static_cast<float>(sum[size(p)] / n);
        out.bound.push_back((w.taps() + 2) * kEpsilon * absolute[size(p)] / n);
      }
    }
    return out;
  });
}

int Network::unary(int x, Unary op) {
  return add(program.add_unary("unary", x, op), extent(x), [=](const Values& values, const Image&) {
    Map out = values[size(x)];
    activate(out, op);
    return out;
  });
}

int Network::binary(Binary op, int a, int b) {
  return add(program.add_binary("binary", op, a, b), extent(a), [=](const Values& values, const Image&) {
    Map out = values[size(a)];
    out.bound.clear();
    for (std::size_t i = 0; i < out.count(); ++i)
      out.x[i] = static_cast<float>(espalier::reference::binary(op, out.x[i], values[size(b)].x[i]));
    return out;
  });
}

int Network::concat(const std::vector<int>& parts) {
  return add(program.add_concat("concat", parts), extent(parts[0]), [=](const Values& values, const Image&) {
    Map out(0, values[size(parts[0])].pixels);
    for (int part : parts) {
      const Map& from = values[size(part)];
      out.features += from.features;
      out.x.insert(out.x.end(), from.x.begin(), from.x.end());
    }
    return out;
  });
}

int Network::spread(int x, Pair extent) {
  return add(program.add_spread("spread", x, Domain{area(extent)}), extent, [=](const Values& values, const Image&) {
    Map out(values[size(x)].features, area(extent));
    for (std::size_t i = 0; i < out.count(); ++i) out.x[i] = values[size(x)].x[i / size(out.pixels)];
    return out;
  });
}

int Network::mean(int x) {
  return add(program.add_mean("mean", x, 1e-9f), {1, 1}, [=](const Values& values, const Image&) {
    const Map& in = values[size(x)];
    Map out(in.features, 1);
    for (int f = 0; f < in.features; ++f) {
      double sum = 0.0, absolute = 0.0;
      for (int p = 0; p < in.pixels; ++p) sum += in.at(f, p), absolute += std::fabs(in.at(f, p));
      out.at(f, 0) = static_cast<float>(sum / in.pixels);
      out.bound.push_back((in.pixels + 4) * kEpsilon * absolute / in.pixels);
    }
    return out;
  });
}

void Network::store(int x, bool planes) { store(x, planes, 0, features(x)); }

void Network::store(int x, bool planes, int first, int width) {
  program.add_store("store", x, first, width, planes);
  outputs_.push_back({width, area(extent(x)), planes});
  stored_.push_back({x, first});
}

Image Network::random_image() {
  Image out;
  for (const Port& port : inputs_) {
    Map& map = out.emplace_back(port.features, port.lanes);
    map.x = random.normals(map.count());
  }
  return out;
}

Image Network::expected(const Image& image) const {
  Values values;
  for (const Step& step : steps_) values.push_back(step(values, image));
  Image out;
  for (std::size_t o = 0; o < outputs_.size(); ++o) {
    const auto& [x, feature] = stored_[o];
    const Map& from = values[size(x)];
    Map& to = out.emplace_back(outputs_[o].features, from.pixels);
    const std::size_t first = size(feature * from.pixels);
    std::copy_n(from.x.data() + first, to.count(), to.x.data());
    if (from.bound.empty()) continue;
    to.bound.resize(to.count());
    std::copy_n(from.bound.data() + first, to.count(), to.bound.data());
  }
  return out;
}

std::vector<Image> Network::run(const std::vector<const Image*>& images) {
  espalier::Batch b;
  for (int s = 0; s < static_cast<int>(images.size()); ++s) {
    b.rows.push_back(s), b.starts.push_back(0);
    b.lengths.push_back(1 + s % 3);  // tokens, of which images take no notice
  }
  b.widths = b.lengths;
  // Where number i of what a program reads or writes for an image, planes or [lanes][features], is in a map.
  const auto place = [](const Port& port, std::size_t i) {
    return port.planes ? i : i % size(port.features) * size(port.lanes) + i / size(port.features);
  };
  std::vector<std::vector<float>> in(inputs_.size()), out(outputs_.size());
  for (std::size_t n = 0; n < in.size(); ++n) {
    for (const Image* image : images)
      for (std::size_t i = 0; i < (*image)[n].count(); ++i) in[n].push_back((*image)[n].x[place(inputs_[n], i)]);
    b.floats.push_back(in[n].data());
  }
  for (std::size_t o = 0; o < out.size(); ++o) {
    out[o].assign(images.size() * size(outputs_[o].features * outputs_[o].lanes), kSentinel);
    b.outputs.push_back(out[o].data());
  }
  program.run(b);
  std::vector<Image> results(images.size());
  for (std::size_t s = 0; s < images.size(); ++s) {
    for (std::size_t o = 0; o < out.size(); ++o) {
      Map& map = results[s].emplace_back(outputs_[o].features, outputs_[o].lanes);
      for (std::size_t i = 0; i < map.count(); ++i) map.x[place(outputs_[o], i)] = out[o][s * map.count() + i];
    }
  }
  return results;
}

}  // namespace testing
