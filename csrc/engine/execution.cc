#include "engine/execution.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "base/error.h"

namespace espalier {

namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Rows of a weight that one pass over several panels keeps in the L2 cache.
int tile_rows(const Weight& weight) {
  constexpr std::size_t kTileBytes = 160 * 1024;
  const std::size_t rows = static_cast<std::size_t>(weight.packed().rows);
  const std::size_t per_row = std::max<std::size_t>(1, weight.bytes() / std::max<std::size_t>(1, rows));
  const std::size_t fit = std::max<std::size_t>(32, kTileBytes / per_row / kRowBlock * kRowBlock);
  return static_cast<int>(std::min(fit, rows));
}

// Relative cost of a panel of `groups`: a weight is loaded once, an activation once per group.
double panel_cost(int groups) { return (groups + 1) / 2.0; }

// Cost of `groups` cut into panels of nearly equal width.
double cut_cost(int groups, int widest) {
  const int panels = ceil_div(groups, widest);
  double cost = 0.0;
  for (int i = 0; i < panels; ++i) cost += panel_cost(groups * (i + 1) / panels - groups * i / panels);
  return cost;
}

constexpr int kTaskPanels = 4;

// Queries of one attention task: enough to reuse keys and values from the cache, few enough to share out.
constexpr int kQueryPanels = 4;

}  // namespace

Program::Execution::Execution(Program& program, const Batch& batch)
    : p_(program), b_(batch), k_(program.kernels_), nb_(program.panel_width()), counters_(program.ops_.size()) {
  lay_out_tokens();
  lay_out_sequences();
  place_values();
}

// Appends panels of nearly equal width for `groups` more groups.
void Program::Execution::cut_panels(Layout& layout, int groups, int widest) const {
  const int panels = ceil_div(groups, widest);
  const int start = layout.first.back();
  for (int i = 1; i <= panels; ++i)
    layout.first.push_back(start + static_cast<int>(static_cast<std::int64_t>(groups) * i / panels));
}

void Program::Execution::lay_out_tokens() {
  const int widest = k_.max_groups, lanes = k_.lanes, threads = p_.team_.size();
  int groups = 0;
  std::int32_t packed = 0;
  for (std::size_t s = 0; s < b_.lengths.size(); ++s) {
    group_of_.push_back(groups);
    packed_of_.push_back(packed);
    const int own = ceil_div(b_.lengths[s], lanes);
    for (int g = 0; g < own; g += kQueryPanels * widest)
      attention_items_.push_back({static_cast<int>(s), g, std::min(own, g + kQueryPanels * widest)});
    groups += own;
    packed += b_.lengths[s];
  }
  const double by_panel = cut_cost(ceil_div(groups, threads), widest);
  const double by_row = cut_cost(groups, widest) / threads * 1.05;  // barriers after every operation
  storage_ = threads == 1 || by_panel <= by_row ? p_.by_panel_.get() : p_.by_row_.get();

  tokens_.first = {0};
  if (storage_->by_panel) {
    // Several panels share each tile of weights while it is in the L2 cache.
    int tasks = ceil_div(groups, widest * kTaskPanels);
    if (tasks < 4 * threads) tasks = std::min(groups, ceil_div(tasks, threads) * threads);
    for (int t = 0; t < tasks; ++t) {
      tokens_.task_first.push_back(tokens_.panels());
      const std::int64_t n = groups;
      cut_panels(tokens_, static_cast<int>(n * (t + 1) / tasks - n * t / tasks), widest);
    }
    tokens_.task_first.push_back(tokens_.panels());
    panels_per_task_ = 1;
    for (std::size_t t = 0; t + 1 < tokens_.task_first.size(); ++t)
      panels_per_task_ = std::max(panels_per_task_, tokens_.task_first[t + 1] - tokens_.task_first[t]);
  } else {
    cut_panels(tokens_, groups, widest);
  }
  for (int p = 0; p < tokens_.panels(); ++p) {
    for (int g = 0; g < tokens_.groups(p); ++g) {
      tokens_.panel_of.push_back(p);
      tokens_.sub_of.push_back(g);
    }
  }
  tokens_.item_at.assign(static_cast<std::size_t>(tokens_.panels()) * static_cast<std::size_t>(nb_), -1);
  for (std::size_t s = 0; s < b_.lengths.size(); ++s) {
    for (std::int32_t i = 0; i < b_.lengths[s]; ++i) {
      const std::size_t group = static_cast<std::size_t>(group_of_[s] + i / lanes);
      tokens_.item_at[static_cast<std::size_t>(tokens_.panel_of[group] * nb_ + tokens_.sub_of[group] * lanes +
                                               i % lanes)] = packed_of_[s] + i;
    }
  }
}

