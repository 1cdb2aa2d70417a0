// The team of threads: every member once per call, barriers that hold, many short calls.
#include <atomic>
#include <thread>

#include "base/threads.h"
#include "support.h"

using namespace testing;
using espalier::Team;

TEST(every_member_runs_once_per_call) {
  for (int size : {0, 1, 2, 3, 5, 8}) {
    Team team(size);
    CHECK(team.size() == std::max(1, size));
    std::vector<int> calls(static_cast<std::size_t>(team.size()));  // plain: run() must order everything
    for (int round = 0; round < 500; ++round) team.run([&](int member) { ++calls[static_cast<std::size_t>(member)]; });
    for (int n : calls) CHECK(n == 500, "got ", n);
  }
}

// Between barriers members write plain memory that others read afterwards: a barrier that leaks shows as a wrong sum,
// and as a race under ThreadSanitizer.
TEST(barriers_hold) {
  for (int size : {1, 2, 3, 5}) {
    Team team(size);
    std::vector<int> slot(static_cast<std::size_t>(size)), wrong(static_cast<std::size_t>(size));
    for (int round = 0; round < 20; ++round) {
      team.run([&](int member) {
        for (int step = 0; step < 50; ++step) {
          slot[static_cast<std::size_t>(member)] = round * 1000 + step;
          team.barrier();
          for (int other : slot) wrong[static_cast<std::size_t>(member)] += other != round * 1000 + step;
          team.barrier();
        }
      });
    }
    for (int n : wrong) CHECK(n == 0, n, " stale reads among ", size, " members");
  }
}

TEST(sleepers_wake) {
  Team team(3);
  std::atomic<int> passed{0};
  for (int round = 0; round < 5; ++round) {
    team.run([&](int member) {
      if (member == round % 3) std::this_thread::sleep_for(std::chrono::milliseconds(5));  // the others stop spinning
      team.barrier();
      ++passed;
    });
  }
  CHECK(passed == 15);
}

TEST(teams_come_and_go) {
  for (int round = 0; round < 50; ++round) {
    Team team(4);
    if (round % 2) team.run([&](int) { team.barrier(); });
  }
  CHECK(true);
}
