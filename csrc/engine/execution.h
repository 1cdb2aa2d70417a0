// One run of a program over one batch. Internal to the engine.
#pragma once

#include <array>
#include <chrono>
#include <vector>

#include "engine/program.h"

namespace espalier {

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A quantised panel in the memory of one of floats.
inline std::uint8_t* bytes_of(float* panel) { return reinterpret_cast<std::uint8_t*>(panel); }
inline const std::uint8_t* bytes_of(const float* panel) { return reinterpret_cast<const std::uint8_t*>(panel); }

// Windows read and write whole vectors, this many floats past an end at most: two vectors.
inline constexpr std::size_t kSlack = 32;

// How far a value reaches, and so where it stands.
enum class Scope : std::uint8_t {
  shared,  // the arena: every panel of the batch
  task,    // a thread's memory: the panels of its task
  block,   // a thread's memory: the few panels in hand
};

// Segments [first, last), which a thread runs without waiting for the others in between.
struct Stretch {
  int first = 0;
  int last = 0;
  bool by_task = false;  // task by task; otherwise the one segment operation by operation
};

struct Program::Storage {
  struct Slot {
    std::size_t features = 0;  // rounded up to kRowBlock: a panel of the slot is features * NB floats
    Domain domain;
    Scope scope = Scope::shared;
    std::size_t offset = 0;  // block: features before it in the thread's memory
  };
  Partition partition = Partition::panels;
  std::vector<Stretch> stretches;
  std::vector<int> places;  // [value] -> slot
  std::vector<Slot> slots;
  std::size_t block_features = 0;
};

// Where the lanes of a domain stand. Groups are numbered through all panels; panel p holds groups [first[p], first[p +
// 1]).
struct Program::Layout {
  Domain domain;
  std::vector<int> group_of;            // [sequence] its first group
  std::vector<std::int32_t> packed_of;  // [sequence] its first packed item
  std::vector<int> first;
  std::vector<int> panel_of;          // [group]
  std::vector<int> sub_of;            // [group] within its panel
  std::vector<int> task_first;        // panels of task t: [task_first[t], task_first[t + 1])
  std::vector<std::int32_t> item_at;  // [panel * NB + lane] -> packed item, or -1
  int most_panels = 1;                // of a task
  int panels() const { return static_cast<int>(first.size()) - 1; }
  int groups(int panel) const {
    return first[static_cast<std::size_t>(panel) + 1] - first[static_cast<std::size_t>(panel)];
  }
  // Where a value of the domain has an item of a sequence: its panel, and the lane there.
  int panel(int sequence, int item, int lanes) const { return panel_of[group(sequence, item, lanes)]; }
  int lane(int sequence, int item, int lanes) const {
    return sub_of[group(sequence, item, lanes)] * lanes + (group_of.empty() ? sequence : item) % lanes;
  }

 private:
  // One lane per sequence: those of different sequences share groups.
  std::size_t group(int sequence, int item, int lanes) const {
    return static_cast<std::size_t>(group_of.empty() ? sequence / lanes
                                                     : group_of[static_cast<std::size_t>(sequence)] + item / lanes);
  }
};

struct Program::Execution {
  using Clock = std::chrono::steady_clock;

  Execution(Program& program, const Batch& batch);
  void run();

 private:
  struct AttentionItem {
    int sequence;
    int first_group;  // within the sequence
    int last_group;
  };
  // One phase of the team: units [0, count) of a stretch or of an operation.
  struct Step {
    enum class Kind : std::uint8_t { tasks, rows, panels, attention, sequences } kind;
    int index;  // tasks: stretch; otherwise operation
  };
  // Lanes that hold neighbouring pixels of one row of an image.
  struct Strip {
    int lane;
    int lanes;
    int sequence;
    int row;
    int column;
  };
  struct Hand {  // what one member of the team carries
    int member = 0;
    float* work = nullptr;
    float* task_memory = nullptr;
    float* block_memory = nullptr;
    int task = 0;  // in hand
    int block_panel = 0;
    std::vector<Strip> strips;
    std::vector<LaneRun> runs;
    const Layout* from = nullptr;  // of what the window in hand reads
    std::array<float, 16> edge{};  // what windows read beyond the edges, in every lane
    std::vector<const float*> q, k, v, x;
    std::vector<float*> out;
  };

  void choose_partition();
  std::size_t window_floats(const Op& op) const;
  void lay_out(Layout& layout) const;
  void cut_panels(Layout& layout, int groups) const;
  void cut_tasks(Layout& layout, const std::vector<int>& groups) const;
  void place_values();
  void plan_steps();
  void run_unit(const Step& step, int unit, Hand& hand);
  void run_task(const Stretch& stretch, int task, Hand& hand);
  void run_block(const Segment& segment, int first_panel, int last_panel, Hand& hand);
  void run_rows(const Op& op, const Layout& layout, int unit, Hand& hand);
  void run_local(const Op& op, const Layout& layout, int panel, Hand& hand);
  void linear_tile(const Op& op, const Layout& layout, int panel, const float* x, int first_row, int last_row,
                   Hand& hand);
  Quantization window_parameters(const Op& op, const Layout& layout, int panel, const Hand& hand) const;
  const float* linear_input(const Op& op, const Layout& layout, int panel, float* work, Hand& hand);
  void embed(const Op& op, const Layout& layout, int panel, Hand& hand);
  void load(const Op& op, const Layout& layout, int panel, Hand& hand);
  void concat(const Op& op, const Layout& layout, int panel, Hand& hand);
  void spread(const Op& op, const Layout& layout, int panel, Hand& hand);
  void pool(const Op& op, const Layout& layout, int panel, Hand& hand);
  void find_strips(const Op& op, const Layout& layout, int panel, Hand& hand) const;
  void gather(const Op& op, int tap, int rows, float* y, Hand& hand);
  void store(const Op& op, const Layout& layout, int panel, Hand& hand);
  void attention(const Op& op, const AttentionItem& item, int head, Hand& hand);
  template <class F>
  void for_pixels(const Layout& layout, int panel, F f) const;
  float* sequence_lane(int value, int sequence) const;
  void select(const Op& op, int sequence);
  void mean(const Op& op, int sequence);
  void charge(int op, Clock::time_point start, const Hand& hand);  // the time since `start` to the operation
  float* panel(int value, int panel, const Hand& hand) const;
  const Value& value(int id) const { return p_.values_[static_cast<std::size_t>(id)]; }
  const Layout& layout(Domain domain) const {
    std::size_t i = 0;
    while (layouts_[i].domain != domain) ++i;
    return layouts_[i];
  }

  Program& p_;
  const Batch& b_;
  const KernelSet& k_;
  const int nb_;
  const Storage* storage_ = nullptr;
  std::vector<Layout> layouts_;  // of Program::domains_
  std::vector<AttentionItem> attention_items_;
  std::vector<float*> slots_;                // [slot], null for thread-local ones
  std::vector<std::size_t> task_offsets_;    // [slot]: floats before it in the thread's memory
  std::vector<const Layout*> slot_layouts_;  // [slot]
  std::vector<int> groups_;                  // [sequence], of tokens
  std::vector<int> task_cut_;                // sequences: sequences of task t are [task_cut_[t], task_cut_[t + 1])
  std::vector<int> task_order_;              // the costliest first
  int block_panels_ = 1;
  std::size_t work_floats_ = 0;
  std::size_t task_floats_ = 0;
  std::vector<Step> steps_;
  std::vector<int> units_;  // [step]
};

}  // namespace espalier
