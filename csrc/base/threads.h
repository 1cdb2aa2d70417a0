// A fixed team of threads that shares out the units of one phase after another; idle threads sleep.
//
// A phase is complete when its units are, not when every member has turned up: a member that wakes late, or whose core
// is taken by other work, delays nobody unless it holds a unit.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

namespace espalier {

class Team {
 public:
  // body(member, phase, unit)
  using Body = std::function<void(int, int, int)>;

  // Starts size - 1 threads; the caller of run() is the team's first member.
  explicit Team(int size);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Calls body once for every unit in [0, units[phase]) of every phase, and returns when all are done. Units of a phase
  // start in ascending order, on any member; a phase starts when the one before it is complete, and sees what that
  // wrote. One call at a time. `body` must not throw. At most 2^31 units a phase.
  void run(std::span<const int> units, const Body& body);

 private:
  // What a member needs to take part in one call of run(). Valid beyond the call except for the pointers, which are
  // only followed while a unit of the call is held.
  struct Job {
    std::uint32_t first_serial = 0;
    std::uint32_t phases = 0;
    const int* units = nullptr;
    const Body* body = nullptr;
  };

  void work(int member);
  void take_part(int member, const Job& job);
  void advance(std::uint32_t serial, const Job& job);
  void wait_beyond(std::uint32_t serial) const;

  const int size_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::uint64_t calls_ = 0;  // guarded by mutex_, as are job_ and stop_
  Job job_;
  bool stop_ = false;

  // Phases are numbered through all calls. Upper half: the phase under way; lower half: units not yet handed out.
  alignas(64) std::atomic<std::uint64_t> ticket_{0};
  alignas(64) std::atomic<int> done_{0};
  alignas(64) std::atomic<std::uint32_t> serial_{0};  // the phase under way, to wait on
};

}  // namespace espalier