void Program::Execution::lay_out_sequences() {
  const int count = static_cast<int>(b_.lengths.size());
  sequences_.first = {0};
  cut_panels(sequences_, ceil_div(count, k_.lanes), k_.max_groups);
  sequences_.item_at.assign(static_cast<std::size_t>(sequences_.panels()) * static_cast<std::size_t>(nb_), -1);
  int item = 0;
  for (int p = 0; p < sequences_.panels(); ++p) {
    for (int g = 0; g < sequences_.groups(p); ++g) {
      sequences_.panel_of.push_back(p);
      sequences_.sub_of.push_back(g);
      for (int l = 0; l < k_.lanes && item < count; ++l, ++item)
        sequences_.item_at[static_cast<std::size_t>(p * nb_ + g * k_.lanes + l)] = item;
    }
  }
}

void Program::Execution::place_values() {
  const std::size_t nb = static_cast<std::size_t>(nb_);
  std::size_t total = 0;
  const auto floats = [&](const Storage::SlotPlace& slot) {
    return slot.features * nb * static_cast<std::size_t>(layout(slot.domain).panels());
  };
  for (const Storage::SlotPlace& slot : storage_->slots)
    if (!slot.thread_local_slot) total += floats(slot);
  p_.arena_.resize(total);
  float* at = p_.arena_.data();
  for (const Storage::SlotPlace& slot : storage_->slots) {
    slots_.push_back(slot.thread_local_slot ? nullptr : at);
    if (!slot.thread_local_slot) at += floats(slot);
  }
  for (const Op& op : p_.ops_) {
    std::size_t need = 0;
    if (op.kind == OpKind::embed)
      need = static_cast<std::size_t>(p_.values_[static_cast<std::size_t>(op.output)].features) * nb;
    if (op.kind == OpKind::attention) need = static_cast<std::size_t>(k_.attention_scratch(op.attention.value_size));
    work_floats_ = std::max(work_floats_, need);
  }
  work_floats_ = (work_floats_ + 15) / 16 * 16;
  const std::size_t locals = storage_->local_features * nb * static_cast<std::size_t>(panels_per_task_);
  for (Buffer<float>& scratch : p_.scratch_) scratch.resize(work_floats_ + locals);
}

void Program::Execution::run() {
  p_.team_.run([this](int member) {
    Hand hand;
    hand.member = member;
    hand.work = p_.scratch_[static_cast<std::size_t>(member)].data();
    hand.locals = hand.work + work_floats_;
    work(hand);
  });
}

void Program::Execution::work(Hand& hand) {
  for (const Segment& segment : p_.segments_) {
    const Layout& where = layout(segment.domain);
    if (!segment.local) {
      run_crossing(segment.first, hand);
      p_.team_.barrier();
    } else if (storage_->by_panel && segment.domain == Domain::token) {
      const int tasks = static_cast<int>(where.task_first.size()) - 1;
      for (int task = next(static_cast<std::size_t>(segment.first)); task < tasks;
           task = next(static_cast<std::size_t>(segment.first)))
        run_task(segment, where, task, hand);
      p_.team_.barrier();
    } else {
      for (int i = segment.first; i < segment.last; ++i) {
        run_op_by_rows(i, where, hand);
        p_.team_.barrier();
      }
    }
  }
}

float* Program::Execution::panel(int value, int panel, const Hand& hand) const {
  const Place& place = storage_->places[static_cast<std::size_t>(value)];
  const std::size_t stride = place.features * static_cast<std::size_t>(nb_);
  if (place.thread_local_slot) {
    const std::size_t offset = storage_->slots[static_cast<std::size_t>(place.slot)].offset *
                               static_cast<std::size_t>(nb_) * static_cast<std::size_t>(panels_per_task_);
    return hand.locals + offset + stride * static_cast<std::size_t>(panel - hand.first_panel);
  }
  return slots_[static_cast<std::size_t>(place.slot)] + stride * static_cast<std::size_t>(panel);
}

