// The team of threads: every unit once, phases in order, many short calls.
#include <atomic>
#include <chrono>
#include <thread>

#include "base/threads.h"
#include "support.h"

using namespace testing;
using espalier::Team;

TEST(every_unit_runs_once) {
  for (int size : {0, 1, 2, 3, 5, 8}) {
    Team team(size);
    CHECK(team.size() == std::max(1, size));
    const std::vector<int> units = {7, 1, 0, 64, 0, 0, 2};
    std::vector<std::vector<int>> calls;  // plain: run() must order everything
    for (int n : units) calls.emplace_back(static_cast<std::size_t>(n));
    for (int round = 0; round < 300; ++round) {
      team.run(units, [&](int, int phase, int unit) {
        ++calls[static_cast<std::size_t>(phase)][static_cast<std::size_t>(unit)];
      });
    }
    for (const auto& phase : calls)
      for (int n : phase) CHECK(n == 300, "got ", n);
  }
}

// A phase writes plain memory that the next one reads: a phase that starts early shows as a wrong sum, and as a race
// under ThreadSanitizer.
TEST(phases_are_in_order) {
  for (int size : {1, 2, 3, 5}) {
    Team team(size);
    const int width = 6, phases = 50;
    const std::vector<int> units(phases, width);
    std::vector<int> cells(static_cast<std::size_t>(width), -1);
    std::vector<int> next(static_cast<std::size_t>(width));
    std::atomic<int> wrong{0};
    for (int round = 0; round < 20; ++round) {
      std::fill(cells.begin(), cells.end(), -1);
      team.run(units, [&](int, int phase, int unit) {
        // Even phases write `next` from `cells`, odd ones the other way round.
        const auto& from = phase % 2 ? next : cells;
        auto& to = phase % 2 ? cells : next;
        for (int value : from) wrong += value != phase - 1;
        to[static_cast<std::size_t>(unit)] = phase;
      });
    }
    CHECK(wrong == 0, wrong.load(), " early reads among ", size, " members");
  }
}

TEST(sleepers_wake) {
  Team team(3);
  std::atomic<int> passed{0};
  const std::vector<int> units = {3, 3};
  for (int round = 0; round < 5; ++round) {
    team.run(units, [&](int, int phase, int unit) {
      if (phase == 0 && unit == round % 3) std::this_thread::sleep_for(std::chrono::milliseconds(5));  // others sleep
      ++passed;
    });
  }
  CHECK(passed == 30);
}

TEST(a_call_without_units_returns) {
  Team team(2);
  int calls = 0;
  const auto count = [&](int, int, int) { ++calls; };
  team.run({}, count);
  const std::vector<int> none = {0, 0};
  team.run(none, count);
  const std::vector<int> one = {0, 1};
  team.run(one, count);
  CHECK(calls == 1);
}

TEST(teams_come_and_go) {
  const std::vector<int> units = {2, 2};
  for (int round = 0; round < 50; ++round) {
    Team team(4);
    if (round % 2) team.run(units, [](int, int, int) {});
  }
  CHECK(true);
}
