#include "engine/program.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/arch.h"
#include "base/error.h"
#include "engine/execution.h"

namespace espalier {

namespace {

std::size_t rounded(int features) {
  return static_cast<std::size_t>((features + kRowBlock - 1) / kRowBlock * kRowBlock);
}

void check(const Quantization& q) {
  if (!std::isfinite(q.scale) || q.scale <= 0.0f)
    fail("a quantisation scale must be positive and finite, got " + std::to_string(q.scale));
  if (!(q.zero >= 0.0f && q.zero <= 255.0f && q.zero == std::floor(q.zero)))
    fail("a quantisation zero point must be an integer from 0 to 255, got " + std::to_string(q.zero));
}

Buffer<float> copy(const float* source, int count, std::size_t size) {
  Buffer<float> out(size);
  out.zero();
  std::copy(source, source + count, out.data());
  return out;
}

}  // namespace

bool is_local(OpKind kind) { return kind != OpKind::attention && kind != OpKind::select && kind != OpKind::mean; }
bool is_linear(OpKind kind) { return kind == OpKind::linear || kind == OpKind::linear8; }

int window_inputs(const Value& in, const Window& window) {
  const int block = in.quantized ? kFeatureBlock : window.align;
  return window.taps() * ((in.features + block - 1) / block * block);
}

int stored_features(const Value& v) {
  return v.quantized ? (v.features + kFeatureBlock - 1) / kFeatureBlock + kQuantizedExtra : v.features;
}

Program::Program(const KernelSet& kernels, int threads) : kernels_(kernels), team_(threads) {}
Program::~Program() = default;

const Value& Program::float_value(int id) const {
  require(id >= 0 && id < static_cast<int>(values_.size()), "an operation reads a value that does not exist");
  const Value& value = values_[static_cast<std::size_t>(id)];
  require(!value.quantized, "an operation on floats reads a quantised value");
  return value;
}

const Value& Program::quantized_value(int id) const {
  require(id >= 0 && id < static_cast<int>(values_.size()), "an operation reads a value that does not exist");
  const Value& value = values_[static_cast<std::size_t>(id)];
  require(value.quantized, "an operation on quantised values reads one of floats");
  return value;
}

bool Program::is_quantized(int id) const {
  return id >= 0 && id < static_cast<int>(values_.size()) && values_[static_cast<std::size_t>(id)].quantized;
}

int Program::add(Op op, int features, Domain domain, bool quantized) {
  require(!finished_, "the program is finished; nothing can be added");
  require(features > 0, "a value must have at least one feature");
  op.output = static_cast<int>(values_.size());
  if (std::find(domains_.begin(), domains_.end(), domain) == domains_.end()) domains_.push_back(domain);
  values_.push_back({features, domain, quantized, false});
  ops_.push_back(std::move(op));
  return ops_.back().output;
}

int Program::add_embed(std::string name, int features, std::vector<Table> tables) {
  require(!tables.empty(), "an embedding needs at least one table");
  for (const Table& t : tables) {
    require(t.rows > 0 && (t.floats != nullptr || (t.integers != nullptr && t.scales != nullptr)),
            "an embedding table is empty");
    require(t.index_input >= 0, "an embedding reads an input that does not exist");
    index_inputs_ = std::max(index_inputs_, t.index_input + 1);
  }
  Op op;
  op.kind = OpKind::embed;
  op.name = std::move(name);
  op.tables = std::move(tables);
  return add(std::move(op), features, Domain::token);
}

int Program::add_load(std::string name, int features, Domain domain, int float_input, bool planes) {
  require(float_input >= 0, "a load reads an input that does not exist");
  require(domain.lanes >= (planes ? 1 : 0), "planes are of pixels, and their number is known");
  float_inputs_ = std::max(float_inputs_, float_input + 1);
  Op op;
  op.kind = OpKind::load;
  op.name = std::move(name);
  op.argument = float_input;
  op.planes = planes;
  return add(std::move(op), features, domain);
}

// What linear layers of floats and of integers have in common.
void Program::begin_linear(Op& op, const Value& in, int rows, int columns, const float* bias, int residual,
                           Unary act) const {
  const Domain domain = domain_after(in, op.window);
  require((op.window ? window_inputs(in, *op.window) : in.features) == columns,
          "a linear layer's weight does not fit its input");
  if (residual >= 0) {
    const Value& r = float_value(residual);
    require(r.features == rows && r.domain == domain, "a linear layer's residual does not fit its output");
    op.inputs.push_back(residual);
    op.residual = true;
  }
  op.bias.resize(rounded(rows));
  op.bias.zero();
  if (bias != nullptr) std::copy(bias, bias + rows, op.bias.data());
  op.unary = act;
}

Domain Program::domain_after(const Value& in, const std::optional<Window>& window) const {
  if (!window) return in.domain;
  // Far beyond any network, and small enough for the sums and products that are made of them.
  constexpr int reach = 1 << 15;
  constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max() / 2;
  std::int64_t in_pixels = 1, out_pixels = 1, taps = 1;
  for (std::size_t i = 0; i < 2; ++i) {
    require(window->in[i] > 0 && window->out[i] > 0 && window->kernel[i] > 0 && window->stride[i] > 0 &&
                window->dilation[i] > 0 && window->before[i] >= 0 && window->align > 0,
            "a window's extents must be positive");
    require(window->kernel[i] <= reach && window->stride[i] <= reach && window->dilation[i] <= reach &&
                window->before[i] <= reach && window->align <= reach,
            "a window's kernel, strides, dilations and edges must be at most 32768");
    const std::int64_t last = static_cast<std::int64_t>(window->out[i] - 1) * window->stride[i] +
                              static_cast<std::int64_t>(window->kernel[i] - 1) * window->dilation[i];
    require(last <= most, "a window does not fit the image that it reads");
    in_pixels *= window->in[i];
    out_pixels *= window->out[i];
    taps *= window->kernel[i];
  }
  require(in_pixels == in.domain.lanes && out_pixels <= most, "a window does not fit the image that it reads");
  require(taps * (static_cast<std::int64_t>(in.features) + window->align) <= most, "a window has too many inputs");
  return Domain{static_cast<int>(out_pixels)};
}

int Program::add_linear(std::string name, int x, Weight weight, const float* bias, int residual, Unary act,
                        const std::optional<Window>& window) {
  const Value in = float_value(x);
  const int rows = weight.packed().rows;
  Op op;
  op.window = window;
  op.kind = OpKind::linear;
  op.name = std::move(name);
  op.inputs = {x};
  begin_linear(op, in, rows, weight.packed().columns, bias, residual, act);
  op.weight = std::make_unique<Weight>(std::move(weight));
  return add(std::move(op), rows, domain_after(in, window));
}

int Program::add_quantize(std::string name, int x, const std::optional<Quantization>& fixed) {
  const Value in = float_value(x);
  if (fixed) check(*fixed);
  Op op;
  op.kind = OpKind::quantize;
  op.name = std::move(name);
  op.inputs = {x};
  op.quantization = fixed;
  const int id = add(std::move(op), in.features, in.domain, true);
  values_.back().fixed = fixed.has_value();
  return id;
}

int Program::add_dequantize(std::string name, int x) {
  const Value in = quantized_value(x);
  Op op;
  op.kind = OpKind::dequantize;
  op.name = std::move(name);
  op.inputs = {x};
  return add(std::move(op), in.features, in.domain);
}

int Program::add_add8(std::string name, int a, int b, bool relu, const Quantization& out) {
  const Value va = quantized_value(a), vb = quantized_value(b);
  require(va.features == vb.features && va.domain == vb.domain, "the operands of an addition differ in shape");
  check(out);
  Op op;
  op.kind = OpKind::add8;
  op.name = std::move(name);
  op.inputs = {a, b};
  op.unary = relu ? Unary::relu : Unary::identity;
  op.quantization = out;
  const int id = add(std::move(op), va.features, va.domain, true);
  values_.back().fixed = true;
  return id;
}

int Program::add_linear8(std::string name, int x, Weight8 weight, const float* bias, int residual, Unary act,
                         const std::optional<Quantization>& out, const std::optional<Window>& window) {
  const bool floats = window && !is_quantized(x);
  const Value in = floats ? float_value(x) : quantized_value(x);
  const int rows = weight.packed().rows;
  require(!window || floats || in.fixed, "a convolution of a quantised value needs one scale and zero point for all");
  if (out) check(*out);
  Op op;
  op.window = window;
  op.kind = OpKind::linear8;
  op.name = std::move(name);
  op.inputs = {x};
  begin_linear(op, in, rows, weight.packed().columns, bias, residual, act);
  op.weight8 = std::make_unique<Weight8>(std::move(weight));
  op.quantization = out;
  const int id = add(std::move(op), rows, domain_after(in, window), out.has_value());
  values_.back().fixed = out.has_value();
  return id;
}

int Program::add_layer_norm(std::string name, int x, const float* gamma, const float* beta, float epsilon) {
  const Value in = float_value(x);
  Op op;
  op.kind = OpKind::layer_norm;
  op.name = std::move(name);
  op.inputs = {x};
  op.gamma = copy(gamma, in.features, rounded(in.features));
  if (beta != nullptr) op.beta = copy(beta, in.features, rounded(in.features));
  op.epsilon = epsilon;
  return add(std::move(op), in.features, in.domain);
}

int Program::add_unary(std::string name, int x, Unary unary) {
  const Value in = float_value(x);
  Op op;
  op.kind = OpKind::unary;
  op.name = std::move(name);
  op.inputs = {x};
  op.unary = unary;
  return add(std::move(op), in.features, in.domain);
}

int Program::add_binary(std::string name, Binary binary, int a, int b) {
  const Value va = float_value(a), vb = float_value(b);
  require(va.features == vb.features && va.domain == vb.domain,
          "the operands of an elementwise operation differ in shape");
  Op op;
  op.kind = OpKind::binary;
  op.name = std::move(name);
  op.inputs = {a, b};
  op.binary = binary;
  return add(std::move(op), va.features, va.domain);
}

int Program::add_binary_constant(std::string name, Binary binary, int a, const float* constant) {
  const Value in = float_value(a);
  Op op;
  op.kind = OpKind::binary;
  op.name = std::move(name);
  op.inputs = {a};
  op.binary = binary;
  op.gamma = copy(constant, in.features, rounded(in.features));
  return add(std::move(op), in.features, in.domain);
}

int Program::add_concat(std::string name, const std::vector<int>& parts) {
  require(!parts.empty(), "a concatenation needs at least one value");
  const Domain domain = float_value(parts.front()).domain;
  std::int64_t features = 0;
  for (int part : parts) {
    require(float_value(part).domain == domain, "the parts of a concatenation differ in shape");
    features += float_value(part).features;
  }
  require(features <= std::numeric_limits<int>::max() / 2, "a concatenation has too many features");
  Op op;
  op.kind = OpKind::concat;
  op.name = std::move(name);
  op.inputs = parts;
  return add(std::move(op), static_cast<int>(features), domain);
}

int Program::add_spread(std::string name, int x, Domain domain) {
  const Value in = float_value(x);
  require(in.domain == Domain::sequence && domain.lanes >= 0, "what is spread has one lane per sequence");
  Op op;
  op.kind = OpKind::spread;
  op.name = std::move(name);
  op.inputs = {x};
  return add(std::move(op), in.features, domain);
}

int Program::add_pool(std::string name, int x, const Window& window, Binary binary, bool count_edges) {
  const bool integers = binary == Binary::max && is_quantized(x);
  const Value in = integers ? quantized_value(x) : float_value(x);
  require(!integers || in.fixed, "a pool of a quantised value needs one scale and zero point for all");
  Op op;
  op.kind = OpKind::pool;
  op.name = std::move(name);
  op.inputs = {x};
  op.window = window;
  op.binary = binary;
  op.argument = count_edges;
  const int id = add(std::move(op), in.features, domain_after(in, window), integers);
  values_.back().fixed = integers;
  return id;
}

int Program::add_max_pool(std::string name, int x, const Window& window) {
  return add_pool(std::move(name), x, window, Binary::max, false);
}

int Program::add_mean_pool(std::string name, int x, const Window& window, bool count_edges) {
  return add_pool(std::move(name), x, window, Binary::add, count_edges);
}

int Program::add_softmax(std::string name, int x) {
  const Value in = float_value(x);
  Op op;
  op.kind = OpKind::softmax;
  op.name = std::move(name);
  op.inputs = {x};
  return add(std::move(op), in.features, in.domain);
}

int Program::add_l2_normalize(std::string name, int x, float epsilon) {
  const Value in = float_value(x);
  Op op;
  op.kind = OpKind::l2_normalize;
  op.name = std::move(name);
  op.inputs = {x};
  op.epsilon = epsilon;
  return add(std::move(op), in.features, in.domain);
}

int Program::add_attention(std::string name, int q, int k, int v, const AttentionShape& shape) {
  const auto fits = [&](int id, int feature, int size) {
    const Value& value = float_value(id);
    require(value.domain == Domain::token, "attention reads tokens");
    require(feature >= 0 && size > 0 && feature + shape.heads * size <= value.features,
            "attention heads do not fit their value");
  };
  require(shape.heads > 0, "attention needs at least one head");
  fits(q, shape.q_feature, shape.head_size);
  fits(k, shape.k_feature, shape.head_size);
  fits(v, shape.v_feature, shape.value_size);
  bias_inputs_ = std::max(bias_inputs_, shape.bias_input + 1);
  Op op;
  op.kind = OpKind::attention;
  op.name = std::move(name);
  op.inputs = {q, k, v};
  op.attention = shape;
  return add(std::move(op), shape.heads * shape.value_size, Domain::token);
}

int Program::add_select(std::string name, int x, int column) {
  const Value in = float_value(x);
  require(in.domain == Domain::token, "select reads tokens");
  Op op;
  op.kind = OpKind::select;
  op.name = std::move(name);
  op.inputs = {x};
  op.argument = column;
  return add(std::move(op), in.features, Domain::sequence);
}

int Program::add_mean(std::string name, int x, float epsilon) {
  const Value in = float_value(x);
  Op op;
  op.kind = OpKind::mean;
  op.name = std::move(name);
  op.inputs = {x};
  op.epsilon = epsilon;
  return add(std::move(op), in.features, Domain::sequence);
}

int Program::add_store(std::string name, int x, int first, int width, bool planes) {
  require(!finished_, "the program is finished; nothing can be added");
  const Value in = float_value(x);
  require(in.domain.lanes >= (planes ? 1 : 0), "planes are of pixels, and their number is known");
  require(first >= 0 && width > 0 && first + width <= in.features, "an output's features are out of range");
  Op op;
  op.kind = OpKind::store;
  op.name = std::move(name);
  op.inputs = {x};
  op.argument = first;
  op.width = width;
  op.planes = planes;
  op.output = outputs_++;
  ops_.push_back(std::move(op));
  return ops_.back().output;
}

std::vector<Program::Segment> Program::segments() const {
  std::vector<Segment> out;
  for (int i = 0; i < static_cast<int>(ops_.size()); ++i) {
    const Op& op = ops_[static_cast<std::size_t>(i)];
    const int id = op.kind == OpKind::store ? op.inputs[0] : op.output;
    const Domain domain = values_[static_cast<std::size_t>(id)].domain;
    const bool local = is_local(op.kind);
    // A window reads other panels than its own, so that its input has to be complete.
    if (local && !op.window && !out.empty() && out.back().local && out.back().domain == domain)
      out.back().last = i + 1;
    else
      out.push_back({i, i + 1, domain, local});
  }
  for (Segment& segment : out) segment.streamed = streams(segment);
  return out;
}

// Sparse weights are few bytes: they may come from the L3 cache for every panel, if in return what the panel holds
// stays in the L2 cache from one layer to the next. On Zen 3 this is worth a tenth at 90 % zeros and a third in 4x1
// blocks, and in 8 bits 5 to 15 % from half zeros on; dense layers lose as much.
bool Program::streams(const Segment& segment) const {
  const std::size_t lanes = static_cast<std::size_t>(panel_width());
  std::size_t bytes = 0, entries = 0, held = 0;
  for (int i = segment.first; i < segment.last; ++i) {
    const Op& op = ops_[static_cast<std::size_t>(i)];
    if (!is_linear(op.kind)) continue;
    const auto add = [&](const auto& weight, std::size_t input_bytes) {
      const std::size_t rows = static_cast<std::size_t>(weight.packed().rows);
      const std::size_t columns = static_cast<std::size_t>(weight.packed().columns);
      const std::size_t output_bytes = op.quantization ? 1 : sizeof(float);
      bytes += weight.bytes();
      entries += rows * columns;
      held = std::max(held, (columns * input_bytes + rows * output_bytes * (op.residual ? 2 : 1)) * lanes);
    };
    if (op.kind == OpKind::linear) add(*op.weight, sizeof(float));
    if (op.kind == OpKind::linear8 && op.weight8->packed().format == WeightFormat8::dense8) return false;
    if (op.kind == OpKind::linear8) add(*op.weight8, 1);
  }
  return bytes <= entries && held <= l2_cache_bytes();
}

// A stretch is what runs between two waits for the whole team; slots are memory that values share one after the other.
std::unique_ptr<Program::Storage> Program::plan_storage(Partition partition) const {
  auto storage = std::make_unique<Storage>();
  storage->partition = partition;
  std::vector<int> segment_of(ops_.size()), stretch_of(segments_.size());
  for (int s = 0; s < static_cast<int>(segments_.size()); ++s) {
    const Segment& segment = segments_[static_cast<std::size_t>(s)];
    for (int i = segment.first; i < segment.last; ++i) segment_of[static_cast<std::size_t>(i)] = s;
    const bool crosses_sequences =
        !segment.local && ops_[static_cast<std::size_t>(segment.first)].kind != OpKind::attention;
    const bool by_task = segment.domain != Domain::sequence && !crosses_sequences &&
                         (partition == Partition::sequences ||
                          (partition == Partition::panels && segment.local && segment.domain == Domain::token));
    std::vector<Stretch>& stretches = storage->stretches;
    if (partition == Partition::sequences && by_task && !stretches.empty() && stretches.back().by_task)
      stretches.back().last = s + 1;
    else
      stretches.push_back({s, s + 1, by_task});
    stretch_of[static_cast<std::size_t>(s)] = static_cast<int>(stretches.size()) - 1;
  }

  std::vector<int> born(values_.size(), -1), dies(values_.size(), -1);
  for (int i = 0; i < static_cast<int>(ops_.size()); ++i) {
    const Op& op = ops_[static_cast<std::size_t>(i)];
    if (op.kind != OpKind::store)
      born[static_cast<std::size_t>(op.output)] = dies[static_cast<std::size_t>(op.output)] = i;
    // Panels after this one read through the window too, when the operations behind it have had their turn here.
    const int last =
        op.window ? segments_[static_cast<std::size_t>(segment_of[static_cast<std::size_t>(i)])].last - 1 : i;
    for (int id : op.inputs) dies[static_cast<std::size_t>(id)] = std::max(dies[static_cast<std::size_t>(id)], last);
  }
  const auto scope_of = [&](std::size_t id) {
    const std::size_t first = static_cast<std::size_t>(segment_of[static_cast<std::size_t>(born[id])]),
                      last = static_cast<std::size_t>(segment_of[static_cast<std::size_t>(dies[id])]);
    if (stretch_of[first] != stretch_of[last] ||
        !storage->stretches[static_cast<std::size_t>(stretch_of[first])].by_task)
      return Scope::shared;
    return first == last && segments_[first].local ? Scope::block : Scope::task;
  };

  // A slot may be given away after the last operation that reads its value. Threads run at their own pace, but panel p
  // of a slot is the same memory for each of its values, and a panel's operations run in order.
  storage->places.resize(values_.size());
  std::vector<int> free_after;
  for (int i = 0; i < static_cast<int>(ops_.size()); ++i) {
    const Op& op = ops_[static_cast<std::size_t>(i)];
    if (op.kind == OpKind::store) continue;
    const std::size_t id = static_cast<std::size_t>(op.output);
    const Scope scope = scope_of(id);
    const std::size_t features = rounded(stored_features(values_[id]));
    std::vector<Storage::Slot>& slots = storage->slots;
    std::size_t best = slots.size();
    for (std::size_t s = 0; s < slots.size(); ++s) {
      if (slots[s].scope == scope && slots[s].domain == values_[id].domain && slots[s].features >= features &&
          free_after[s] < i && (best == slots.size() || slots[s].features < slots[best].features))
        best = s;
    }
    // An operation that only rewrites its first input does so in place when nobody reads that input again, a window
    // that begins its segment among them: that has yet to see the panel from those after it.
    const std::size_t segment = static_cast<std::size_t>(segment_of[static_cast<std::size_t>(i)]);
    const Op& begin = ops_[static_cast<std::size_t>(segments_[segment].first)];
    const bool rewrites = (op.kind == OpKind::layer_norm || op.kind == OpKind::unary || op.kind == OpKind::binary) &&
                          !(begin.window && begin.inputs[0] == op.inputs[0]);
    if (rewrites && dies[static_cast<std::size_t>(op.inputs[0])] == i &&
        values_[static_cast<std::size_t>(op.inputs[0])].features == values_[id].features) {
      const std::size_t source = static_cast<std::size_t>(storage->places[static_cast<std::size_t>(op.inputs[0])]);
      if (slots[source].scope == scope) best = source;
    }
    if (best == slots.size()) {
      slots.push_back({features, values_[id].domain, scope, 0});
      free_after.push_back(0);
    }
    free_after[best] = dies[id];
    storage->places[id] = static_cast<int>(best);
  }
  for (Storage::Slot& slot : storage->slots) {
    if (slot.scope != Scope::block) continue;
    slot.offset = storage->block_features;
    storage->block_features += slot.features;
  }
  return storage;
}

void Program::finish() {
  require(!finished_, "the program is finished already");
  require(outputs_ > 0, "the program has no outputs");
  segments_ = segments();
  for (Partition partition : {Partition::sequences, Partition::panels, Partition::rows})
    storage_.push_back(plan_storage(partition));
  scratch_.resize(static_cast<std::size_t>(team_.size()));
  seconds_.assign(static_cast<std::size_t>(team_.size()), std::vector<double>(ops_.size(), 0.0));
  finished_ = true;
}

void Program::check_batch(const Batch& b) const {
  require(finished_, "the program is not finished");
  require(
      b.rows.size() == b.lengths.size() && b.starts.size() == b.lengths.size() && b.widths.size() == b.lengths.size(),
      "the batch's sequence lists differ in length");
  require(static_cast<int>(b.indices.size()) >= index_inputs_ && static_cast<int>(b.floats.size()) >= float_inputs_ &&
              static_cast<int>(b.biases.size()) >= bias_inputs_ && static_cast<int>(b.outputs.size()) == outputs_,
          "the batch lacks inputs or outputs that the program names");
  std::int64_t tokens = 0;
  for (std::size_t s = 0; s < b.lengths.size(); ++s) {
    require(b.lengths[s] > 0 && b.starts[s] >= 0 && b.rows[s] >= 0 &&
                static_cast<std::int64_t>(b.starts[s]) + b.lengths[s] <= b.widths[s],
            "a sequence of the batch is empty or out of range");
    tokens += b.lengths[s];
  }
  constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max() / 2;
  require(tokens <= most, "the batch has too many tokens");
  for (const Domain domain : domains_)
    require((static_cast<std::int64_t>(domain.lanes) + panel_width()) <=
                most / static_cast<std::int64_t>(b.lengths.size() + 1),
            "the batch has too many pixels; run fewer images at a time");
  for (const Op& op : ops_) {
    if (op.kind == OpKind::embed) {
      for (const Table& t : op.tables) {
        const std::int32_t* index = b.indices[static_cast<std::size_t>(t.index_input)];
        for (std::int64_t i = 0; i < tokens; ++i)
          if (index[i] < 0 || index[i] >= t.rows)
            fail("index " + std::to_string(index[i]) + " is outside the " + std::to_string(t.rows) + " rows of " +
                 op.name);
      }
    }
    if (op.kind == OpKind::select) {
      for (std::size_t s = 0; s < b.lengths.size(); ++s) {
        const int column = (op.argument < 0 ? op.argument + b.widths[s] : op.argument) - b.starts[s];
        require(column >= 0 && column < b.lengths[s], "a selected column is not part of its sequence");
      }
    }
  }
}

void Program::run(const Batch& batch) {
  check_batch(batch);
  if (batch.lengths.empty()) return;
  const std::lock_guard lock(mutex_);
  Execution(*this, batch).run();
  ++runs_;
}

std::vector<OpProfile> Program::profile() const {
  const std::lock_guard lock(mutex_);
  std::vector<OpProfile> out;
  for (std::size_t i = 0; i < ops_.size(); ++i) {
    OpProfile p{ops_[i].name, ops_[i].kind, 0.0, runs_};
    for (const std::vector<double>& member : seconds_) p.seconds += member[i];
    out.push_back(std::move(p));
  }
  return out;
}

void Program::reset_profile() {
  const std::lock_guard lock(mutex_);
  for (std::vector<double>& member : seconds_) std::fill(member.begin(), member.end(), 0.0);
  runs_ = 0;
}

}  // namespace espalier