void Program::Execution::run_task(const Segment& segment, const Layout& where, int task, Hand& hand) {
  const int first = where.task_first[static_cast<std::size_t>(task)],
            last = where.task_first[static_cast<std::size_t>(task) + 1];
  hand.first_panel = first;
  std::vector<double>& seconds = p_.seconds_[static_cast<std::size_t>(hand.member)];
  Clock::time_point start = Clock::now();
  for (int i = segment.first; i < segment.last; ++i) {
    const Op& op = p_.ops_[static_cast<std::size_t>(i)];
    if (op.kind == OpKind::linear) {
      const int rows = op.weight->packed().rows;
      const int tile = last - first > 1 ? tile_rows(*op.weight) : rows;
      for (int row = 0; row < rows; row += tile)
        for (int p = first; p < last; ++p) linear_tile(op, where, p, row, std::min(rows, row + tile), hand);
    } else {
      for (int p = first; p < last; ++p) run_local(op, where, p, hand);
    }
    const Clock::time_point now = Clock::now();
    seconds[static_cast<std::size_t>(i)] += std::chrono::duration<double>(now - start).count();
    start = now;
  }
}

// The whole team on one operation: a linear layer's rows are shared out, other operations go panel by panel.
void Program::Execution::run_op_by_rows(int index, const Layout& where, Hand& hand) {
  const Clock::time_point start = Clock::now();
  const Op& op = p_.ops_[static_cast<std::size_t>(index)];
  hand.first_panel = 0;
  if (op.kind == OpKind::linear) {
    const std::size_t member = static_cast<std::size_t>(hand.member);
    if (op.row_bounds[member] < op.row_bounds[member + 1])
      for (int p = 0; p < where.panels(); ++p)
        linear_tile(op, where, p, op.row_bounds[member], op.row_bounds[member + 1], hand);
  } else {
    for (int p = next(static_cast<std::size_t>(index)); p < where.panels(); p = next(static_cast<std::size_t>(index)))
      run_local(op, where, p, hand);
  }
  p_.seconds_[static_cast<std::size_t>(hand.member)][static_cast<std::size_t>(index)] += since(start);
}

void Program::Execution::linear_tile(const Op& op, const Layout& where, int at, int first_row, int last_row,
                                     Hand& hand) {
  Epilogue epilogue;
  epilogue.bias = op.bias.data();
  epilogue.residual = op.residual ? panel(op.inputs[1], at, hand) : nullptr;
  epilogue.act = op.unary;
  k_.linear(op.weight->packed(), panel(op.inputs[0], at, hand), panel(op.output, at, hand), where.groups(at), first_row,
            last_row, epilogue);
}

void Program::Execution::run_local(const Op& op, const Layout& where, int at, Hand& hand) {
  const int groups = where.groups(at);
  if (op.kind == OpKind::embed || op.kind == OpKind::load) return embed(op, where, at, hand);
  if (op.kind == OpKind::store) return store(op, where, at, hand);
  const float* x = panel(op.inputs[0], at, hand);
  float* y = panel(op.output, at, hand);
  const int features = p_.values_[static_cast<std::size_t>(op.output)].features;
  switch (op.kind) {
    case OpKind::layer_norm:
      return k_.layer_norm(x, y, features, groups, op.gamma.data(), op.beta.size() == 0 ? nullptr : op.beta.data(),
                           op.epsilon);
    case OpKind::unary:
      return k_.unary(op.unary, x, y, features, groups);
    case OpKind::binary:
      if (op.inputs.size() == 2)
        return k_.binary(op.binary, x, panel(op.inputs[1], at, hand), y, features, groups, false, 1);
      return k_.binary(op.binary, x, op.gamma.data(), y, features, groups, true, 1);
    case OpKind::softmax:
      return k_.softmax(x, y, features, groups);
    case OpKind::l2_normalize:
      return k_.l2_normalize(x, y, features, groups, op.epsilon);
    default:
      return;
  }
}

