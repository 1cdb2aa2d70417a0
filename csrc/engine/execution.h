// One run of a program over one batch. Internal to the engine.
#pragma once

#include <chrono>
#include <vector>

#include "engine/program.h"

namespace espalier {

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
    Domain domain = Domain::token;
    Scope scope = Scope::shared;
    std::size_t offset = 0;  // task, block: features before it in the thread's memory
  };
  Partition partition = Partition::panels;
  std::vector<Stretch> stretches;
  std::vector<int> places;  // [value] -> slot
  std::vector<Slot> slots;
  std::size_t task_features = 0;
  std::size_t block_features = 0;
};

// Where lanes stand. Groups are numbered through all panels; panel p holds groups [first[p], first[p + 1]).
struct Program::Layout {
  std::vector<int> first;
  std::vector<int> panel_of;          // [group]
  std::vector<int> sub_of;            // [group] within its panel
  std::vector<int> task_first;        // panels of task t: [task_first[t], task_first[t + 1])
  std::vector<int> task_order;        // the costliest first
  std::vector<std::int32_t> item_at;  // [panel * NB + lane] -> packed item, or -1
  int panels() const { return static_cast<int>(first.size()) - 1; }
  int groups(int panel) const {
    return first[static_cast<std::size_t>(panel) + 1] - first[static_cast<std::size_t>(panel)];
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
  struct Hand {  // what one member of the team carries
    int member = 0;
    float* work = nullptr;
    float* task_memory = nullptr;
    float* block_memory = nullptr;
    int task_panel = 0;  // the first panel of the task in hand
    int block_panel = 0;
    std::vector<const float*> q, k, v;
    std::vector<float*> out;
  };

  void choose_partition();
  void lay_out_tokens();
  void lay_out_sequences();
  void cut_panels(Layout& layout, int groups) const;
  void cut_tasks();
  void place_values();
  void plan_steps();
  void run_unit(const Step& step, int unit, Hand& hand);
  void run_task(const Stretch& stretch, int task, Hand& hand);
  void run_block(const Segment& segment, int first_panel, int last_panel, Hand& hand);
  void run_rows(const Op& op, const Layout& layout, int unit, Hand& hand);
  void run_local(const Op& op, const Layout& layout, int panel, Hand& hand);
  void linear_tile(const Op& op, const Layout& layout, int panel, int first_row, int last_row, Hand& hand);
  void embed(const Op& op, const Layout& layout, int panel, Hand& hand);
  void store(const Op& op, const Layout& layout, int panel, Hand& hand);
  void attention(const Op& op, const AttentionItem& item, int head, Hand& hand);
  void select(const Op& op, int sequence);
  void mean(const Op& op, int sequence);
  void charge(int op, Clock::time_point start, const Hand& hand);  // the time since `start` to the operation
  float* panel(int value, int panel, const Hand& hand) const;
  const Layout& layout(Domain domain) const { return domain == Domain::token ? tokens_ : sequences_; }

  Program& p_;
  const Batch& b_;
  const KernelSet& k_;
  const int nb_;
  const Storage* storage_ = nullptr;
  Layout tokens_;
  Layout sequences_;
  std::vector<int> group_of_;            // [sequence] its first group
  std::vector<std::int32_t> packed_of_;  // [sequence] its first packed token
  std::vector<AttentionItem> attention_items_;
  std::vector<float*> slots_;  // [slot], null for thread-local ones
  std::vector<int> groups_;    // [sequence]
  std::vector<int> task_cut_;  // sequences: sequences of task t are [task_cut_[t], task_cut_[t + 1])
  int block_panels_ = 1;
  int panels_per_task_ = 1;
  std::size_t work_floats_ = 0;
  std::size_t task_floats_ = 0;
  std::vector<Step> steps_;
  std::vector<int> units_;  // [step]
};

}  // namespace espalier
