#include "engine/execution.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>

#include "base/error.h"

namespace espalier {

namespace {

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A quantised panel in the memory of one of floats.
std::uint8_t* bytes_of(float* panel) { return reinterpret_cast<std::uint8_t*>(panel); }
const std::uint8_t* bytes_of(const float* panel) { return reinterpret_cast<const std::uint8_t*>(panel); }

int weight_rows(const Op& linear) {
  return linear.weight ? linear.weight->packed().rows : linear.weight8->packed().rows;
}

// Rows of a weight that one pass over several panels keeps in the L2 cache.
int tile_rows(const Op& linear) {
  constexpr std::size_t kTileBytes = 160 * 1024;
  const std::size_t rows = static_cast<std::size_t>(weight_rows(linear));
  const std::size_t bytes = linear.weight ? linear.weight->bytes() : linear.weight8->bytes();
  const std::size_t per_row = std::max<std::size_t>(1, bytes / std::max<std::size_t>(1, rows));
  const std::size_t fit = std::max<std::size_t>(kRowStep, kTileBytes / per_row / kRowStep * kRowStep);
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

// Tokens that a thread takes through a segment together: they share each tile of weights while it is in the L2 cache,
// and their intermediate values should not leave it either.
constexpr int kBlockTokens = 128;

// Rows of a linear layer that are shared out at a time: few, for an even end; enough to use the panel in the L1 cache.
int unit_rows(int rows, int panels, int threads) {
  const int even = static_cast<int>(static_cast<std::int64_t>(rows) * panels / (4 * threads));
  return std::clamp(even / kRowStep * kRowStep, kRowStep, 256);
}

// What a thread may keep for one task of whole sequences.
constexpr std::size_t kTaskBytes = std::size_t{64} << 20;

// Queries of one attention task: enough to reuse keys and values from the cache, few enough to share out.
constexpr int kQueryPanels = 4;

// When `parts` workers take the costliest remaining piece each time: the last one's finish.
double makespan(std::vector<double> pieces, int parts) {
  std::sort(pieces.begin(), pieces.end(), std::greater<>());
  std::vector<double> loads(static_cast<std::size_t>(parts), 0.0);
  for (double piece : pieces) *std::min_element(loads.begin(), loads.end()) += piece;
  return *std::max_element(loads.begin(), loads.end());
}

}  // namespace

Program::Execution::Execution(Program& program, const Batch& batch)
    : p_(program), b_(batch), k_(program.kernels_), nb_(program.panel_width()) {
  for (std::int32_t length : b_.lengths) groups_.push_back(ceil_div(length, k_.lanes));
  block_panels_ = std::max(1, kBlockTokens / nb_);
  choose_partition();
  lay_out_tokens();
  lay_out_sequences();
  place_values();
  plan_steps();
}

void Program::Execution::choose_partition() {
  const int threads = p_.team_.size(), widest = k_.max_groups;
  const int groups = std::accumulate(groups_.begin(), groups_.end(), 0);
  // Multiply-adds per token in linear layers, or what takes as long, and per query and key.
  double linear = 1.0, attention = 0.0;
  for (const Op& op : p_.ops_) {
    if (op.kind == OpKind::linear) linear += static_cast<double>(op.weight->nonzeros());
    if (op.kind == OpKind::linear8)
      linear += block_cost8(k_, op.weight8->packed().format) * static_cast<double>(op.weight8->blocks());
    if (op.kind == OpKind::attention)
      attention += static_cast<double>(op.attention.heads) * (op.attention.head_size + op.attention.value_size);
  }
  const double unit = linear * k_.lanes * 2.0 * widest / (widest + 1.0);  // of cut_cost
  const auto attention_cost = [&](int g) { return attention * g * k_.lanes * g * k_.lanes; };

  // Whole sequences, short ones together, but enough tasks for the team to finish at about the same time.
  const int target = std::clamp(groups / (4 * threads), widest, std::max(widest, block_panels_ * widest));
  std::vector<double> tasks;
  std::size_t most = 0;
  int group_sum = 0;
  double attention_sum = 0.0, attention_total = 0.0;
  task_cut_ = {0};
  for (std::size_t s = 0; s < groups_.size(); ++s) {
    group_sum += groups_[s];
    attention_sum += attention_cost(groups_[s]);
    if (group_sum < target && s + 1 < groups_.size()) continue;
    task_cut_.push_back(static_cast<int>(s) + 1);
    tasks.push_back(cut_cost(group_sum, widest) * unit + attention_sum);
    most = std::max(most, static_cast<std::size_t>(ceil_div(group_sum, widest)));
    attention_total += attention_sum;
    group_sum = 0;
    attention_sum = 0.0;
  }
  const Storage& sequences = *p_.storage_[static_cast<std::size_t>(Partition::sequences)];
  const bool fits = most * static_cast<std::size_t>(nb_) * sequences.task_features * sizeof(float) <= kTaskBytes;
  // Waiting for each other costs a little, and more when it is done after every operation.
  const double by_sequence = fits ? makespan(tasks, threads) : std::numeric_limits<double>::infinity();
  const double by_panel = 1.04 * (cut_cost(ceil_div(groups, threads), widest) * unit + attention_total / threads);
  const double by_row = 1.09 * (cut_cost(groups, widest) * unit + attention_total) / threads;
  Partition best = Partition::panels;
  if (by_row < by_panel && threads > 1) best = Partition::rows;
  if (by_sequence <= std::min(by_panel, by_row)) best = Partition::sequences;
  storage_ = p_.storage_[static_cast<std::size_t>(best)].get();
  if (best != Partition::sequences) return;
  tokens_.task_order.resize(tasks.size());
  std::iota(tokens_.task_order.begin(), tokens_.task_order.end(), 0);
  std::stable_sort(tokens_.task_order.begin(), tokens_.task_order.end(), [&](int a, int b) {
    return tasks[static_cast<std::size_t>(a)] > tasks[static_cast<std::size_t>(b)];
  });
}

// Appends panels of nearly equal width for `groups` more groups.
void Program::Execution::cut_panels(Layout& layout, int groups) const {
  const int panels = ceil_div(groups, k_.max_groups);
  const int start = layout.first.back();
  for (int i = 1; i <= panels; ++i)
    layout.first.push_back(start + static_cast<int>(static_cast<std::int64_t>(groups) * i / panels));
}

// Cuts the tokens into panels, task by task where there are tasks.
void Program::Execution::cut_tasks() {
  const int widest = k_.max_groups, threads = p_.team_.size();
  const int groups = std::accumulate(groups_.begin(), groups_.end(), 0);
  tokens_.first = {0};
  if (storage_->partition == Partition::rows) return cut_panels(tokens_, groups);
  if (storage_->partition == Partition::sequences) {
    for (std::size_t t = 0; t + 1 < task_cut_.size(); ++t) {
      tokens_.task_first.push_back(tokens_.panels());
      cut_panels(tokens_, std::accumulate(groups_.begin() + task_cut_[t], groups_.begin() + task_cut_[t + 1], 0));
    }
  } else {
    int tasks = ceil_div(groups, widest * block_panels_);
    if (tasks < 4 * threads) tasks = std::min(groups, ceil_div(tasks, threads) * threads);
    for (int t = 0; t < tasks; ++t) {
      tokens_.task_first.push_back(tokens_.panels());
      const std::int64_t n = groups;
      cut_panels(tokens_, static_cast<int>(n * (t + 1) / tasks - n * t / tasks));
      tokens_.task_order.push_back(t);
    }
  }
  tokens_.task_first.push_back(tokens_.panels());
  for (std::size_t t = 0; t + 1 < tokens_.task_first.size(); ++t)
    panels_per_task_ = std::max(panels_per_task_, tokens_.task_first[t + 1] - tokens_.task_first[t]);
}

void Program::Execution::lay_out_tokens() {
  const int widest = k_.max_groups, lanes = k_.lanes;
  int groups = 0;
  std::int32_t packed = 0;
  for (std::size_t s = 0; s < b_.lengths.size(); ++s) {
    group_of_.push_back(groups);
    packed_of_.push_back(packed);
    for (int g = 0; g < groups_[s]; g += kQueryPanels * widest)
      attention_items_.push_back({static_cast<int>(s), g, std::min(groups_[s], g + kQueryPanels * widest)});
    groups += groups_[s];
    packed += b_.lengths[s];
  }
  cut_tasks();
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
  cut_panels(sequences_, ceil_div(count, k_.lanes));
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
  const auto floats = [&](const Storage::Slot& slot) {
    return slot.features * nb * static_cast<std::size_t>(layout(slot.domain).panels());
  };
  for (const Storage::Slot& slot : storage_->slots)
    if (slot.scope == Scope::shared) total += floats(slot);
  p_.arena_.resize(total);
  float* at = p_.arena_.data();
  for (const Storage::Slot& slot : storage_->slots) {
    slots_.push_back(slot.scope == Scope::shared ? at : nullptr);
    if (slot.scope == Scope::shared) at += floats(slot);
  }
  for (const Op& op : p_.ops_) {
    std::size_t need = 0;
    if (op.kind == OpKind::embed)
      need = static_cast<std::size_t>(p_.values_[static_cast<std::size_t>(op.output)].features) * nb;
    if (op.kind == OpKind::attention) need = static_cast<std::size_t>(k_.attention_scratch(op.attention.value_size));
    work_floats_ = std::max(work_floats_, need);
  }
  work_floats_ = (work_floats_ + 15) / 16 * 16;
  task_floats_ = storage_->task_features * nb * static_cast<std::size_t>(panels_per_task_);
  const std::size_t block_floats = storage_->block_features * nb * static_cast<std::size_t>(block_panels_);
  for (Buffer<float>& scratch : p_.scratch_) scratch.resize(work_floats_ + task_floats_ + block_floats);
}

void Program::Execution::plan_steps() {
  const auto add = [&](Step::Kind kind, int index, int units) {
    steps_.push_back({kind, index});
    units_.push_back(units);
  };
  for (int n = 0; n < static_cast<int>(storage_->stretches.size()); ++n) {
    const Stretch& stretch = storage_->stretches[static_cast<std::size_t>(n)];
    if (stretch.by_task) {
      add(Step::Kind::tasks, n, static_cast<int>(tokens_.task_order.size()));
      continue;
    }
    const Segment& segment = p_.segments_[static_cast<std::size_t>(stretch.first)];
    for (int i = segment.first; i < segment.last; ++i) {
      const Op& op = p_.ops_[static_cast<std::size_t>(i)];
      const int panels = layout(segment.domain).panels();
      if (op.kind == OpKind::attention)
        add(Step::Kind::attention, i, static_cast<int>(attention_items_.size()) * op.attention.heads);
      else if (!segment.local)
        add(Step::Kind::sequences, i, static_cast<int>(b_.lengths.size()));
      else if (is_linear(op.kind))
        add(Step::Kind::rows, i,
            panels * ceil_div(weight_rows(op), unit_rows(weight_rows(op), panels, p_.team_.size())));
      else
        add(Step::Kind::panels, i, panels);
    }
  }
}

void Program::Execution::run() {
  std::vector<Hand> hands(static_cast<std::size_t>(p_.team_.size()));
  for (std::size_t member = 0; member < hands.size(); ++member) {
    Hand& hand = hands[member];
    hand.member = static_cast<int>(member);
    hand.work = p_.scratch_[member].data();
    hand.task_memory = hand.work + work_floats_;
    hand.block_memory = hand.task_memory + task_floats_;
  }
  p_.team_.run(units_, [&](int member, int step, int unit) {
    run_unit(steps_[static_cast<std::size_t>(step)], unit, hands[static_cast<std::size_t>(member)]);
  });
}

void Program::Execution::run_unit(const Step& step, int unit, Hand& hand) {
  const std::size_t index = static_cast<std::size_t>(step.index);
  if (step.kind == Step::Kind::tasks)
    return run_task(storage_->stretches[index], tokens_.task_order[static_cast<std::size_t>(unit)], hand);
  const Clock::time_point start = Clock::now();
  const Op& op = p_.ops_[index];
  const int value = op.kind == OpKind::store ? op.inputs[0] : op.output;
  const Layout& where = layout(p_.values_[static_cast<std::size_t>(value)].domain);
  switch (step.kind) {
    case Step::Kind::tasks:
      break;
    case Step::Kind::rows:
      run_rows(op, where, unit, hand);
      break;
    case Step::Kind::panels:
      run_local(op, where, unit, hand);
      break;
    case Step::Kind::attention:
      attention(op, attention_items_[static_cast<std::size_t>(unit / op.attention.heads)], unit % op.attention.heads,
                hand);
      break;
    case Step::Kind::sequences:
      if (op.kind == OpKind::select)
        select(op, unit);
      else
        mean(op, unit);
      break;
  }
  charge(step.index, start, hand);
}

float* Program::Execution::panel(int value, int panel, const Hand& hand) const {
  const std::size_t index = static_cast<std::size_t>(storage_->places[static_cast<std::size_t>(value)]);
  const Storage::Slot& slot = storage_->slots[index];
  const std::size_t nb = static_cast<std::size_t>(nb_), stride = slot.features * nb;
  switch (slot.scope) {
    case Scope::block:
      return hand.block_memory + slot.offset * nb * static_cast<std::size_t>(block_panels_) +
             stride * static_cast<std::size_t>(panel - hand.block_panel);
    case Scope::task:
      return hand.task_memory + slot.offset * nb * static_cast<std::size_t>(panels_per_task_) +
             stride * static_cast<std::size_t>(panel - hand.task_panel);
    case Scope::shared:
      break;
  }
  return slots_[index] + stride * static_cast<std::size_t>(panel);
}

void Program::Execution::run_task(const Stretch& stretch, int task, Hand& hand) {
  const std::size_t t = static_cast<std::size_t>(task);
  const int first = tokens_.task_first[t], last = tokens_.task_first[t + 1];
  hand.task_panel = first;
  for (int s = stretch.first; s < stretch.last; ++s) {
    const Segment& segment = p_.segments_[static_cast<std::size_t>(s)];
    if (segment.local) {
      const int step = segment.streamed ? 1 : block_panels_;
      for (int panel = first; panel < last; panel += step)
        run_block(segment, panel, std::min(last, panel + step), hand);
      continue;
    }
    const Clock::time_point start = Clock::now();
    const Op& op = p_.ops_[static_cast<std::size_t>(segment.first)];
    for (int sequence = task_cut_[t]; sequence < task_cut_[t + 1]; ++sequence)
      for (int head = 0; head < op.attention.heads; ++head)
        attention(op, {sequence, 0, groups_[static_cast<std::size_t>(sequence)]}, head, hand);
    charge(segment.first, start, hand);
  }
}

void Program::Execution::run_block(const Segment& segment, int first, int last, Hand& hand) {
  hand.block_panel = first;
  for (int i = segment.first; i < segment.last; ++i) {
    const Clock::time_point start = Clock::now();
    const Op& op = p_.ops_[static_cast<std::size_t>(i)];
    if (is_linear(op.kind)) {
      const int rows = weight_rows(op);
      const int tile = last - first > 1 ? tile_rows(op) : rows;
      for (int row = 0; row < rows; row += tile)
        for (int p = first; p < last; ++p) linear_tile(op, tokens_, p, row, std::min(rows, row + tile), hand);
    } else {
      for (int p = first; p < last; ++p) run_local(op, tokens_, p, hand);
    }
    charge(i, start, hand);
  }
}

void Program::Execution::charge(int op, Clock::time_point start, const Hand& hand) {
  p_.seconds_[static_cast<std::size_t>(hand.member)][static_cast<std::size_t>(op)] +=
      std::chrono::duration<double>(Clock::now() - start).count();
}

// The whole team on one linear layer: some rows of one panel.
void Program::Execution::run_rows(const Op& op, const Layout& where, int unit, Hand& hand) {
  const int rows = weight_rows(op), panels = where.panels();
  const int step = unit_rows(rows, panels, p_.team_.size()), first = unit / panels * step;
  linear_tile(op, where, unit % panels, first, std::min(rows, first + step), hand);
}

void Program::Execution::linear_tile(const Op& op, const Layout& where, int at, int first_row, int last_row,
                                     Hand& hand) {
  Epilogue epilogue;
  epilogue.bias = op.bias.data();
  epilogue.residual = op.residual ? panel(op.inputs[1], at, hand) : nullptr;
  epilogue.act = op.unary;
  epilogue.quantization = op.quantization ? &*op.quantization : nullptr;
  const float* x = panel(op.inputs[0], at, hand);
  float* y = panel(op.output, at, hand);
  if (op.kind == OpKind::linear)
    return k_.linear(op.weight->packed(), x, y, where.groups(at), first_row, last_row, epilogue);
  k_.linear8(op.weight8->packed(), bytes_of(x), y, where.groups(at), first_row, last_row, epilogue);
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
    case OpKind::quantize:
      return k_.quantize(x, bytes_of(y), features, groups, op.quantization ? &*op.quantization : nullptr);
    case OpKind::dequantize:
      return k_.dequantize(bytes_of(x), y, features, groups);
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
  const int column = (op.argument < 0 ? op.argument + b_.widths[s] : op.argument) - b_.starts[s];
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

}  // namespace espalier
