// One run of a program over one batch. Internal to the engine.
#pragma once

#include <atomic>
#include <vector>

#include "engine/program.h"

namespace espalier {

struct Place {
  int slot = -1;
  std::size_t features = 0;  // rounded up to kRowBlock: the panel's stride is features * NB
  bool thread_local_slot = false;
};

struct Program::Storage {
  struct SlotPlace {
    std::size_t features = 0;
    Domain domain = Domain::token;
    bool thread_local_slot = false;
    std::size_t offset = 0;  // features before it in the thread's memory
  };
  bool by_panel = true;
  std::vector<Place> places;  // [value]
  std::vector<SlotPlace> slots;
  std::size_t local_features = 0;
};

// Where lanes stand. Groups are numbered through all panels; panel p holds groups [first[p], first[p + 1]).
struct Program::Layout {
  std::vector<int> first;
  std::vector<int> panel_of;          // [group]
  std::vector<int> sub_of;            // [group] within its panel
  std::vector<int> task_first;        // panels of task t: [task_first[t], task_first[t + 1])
  std::vector<std::int32_t> item_at;  // [panel * NB + lane] -> packed item, or -1
  int panels() const { return static_cast<int>(first.size()) - 1; }
  int groups(int panel) const {
    return first[static_cast<std::size_t>(panel) + 1] - first[static_cast<std::size_t>(panel)];
  }
};

struct Program::Execution {
  Execution(Program& program, const Batch& batch);
  void run();

 private:
  struct AttentionItem {
    int sequence;
    int first_group;  // within the sequence
    int last_group;
  };
  struct Hand {  // what one member of the team carries
    int member = 0;
    float* locals = nullptr;
    float* work = nullptr;
    int first_panel = 0;  // of the task in hand
    std::vector<const float*> q, k, v;
    std::vector<float*> out;
  };

  void lay_out_tokens();
  void lay_out_sequences();
  void cut_panels(Layout& layout, int groups, int widest) const;
  void place_values();
  void work(Hand& hand);
  void run_task(const Segment& segment, const Layout& layout, int task, Hand& hand);
  void run_op_by_rows(int op, const Layout& layout, Hand& hand);
  void run_local(const Op& op, const Layout& layout, int panel, Hand& hand);
  void linear_tile(const Op& op, const Layout& layout, int panel, int first_row, int last_row, Hand& hand);
  void embed(const Op& op, const Layout& layout, int panel, Hand& hand);
  void store(const Op& op, const Layout& layout, int panel, Hand& hand);
  void attention(const Op& op, const AttentionItem& item, int head, Hand& hand);
  void select(const Op& op, int sequence);
  void mean(const Op& op, int sequence);
  void run_crossing(int index, Hand& hand);
  float* panel(int value, int panel, const Hand& hand) const;
  const Layout& layout(Domain domain) const { return domain == Domain::token ? tokens_ : sequences_; }
  int next(std::size_t counter) { return counters_[counter].fetch_add(1, std::memory_order_relaxed); }

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
  int panels_per_task_ = 1;
  std::size_t work_floats_ = 0;
  std::vector<std::atomic<int>> counters_;  // [op]: tasks handed out
};

}  // namespace espalier