// Lanes without a token read zeros, so that everything computed from them is finite.
void Program::Execution::embed(const Op& op, const Layout& where, int at, Hand& hand) {
  const std::size_t features = static_cast<std::size_t>(p_.values_[static_cast<std::size_t>(op.output)].features);
  const int count = where.groups(at) * k_.lanes;
  const std::int32_t* items = where.item_at.data() + static_cast<std::ptrdiff_t>(at) * nb_;
  std::vector<const float*> rows(static_cast<std::size_t>(count), nullptr);
  for (int lane = 0; lane < count; ++lane) {
    const std::int32_t item = items[lane];
    if (item < 0) continue;
    if (op.kind == OpKind::load) {
      rows[static_cast<std::size_t>(lane)] =
          b_.floats[static_cast<std::size_t>(op.argument)] + static_cast<std::size_t>(item) * features;
      continue;
    }
    float* sum = hand.work + static_cast<std::size_t>(lane) * features;
    bool first = true;
    for (const Table& table : op.tables) {
      const std::size_t row = static_cast<std::size_t>(b_.indices[static_cast<std::size_t>(table.index_input)][item]);
      if (table.floats != nullptr) {
        const float* source = table.floats + row * features;
        if (first)
          std::memcpy(sum, source, features * sizeof(float));
        else
          for (std::size_t f = 0; f < features; ++f) sum[f] += source[f];
      } else {
        const std::int16_t* source = table.integers + row * features;
        const float scale = table.scales[row];
        for (std::size_t f = 0; f < features; ++f)
          sum[f] = (first ? 0.0f : sum[f]) + scale * static_cast<float>(source[f]);
      }
      first = false;
    }
    rows[static_cast<std::size_t>(lane)] = sum;
  }
  k_.transpose_in(rows.data(), count, panel(op.output, at, hand), static_cast<int>(features));
}

void Program::Execution::store(const Op& op, const Layout& where, int at, Hand& hand) {
  const float* x = panel(op.inputs[0], at, hand) + static_cast<std::ptrdiff_t>(op.argument) * nb_;
  float* out = b_.outputs[static_cast<std::size_t>(op.output)];
  const std::int32_t* items = where.item_at.data() + static_cast<std::ptrdiff_t>(at) * nb_;
  for (int lane = 0; lane < where.groups(at) * k_.lanes; ++lane) {
    if (items[lane] < 0) continue;
    float* row = out + static_cast<std::size_t>(items[lane]) * static_cast<std::size_t>(op.width);
    for (int f = 0; f < op.width; ++f) row[f] = x[static_cast<std::ptrdiff_t>(f) * nb_ + lane];
  }
}

void Program::Execution::run_crossing(int index, Hand& hand) {
  const Clock::time_point start = Clock::now();
  const Op& op = p_.ops_[static_cast<std::size_t>(index)];
  const std::size_t counter = static_cast<std::size_t>(index);
  if (op.kind == OpKind::attention) {
    const int items = static_cast<int>(attention_items_.size());
    const int tasks = items * op.attention.heads;
    for (int t = next(counter); t < tasks; t = next(counter))
      attention(op, attention_items_[static_cast<std::size_t>(t / op.attention.heads)], t % op.attention.heads, hand);
  } else {
    const int sequences = static_cast<int>(b_.lengths.size());
    for (int s = next(counter); s < sequences; s = next(counter)) {
      if (op.kind == OpKind::select)
        select(op, s);
      else
        mean(op, s);
    }
  }
  p_.seconds_[static_cast<std::size_t>(hand.member)][counter] += since(start);
}

void Program::Execution::attention(const Op& op, const AttentionItem& item, int head, Hand& hand) {
  const AttentionShape& shape = op.attention;
  const std::size_t s = static_cast<std::size_t>(item.sequence);
  const int length = b_.lengths[s];
  const int groups = ceil_div(length, k_.lanes);
  const auto point = [&](int value, int feature, auto& pointers) {
    pointers.resize(static_cast<std::size_t>(groups));
    for (int g = 0; g < groups; ++g) {
      const std::size_t group = static_cast<std::size_t>(group_of_[s] + g);
      pointers[static_cast<std::size_t>(g)] = panel(value, tokens_.panel_of[group], hand) +
                                              static_cast<std::ptrdiff_t>(feature) * nb_ +
                                              tokens_.sub_of[group] * k_.lanes;
    }
  };
  point(op.inputs[0], shape.q_feature + head * shape.head_size, hand.q);
  point(op.inputs[1], shape.k_feature + head * shape.head_size, hand.k);
  point(op.inputs[2], shape.v_feature + head * shape.value_size, hand.v);
  point(op.output, head * shape.value_size, hand.out);
  AttentionTask task;
  task.q = hand.q.data();
  task.k = hand.k.data();
  task.v = hand.v.data();
  task.out = hand.out.data();
  task.length = length;
  task.first_group = item.first_group;
  task.last_group = item.last_group;
  task.head_size = shape.head_size;
  task.value_size = shape.value_size;
  task.scale = shape.scale;
  task.key_bias = b_.key_bias == nullptr ? nullptr : b_.key_bias + packed_of_[s];
  if (shape.bias_input >= 0) {
    const BiasTensor& bias = b_.biases[static_cast<std::size_t>(shape.bias_input)];
    const std::int64_t start = b_.starts[s];
    task.bias = bias.data + b_.rows[s] * bias.row_stride + head * bias.head_stride + start * bias.key_stride + start;
    task.bias_stride = static_cast<long>(bias.key_stride);
  }
  task.scratch = hand.work;
  k_.attention(task);
}

