#include "engine/execution.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>

#include "base/error.h"

namespace espalier {

namespace {

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
  for (const Domain domain : p_.domains_) {
    Layout& layout = layouts_.emplace_back();
    layout.domain = domain;
    lay_out(layout);
  }
  if (storage_->partition == Partition::panels) {
    task_order_.resize(layout(Domain::token).task_first.size() - 1);
    std::iota(task_order_.begin(), task_order_.end(), 0);
  }
  const int width = kQueryPanels * k_.max_groups;
  for (std::size_t s = 0; s < groups_.size(); ++s)
    for (int g = 0; g < groups_[s]; g += width)
      attention_items_.push_back({static_cast<int>(s), g, std::min(groups_[s], g + width)});
  place_values();
  plan_steps();
}

void Program::Execution::choose_partition() {
  const int threads = p_.team_.size(), widest = k_.max_groups;
  const int groups = std::accumulate(groups_.begin(), groups_.end(), 0);
  // Multiply-adds per token in linear layers, or what takes as long, and per query and key; and all of an image's.
  double linear = 1.0, attention = 0.0, image = 0.0;
  const double lanes = k_.lanes * 2.0 * widest / (widest + 1.0);  // that a unit of cut_cost stands for
  for (const Op& op : p_.ops_) {
    if (op.kind == OpKind::attention)
      attention += static_cast<double>(op.attention.heads) * (op.attention.head_size + op.attention.value_size);
    if (!is_linear(op.kind)) continue;
    const double cost = op.kind == OpKind::linear
                            ? static_cast<double>(op.weight->nonzeros())
                            : block_cost8(k_, op.weight8->packed().format) * static_cast<double>(op.weight8->blocks());
    const int pixels = value(op.output).domain.lanes;
    if (pixels > 1)
      image += cost * lanes * cut_cost(ceil_div(pixels, k_.lanes), widest);
    else
      linear += cost;
  }
  const double unit = linear * lanes;
  const auto attention_cost = [&](int g) { return attention * g * k_.lanes * g * k_.lanes; };

  // Whole sequences, short ones together, but enough tasks for the team to finish at about the same time.
  const int target =
      image > 0.0 ? 1 : std::clamp(groups / (4 * threads), widest, std::max(widest, block_panels_ * widest));
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
    tasks.push_back(cut_cost(group_sum, widest) * unit + attention_sum + image);
    most = std::max(most, static_cast<std::size_t>(ceil_div(group_sum, widest)));
    attention_total += attention_sum;
    group_sum = 0;
    attention_sum = 0.0;
  }
  const Storage& sequences = *p_.storage_[static_cast<std::size_t>(Partition::sequences)];
  std::size_t held = 0;
  for (const Storage::Slot& slot : sequences.slots) {
    const std::size_t panels = slot.domain.lanes > 0
                                   ? static_cast<std::size_t>(ceil_div(ceil_div(slot.domain.lanes, k_.lanes), widest))
                                   : most;
    if (slot.scope == Scope::task) held += slot.features * panels * static_cast<std::size_t>(nb_) * sizeof(float);
  }
  constexpr double never = std::numeric_limits<double>::infinity();
  const double images = image * static_cast<double>(groups_.size());
  // Waiting for each other costs a little, and more when it is done after every operation.
  const double by_sequence = held <= kTaskBytes ? makespan(tasks, threads) : never;
  const double by_panel =
      image > 0.0 ? never : 1.04 * (cut_cost(ceil_div(groups, threads), widest) * unit + attention_total / threads);
  const double by_row = 1.09 * (cut_cost(groups, widest) * unit + attention_total + images) / threads;
  Partition best = Partition::panels;
  if (by_row < by_panel && (threads > 1 || image > 0.0)) best = Partition::rows;
  if (by_sequence <= std::min(by_panel, by_row)) best = Partition::sequences;
  storage_ = p_.storage_[static_cast<std::size_t>(best)].get();
  if (best != Partition::sequences) return;
  task_order_.resize(tasks.size());
  std::iota(task_order_.begin(), task_order_.end(), 0);
  std::stable_sort(task_order_.begin(), task_order_.end(), [&](int a, int b) {
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

// Cuts lanes into panels, task by task where there are tasks. `groups`: of each sequence.
void Program::Execution::cut_tasks(Layout& layout, const std::vector<int>& groups) const {
  const int widest = k_.max_groups, threads = p_.team_.size();
  const int all = std::accumulate(groups.begin(), groups.end(), 0);
  layout.first = {0};
  switch (storage_->partition) {
    case Partition::rows:
      return cut_panels(layout, all);
    case Partition::sequences:
      for (std::size_t t = 0; t + 1 < task_cut_.size(); ++t) {
        layout.task_first.push_back(layout.panels());
        cut_panels(layout, std::accumulate(groups.begin() + task_cut_[t], groups.begin() + task_cut_[t + 1], 0));
      }
      break;
    case Partition::panels:
      int tasks = ceil_div(all, widest * block_panels_);
      if (tasks < 4 * threads) tasks = std::min(all, ceil_div(tasks, threads) * threads);
      for (int t = 0; t < tasks; ++t) {
        layout.task_first.push_back(layout.panels());
        const std::int64_t n = all;
        cut_panels(layout, static_cast<int>(n * (t + 1) / tasks - n * t / tasks));
      }
      break;
  }
  layout.task_first.push_back(layout.panels());
  for (std::size_t t = 0; t + 1 < layout.task_first.size(); ++t)
    layout.most_panels = std::max(layout.most_panels, layout.task_first[t + 1] - layout.task_first[t]);
}

void Program::Execution::lay_out(Layout& layout) const {
  const int lanes = k_.lanes, sequences = static_cast<int>(b_.lengths.size());
  const bool together = layout.domain == Domain::sequence;  // one lane each, side by side
  std::vector<int> groups;
  if (together) {
    layout.first = {0};
    cut_panels(layout, ceil_div(sequences, lanes));
  } else {
    int group = 0;
    std::int32_t packed = 0;
    for (const std::int32_t length : b_.lengths) {
      const std::int32_t items = layout.domain == Domain::token ? length : layout.domain.lanes;
      layout.group_of.push_back(group);
      layout.packed_of.push_back(packed);
      groups.push_back(ceil_div(items, lanes));
      group += groups.back();
      packed += items;
    }
    cut_tasks(layout, groups);
  }
  for (int p = 0; p < layout.panels(); ++p) {
    for (int g = 0; g < layout.groups(p); ++g) {
      layout.panel_of.push_back(p);
      layout.sub_of.push_back(g);
    }
  }
  layout.item_at.assign(static_cast<std::size_t>(layout.panels()) * static_cast<std::size_t>(nb_), -1);
  for (int s = 0; s < sequences; ++s) {
    const std::size_t at = static_cast<std::size_t>(s);
    const std::int32_t first = together ? s : layout.packed_of[at];
    const std::int32_t items = layout.domain == Domain::token ? b_.lengths[at] : layout.domain.lanes;
    for (std::int32_t i = 0; i < items; ++i)
      layout.item_at[static_cast<std::size_t>(layout.panel(s, i, lanes) * nb_ + layout.lane(s, i, lanes))] = first + i;
  }
}

void Program::Execution::place_values() {
  const std::size_t nb = static_cast<std::size_t>(nb_);
  std::size_t total = 0;
  const auto floats = [&](const Storage::Slot& slot) {
    // Between panels too: a window's vectors reach into what other threads may be writing otherwise.
    return (slot.features * nb + kSlack) * static_cast<std::size_t>(layout(slot.domain).panels());
  };
  for (const Storage::Slot& slot : storage_->slots)
    if (slot.scope == Scope::shared) total += floats(slot);
  p_.arena_.resize(total);
  float* at = p_.arena_.data();
  for (const Storage::Slot& slot : storage_->slots) {
    const Layout& where = layout(slot.domain);
    slot_layouts_.push_back(&where);
    slots_.push_back(slot.scope == Scope::shared ? at : nullptr);
    task_offsets_.push_back(task_floats_);
    if (slot.scope == Scope::shared) at += floats(slot);
    if (slot.scope == Scope::task) task_floats_ += slot.features * nb * static_cast<std::size_t>(where.most_panels);
  }
  for (const Op& op : p_.ops_) {
    std::size_t need = 0;
    if (is_linear(op.kind) && op.window) need = window_floats(op) * static_cast<std::size_t>(block_panels_);
    if (op.kind == OpKind::pool) need = window_floats(op);
    if (op.kind == OpKind::embed) need = static_cast<std::size_t>(value(op.output).features) * nb;
    if (op.kind == OpKind::attention) need = static_cast<std::size_t>(k_.attention_scratch(op.attention.value_size));
    work_floats_ = std::max(work_floats_, need);
  }
  work_floats_ = (work_floats_ + 15) / 16 * 16;
  const std::size_t block_floats = storage_->block_features * nb * static_cast<std::size_t>(block_panels_);
  for (Buffer<float>& scratch : p_.scratch_) scratch.resize(work_floats_ + task_floats_ + block_floats + kSlack);
}

void Program::Execution::plan_steps() {
  const auto add = [&](Step::Kind kind, int index, int units) {
    steps_.push_back({kind, index});
    units_.push_back(units);
  };
  for (int n = 0; n < static_cast<int>(storage_->stretches.size()); ++n) {
    const Stretch& stretch = storage_->stretches[static_cast<std::size_t>(n)];
    if (stretch.by_task) {
      add(Step::Kind::tasks, n, static_cast<int>(task_order_.size()));
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
    return run_task(storage_->stretches[index], task_order_[static_cast<std::size_t>(unit)], hand);
  const Clock::time_point start = Clock::now();
  const Op& op = p_.ops_[index];
  const Layout& where = layout(value(op.kind == OpKind::store ? op.inputs[0] : op.output).domain);
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
      return hand.task_memory + task_offsets_[index] +
             stride * static_cast<std::size_t>(panel -
                                               slot_layouts_[index]->task_first[static_cast<std::size_t>(hand.task)]);
    case Scope::shared:
      break;
  }
  return slots_[index] + (stride + kSlack) * static_cast<std::size_t>(panel);
}

void Program::Execution::run_task(const Stretch& stretch, int task, Hand& hand) {
  const std::size_t t = static_cast<std::size_t>(task);
  hand.task = task;
  for (int s = stretch.first; s < stretch.last; ++s) {
    const Segment& segment = p_.segments_[static_cast<std::size_t>(s)];
    if (segment.local) {
      const Layout& where = layout(segment.domain);
      const int first = where.task_first[t], last = where.task_first[t + 1];
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
  const Layout& where = layout(segment.domain);
  hand.block_panel = first;
  for (int i = segment.first; i < segment.last; ++i) {
    const Clock::time_point start = Clock::now();
    const Op& op = p_.ops_[static_cast<std::size_t>(i)];
    if (is_linear(op.kind)) {
      const int rows = weight_rows(op);
      const int tile = last - first > 1 ? tile_rows(op) : rows;
      hand.x.clear();
      for (int p = first; p < last; ++p) {
        float* work = op.window ? hand.work + window_floats(op) * static_cast<std::size_t>(p - first) : nullptr;
        hand.x.push_back(linear_input(op, where, p, work, hand));
      }
      for (int row = 0; row < rows; row += tile)
        for (int p = first; p < last; ++p)
          linear_tile(op, where, p, hand.x[static_cast<std::size_t>(p - first)], row, std::min(rows, row + tile), hand);
    } else {
      for (int p = first; p < last; ++p) run_local(op, where, p, hand);
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
  const float* x = linear_input(op, where, unit % panels, hand.work, hand);
  linear_tile(op, where, unit % panels, x, first, std::min(rows, first + step), hand);
}

void Program::Execution::linear_tile(const Op& op, const Layout& where, int at, const float* x, int first_row,
                                     int last_row, Hand& hand) {
  Epilogue epilogue;
  epilogue.bias = op.bias.data();
  epilogue.residual = op.residual ? panel(op.inputs[1], at, hand) : nullptr;
  epilogue.act = op.unary;
  epilogue.quantization = op.quantization ? &*op.quantization : nullptr;
  float* y = panel(op.output, at, hand);
  if (op.kind == OpKind::linear)
    return k_.linear(op.weight->packed(), x, y, where.groups(at), first_row, last_row, epilogue);
  k_.linear8(op.weight8->packed(), bytes_of(x), y, where.groups(at), first_row, last_row, epilogue);
}

void Program::Execution::run_local(const Op& op, const Layout& where, int at, Hand& hand) {
  const int groups = where.groups(at);
  switch (op.kind) {
    case OpKind::embed:
      return embed(op, where, at, hand);
    case OpKind::load:
      return load(op, where, at, hand);
    case OpKind::store:
      return store(op, where, at, hand);
    case OpKind::concat:
      return concat(op, where, at, hand);
    case OpKind::spread:
      return spread(op, where, at, hand);
    case OpKind::pool:
      return pool(op, where, at, hand);
    default:
      break;
  }
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
    case OpKind::add8:
      return k_.add8(bytes_of(x), bytes_of(panel(op.inputs[1], at, hand)), bytes_of(y), features, groups,
                     op.unary == Unary::relu, *op.quantization);
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
  const std::size_t features = static_cast<std::size_t>(value(op.output).features);
  const int count = where.groups(at) * k_.lanes;
  const std::int32_t* items = where.item_at.data() + static_cast<std::ptrdiff_t>(at) * nb_;
  std::vector<const float*> rows(static_cast<std::size_t>(count), nullptr);
  for (int lane = 0; lane < count; ++lane) {
    const std::int32_t item = items[lane];
    if (item < 0) continue;
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

void Program::Execution::attention(const Op& op, const AttentionItem& item, int head, Hand& hand) {
  const AttentionShape& shape = op.attention;
  const std::size_t s = static_cast<std::size_t>(item.sequence);
  const int length = b_.lengths[s];
  const int groups = ceil_div(length, k_.lanes);
  const Layout& tokens = layout(Domain::token);
  const auto point = [&](int value, int feature, auto& pointers) {
    pointers.resize(static_cast<std::size_t>(groups));
    for (int g = 0; g < groups; ++g) {
      const std::size_t group = static_cast<std::size_t>(tokens.group_of[s] + g);
      pointers[static_cast<std::size_t>(g)] = panel(value, tokens.panel_of[group], hand) +
                                              static_cast<std::ptrdiff_t>(feature) * nb_ +
                                              tokens.sub_of[group] * k_.lanes;
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
  task.key_bias = b_.key_bias == nullptr ? nullptr : b_.key_bias + tokens.packed_of[s];
  if (shape.bias_input >= 0) {
    const BiasTensor& bias = b_.biases[static_cast<std::size_t>(shape.bias_input)];
    const std::int64_t start = b_.starts[s];
    task.bias = bias.data + b_.rows[s] * bias.row_stride + head * bias.head_stride + start * bias.key_stride + start;
    task.bias_stride = static_cast<long>(bias.key_stride);
  }
  task.scratch = hand.work;
  k_.attention(task);
}

// Where a sequence's lane begins in a value of one lane per sequence.
float* Program::Execution::sequence_lane(int value, int sequence) const {
  const Layout& where = layout(Domain::sequence);
  return panel(value, where.panel(sequence, 0, k_.lanes), Hand{}) + where.lane(sequence, 0, k_.lanes);
}

void Program::Execution::select(const Op& op, int sequence) {
  const std::size_t s = static_cast<std::size_t>(sequence);
  const int column = (op.argument < 0 ? op.argument + b_.widths[s] : op.argument) - b_.starts[s];
  const Layout& from = layout(Domain::token);
  const float* x =
      panel(op.inputs[0], from.panel(sequence, column, k_.lanes), Hand{}) + from.lane(sequence, column, k_.lanes);
  float* y = sequence_lane(op.output, sequence);
  const int features = value(op.output).features;
  for (std::ptrdiff_t f = 0; f < features; ++f) y[f * nb_] = x[f * nb_];
}

void Program::Execution::mean(const Op& op, int sequence) {
  const std::size_t s = static_cast<std::size_t>(sequence);
  const Layout& from = layout(value(op.inputs[0]).domain);
  const bool tokens = from.domain == Domain::token;
  const int length = tokens ? b_.lengths[s] : from.domain.lanes;
  float* y = sequence_lane(op.output, sequence);
  const int features = value(op.output).features;
  const float* weights = tokens && b_.token_weights != nullptr ? b_.token_weights + from.packed_of[s] : nullptr;
  float total = 0.0f;
  for (int i = 0; i < length; ++i) total += weights == nullptr ? 1.0f : weights[i];
  const float inverse = 1.0f / std::max(total, op.epsilon);
  for (std::ptrdiff_t f = 0; f < features; ++f) y[f * nb_] = 0.0f;
  for (int first = 0; first < length; first += k_.lanes) {
    const float* x =
        panel(op.inputs[0], from.panel(sequence, first, k_.lanes), Hand{}) + from.lane(sequence, first, k_.lanes);
    const int lanes = std::min(k_.lanes, length - first);
    for (std::ptrdiff_t f = 0; f < features; ++f) {
      float sum = 0.0f;
      for (int l = 0; l < lanes; ++l) sum += x[f * nb_ + l] * (weights == nullptr ? 1.0f : weights[first + l]);
      y[f * nb_] += sum;
    }
  }
  for (std::ptrdiff_t f = 0; f < features; ++f) y[f * nb_] *= inverse;
}

}  // namespace espalier
