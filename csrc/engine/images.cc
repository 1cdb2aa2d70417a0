// The part of a run that moves lanes between domains: planes and rows in and out, windows, what is spread or put
// together.
#include <algorithm>
#include <cstring>
#include <limits>

#include "engine/execution.h"

namespace espalier {

namespace {

// Of a panel: a feature of floats, or a block of quantised ones.
int panel_rows(const Value& value) {
  return value.quantized ? ceil_div(value.features, kFeatureBlock) : value.features;
}

}  // namespace

// What linear_input and pool need for a panel.
std::size_t Program::Execution::window_floats(const Op& op) const {
  const Value& in = value(op.inputs[0]);
  int rows = panel_rows(in);
  if (op.kind != OpKind::pool) {
    const int inputs = window_inputs(in, *op.window);
    const int quantized = stored_features({inputs, in.domain, true, true});
    rows = in.quantized ? quantized : op.kind == OpKind::linear8 ? inputs + quantized : inputs;
  }
  return static_cast<std::size_t>(rows) * static_cast<std::size_t>(nb_) + 2 * kSlack;
}

// Calls f(lane, count, sequence, pixel) for the lanes of a panel that hold neighbouring pixels of one image.
template <class F>
void Program::Execution::for_pixels(const Layout& where, int at, F f) const {
  const std::int32_t* items = where.item_at.data() + static_cast<std::ptrdiff_t>(at) * nb_;
  for (int lane = 0, count = where.groups(at) * k_.lanes; lane < count;) {
    if (items[lane] < 0) {
      ++lane;
      continue;
    }
    const int pixel = items[lane] % where.domain.lanes;
    const int n = std::min(count - lane, where.domain.lanes - pixel);
    f(lane, n, items[lane] / where.domain.lanes, pixel);
    lane += n;
  }
}

// What a linear layer reads for a panel: its input's, or what the window shows of it, put together in `work`.
const float* Program::Execution::linear_input(const Op& op, const Layout& where, int at, float* work, Hand& hand) {
  if (!op.window) return panel(op.inputs[0], at, hand);
  const Value& in = value(op.inputs[0]);
  const int rows = panel_rows(in);
  const int inputs = window_inputs(in, *op.window);
  const std::ptrdiff_t step =
      static_cast<std::ptrdiff_t>(inputs / op.window->taps() / (in.quantized ? kFeatureBlock : 1)) * nb_;
  hand.edge.fill(0.0f);
  Quantization parameters;
  if (in.quantized) {
    parameters = window_parameters(op, where, at, hand);
    std::memset(hand.edge.data(), static_cast<int>(parameters.zero), sizeof hand.edge);
  }
  float* y = work;
  hand.from = &layout(in.domain);
  find_strips(op, where, at, hand);
  for (int tap = 0; tap < op.window->taps(); ++tap, y += step) {
    gather(op, tap, rows, y, hand);
    std::fill(y + static_cast<std::ptrdiff_t>(rows) * nb_, y + step, 0.0f);
  }
  if (in.quantized) {
    std::fill_n(y, nb_, parameters.scale);
    std::fill_n(y + nb_, nb_, parameters.zero);
  } else if (op.kind == OpKind::linear8) {
    y += kSlack;
    k_.quantize(work, bytes_of(y), inputs, where.groups(at), nullptr);
    return y;
  }
  return work;
}

// Of a quantised value that a window reads: the same scale and zero stand in every lane of every panel.
Quantization Program::Execution::window_parameters(const Op& op, const Layout& where, int at, const Hand& hand) const {
  const Value& in = value(op.inputs[0]);
  const int sequence = where.item_at[static_cast<std::size_t>(at) * static_cast<std::size_t>(nb_)] / where.domain.lanes;
  const float* x = panel(op.inputs[0], layout(in.domain).panel(sequence, 0, k_.lanes), hand) +
                   static_cast<std::ptrdiff_t>(panel_rows(in)) * nb_;
  return {x[0], x[nb_]};
}

// The lanes of a panel as strips of neighbouring pixels of one row of an image.
void Program::Execution::find_strips(const Op& op, const Layout& where, int at, Hand& hand) const {
  const int columns = op.window->out[1];
  hand.strips.clear();
  for_pixels(where, at, [&](int lane, int n, int sequence, int pixel) {
    int row = pixel / columns, column = pixel % columns;
    while (n > 0) {
      const int m = std::min(n, columns - column);
      hand.strips.push_back({lane, m, sequence, row++, column});
      lane += m, n -= m, column = 0;
    }
  });
}

// One tap of a window for the lanes of a panel whose strips are found: rows of what stands there in the input.
void Program::Execution::gather(const Op& op, int tap, int rows, float* y, Hand& hand) {
  const Window& w = *op.window;
  const Layout& from = *hand.from;
  const int lanes = k_.lanes, stride = w.stride[1];
  const int below = tap / w.kernel[1] * w.dilation[0] - w.before[0];
  const int beside = tap % w.kernel[1] * w.dilation[1] - w.before[1];
  hand.runs.clear();
  const auto edge = [&](int lane, int n) {
    for (int i = 0; i < n; i += lanes) hand.runs.push_back({hand.edge.data(), 0, lane + i, false});
  };
  for (const Strip& strip : hand.strips) {
    const int row = strip.row * w.stride[0] + below, start = strip.column * stride + beside, n = strip.lanes;
    // Lanes [first, last) of the strip do not read beyond the edges.
    int first = start >= 0 ? 0 : std::min(n, stride == 1 ? -start : ceil_div(-start, stride)), last = first;
    if (row >= 0 && row < w.in[0] && start < w.in[1])
      last = std::clamp(stride == 1 ? w.in[1] - start : (w.in[1] - 1 - start) / stride + 1, first, n);
    edge(strip.lane, first);
    while (first < last) {
      const int source = row * w.in[1] + start + first * stride;
      const int p = from.panel(strip.sequence, source, lanes), l = from.lane(strip.sequence, source, lanes);
      const int there = from.groups(p) * lanes - l;  // lanes of the panel from here on
      const int m = stride > 2 ? 1 : std::min(last - first, stride == 1 ? there : (there + 1) / 2);
      const float* x = panel(op.inputs[0], p, hand) + l;
      for (int i = 0; i < m; i += lanes)
        hand.runs.push_back({x + i * stride, nb_, strip.lane + first + i, stride == 2});
      first += m;
    }
    edge(strip.lane + last, n - last);
  }
  k_.copy_lanes(hand.runs.data(), static_cast<int>(hand.runs.size()), rows, y);
}

void Program::Execution::load(const Op& op, const Layout& where, int at, Hand& hand) {
  const std::size_t features = static_cast<std::size_t>(value(op.output).features);
  const int count = where.groups(at) * k_.lanes;
  const float* source = b_.floats[static_cast<std::size_t>(op.argument)];
  float* y = panel(op.output, at, hand);
  if (op.planes) {
    const std::size_t pixels = static_cast<std::size_t>(where.domain.lanes), nb = static_cast<std::size_t>(nb_);
    for (std::size_t f = 0; f < features; ++f) std::fill_n(y + f * nb, count, 0.0f);
    return for_pixels(where, at, [&](int lane, int n, int sequence, int pixel) {
      const float* x = source + static_cast<std::size_t>(sequence) * features * pixels + pixel;
      for (std::size_t f = 0; f < features; ++f) std::copy_n(x + f * pixels, n, y + f * nb + lane);
    });
  }
  const std::int32_t* items = where.item_at.data() + static_cast<std::ptrdiff_t>(at) * nb_;
  std::vector<const float*> rows(static_cast<std::size_t>(count), nullptr);
  for (int lane = 0; lane < count; ++lane)
    if (items[lane] >= 0)
      rows[static_cast<std::size_t>(lane)] = source + static_cast<std::size_t>(items[lane]) * features;
  k_.transpose_in(rows.data(), count, y, static_cast<int>(features));
}

void Program::Execution::store(const Op& op, const Layout& where, int at, Hand& hand) {
  const float* x = panel(op.inputs[0], at, hand) + static_cast<std::ptrdiff_t>(op.argument) * nb_;
  float* out = b_.outputs[static_cast<std::size_t>(op.output)];
  if (op.planes) {
    const std::size_t pixels = static_cast<std::size_t>(where.domain.lanes), width = static_cast<std::size_t>(op.width);
    return for_pixels(where, at, [&](int lane, int n, int sequence, int pixel) {
      float* y = out + static_cast<std::size_t>(sequence) * width * pixels + pixel;
      for (std::size_t f = 0; f < width; ++f)
        std::copy_n(x + f * static_cast<std::size_t>(nb_) + lane, n, y + f * pixels);
    });
  }
  const std::int32_t* items = where.item_at.data() + static_cast<std::ptrdiff_t>(at) * nb_;
  for (int lane = 0; lane < where.groups(at) * k_.lanes; ++lane) {
    if (items[lane] < 0) continue;
    float* row = out + static_cast<std::size_t>(items[lane]) * static_cast<std::size_t>(op.width);
    for (int f = 0; f < op.width; ++f) row[f] = x[static_cast<std::ptrdiff_t>(f) * nb_ + lane];
  }
}

void Program::Execution::concat(const Op& op, const Layout& where, int at, Hand& hand) {
  float* y = panel(op.output, at, hand);
  for (const int part : op.inputs) {
    k_.unary(Unary::identity, panel(part, at, hand), y, value(part).features, where.groups(at));
    y += static_cast<std::ptrdiff_t>(value(part).features) * nb_;
  }
}

void Program::Execution::spread(const Op& op, const Layout& where, int at, Hand& hand) {
  const Layout& from = layout(Domain::sequence);
  const std::ptrdiff_t features = value(op.output).features;
  float* y = panel(op.output, at, hand);
  const auto fill = [&](int lane, int n, int sequence) {
    const float* x = panel(op.inputs[0], from.panel(sequence, 0, k_.lanes), hand) + from.lane(sequence, 0, k_.lanes);
    for (std::ptrdiff_t f = 0; f < features; ++f) std::fill_n(y + f * nb_ + lane, n, x[f * nb_]);
  };
  if (where.domain != Domain::token)
    return for_pixels(where, at, [&](int lane, int n, int sequence, int) { fill(lane, n, sequence); });
  const std::int32_t* items = where.item_at.data() + static_cast<std::ptrdiff_t>(at) * nb_;
  for (int lane = 0; lane < where.groups(at) * k_.lanes; ++lane) {
    if (items[lane] < 0) continue;
    const auto after = std::upper_bound(where.packed_of.begin(), where.packed_of.end(), items[lane]);
    fill(lane, 1, static_cast<int>(after - where.packed_of.begin()) - 1);
  }
}

void Program::Execution::pool(const Op& op, const Layout& where, int at, Hand& hand) {
  const Window& w = *op.window;
  const int features = value(op.output).features, groups = where.groups(at);
  const bool mean = op.binary == Binary::add, integers = value(op.output).quantized;
  const int rows = panel_rows(value(op.output));
  float start = mean ? 0.0f : -std::numeric_limits<float>::infinity();
  if (integers) std::memset(&start, k_.signed_bytes ? 0x80 : 0, sizeof start);
  float* y = panel(op.output, at, hand);
  hand.edge.fill(start);
  for (std::ptrdiff_t f = 0; f < rows; ++f) std::fill_n(y + f * nb_, groups * k_.lanes, start);
  hand.from = &layout(value(op.inputs[0]).domain);
  find_strips(op, where, at, hand);
  for (int tap = 0; tap < w.taps(); ++tap) {
    gather(op, tap, rows, hand.work, hand);
    if (integers)
      k_.max8(bytes_of(y), bytes_of(hand.work), bytes_of(y), features, groups);
    else
      k_.binary(op.binary, y, hand.work, y, features, groups, false, 1);
  }
  if (integers) {
    const Quantization parameters = window_parameters(op, where, at, hand);
    y += static_cast<std::ptrdiff_t>(rows) * nb_;
    std::fill_n(y, groups * k_.lanes, parameters.scale);
    std::fill_n(y + nb_, groups * k_.lanes, parameters.zero);
  }
  if (!mean) return;
  // How many inputs the window of each lane has within the image.
  const auto inside = [&](std::size_t axis, int position) {
    int n = 0;
    for (int i = 0; i < w.kernel[axis]; ++i) {
      const int at_input = position * w.stride[axis] - w.before[axis] + i * w.dilation[axis];
      n += at_input >= 0 && at_input < w.in[axis];
    }
    return n;
  };
  for_pixels(where, at, [&](int lane, int n, int, int pixel) {
    for (int i = 0; i < n; ++i) {
      const int taps =
          op.argument != 0 ? w.taps() : inside(0, (pixel + i) / w.out[1]) * inside(1, (pixel + i) % w.out[1]);
      const float count = static_cast<float>(std::max(1, taps));
      for (std::ptrdiff_t f = 0; f < features; ++f) y[f * nb_ + lane + i] /= count;
    }
  });
}

}  // namespace espalier