void Program::Execution::select(const Op& op, int sequence) {
  const std::size_t s = static_cast<std::size_t>(sequence);
  const int column = (op.argument < 0 ? op.argument + b_.columns : op.argument) - b_.starts[s];
  const std::size_t from = static_cast<std::size_t>(group_of_[s] + column / k_.lanes),
                    to = static_cast<std::size_t>(sequence / k_.lanes);
  const Hand none;
  const float* x =
      panel(op.inputs[0], tokens_.panel_of[from], none) + tokens_.sub_of[from] * k_.lanes + column % k_.lanes;
  float* y = panel(op.output, sequences_.panel_of[to], none) + sequences_.sub_of[to] * k_.lanes + sequence % k_.lanes;
  const int features = p_.values_[static_cast<std::size_t>(op.output)].features;
  for (std::ptrdiff_t f = 0; f < features; ++f) y[f * nb_] = x[f * nb_];
}

void Program::Execution::mean(const Op& op, int sequence) {
  const std::size_t s = static_cast<std::size_t>(sequence);
  const std::size_t to = static_cast<std::size_t>(sequence / k_.lanes);
  const Hand none;
  float* y = panel(op.output, sequences_.panel_of[to], none) + sequences_.sub_of[to] * k_.lanes + sequence % k_.lanes;
  const int features = p_.values_[static_cast<std::size_t>(op.output)].features;
  const float* weights = b_.token_weights == nullptr ? nullptr : b_.token_weights + packed_of_[s];
  float total = 0.0f;
  for (int i = 0; i < b_.lengths[s]; ++i) total += weights == nullptr ? 1.0f : weights[i];
  const float inverse = 1.0f / std::max(total, op.epsilon);
  for (std::ptrdiff_t f = 0; f < features; ++f) y[f * nb_] = 0.0f;
  for (int first = 0; first < b_.lengths[s]; first += k_.lanes) {
    const std::size_t from = static_cast<std::size_t>(group_of_[s] + first / k_.lanes);
    const float* x = panel(op.inputs[0], tokens_.panel_of[from], none) + tokens_.sub_of[from] * k_.lanes;
    const int lanes = std::min(k_.lanes, b_.lengths[s] - first);
    for (std::ptrdiff_t f = 0; f < features; ++f) {
      float sum = 0.0f;
      for (int l = 0; l < lanes; ++l) sum += x[f * nb_ + l] * (weights == nullptr ? 1.0f : weights[first + l]);
      y[f * nb_] += sum;
    }
  }
  for (std::ptrdiff_t f = 0; f < features; ++f) y[f * nb_] *= inverse;
}

double time_linear(const KernelSet& kernels, const Weight& weight) {
  const PackedWeight& w = weight.packed();
  const std::size_t nb = static_cast<std::size_t>(kernels.lanes) * static_cast<std::size_t>(kernels.max_groups);
  const std::size_t rows = (static_cast<std::size_t>(w.rows) + kRowBlock - 1) / kRowBlock * kRowBlock;
  Buffer<float> x(static_cast<std::size_t>(w.columns) * nb), y(rows * nb);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 17) * 0.0625f - 0.5f;
  double best = 1e30;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const Clock::time_point start = Clock::now();
    kernels.linear(w, x.data(), y.data(), kernels.max_groups, 0, w.rows, {});
    best = std::min(best, since(start));
  }
  return best;
}

}  // namespace espalier
