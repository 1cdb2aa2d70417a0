// A fixed team of threads that runs one function at a time; idle threads sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace espalier {

class Team {
 public:
  // Starts size - 1 threads; the caller of run() is the team's first member.
  explicit Team(int size);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Calls body(member) once on every member and returns when all have. One call at a time. `body` must not throw.
  void run(const std::function<void(int)>& body);

  // Inside run(): returns when every member has called it. Spins briefly, then sleeps.
  void barrier();

 private:
  void work(int member);

  const int size_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::uint64_t job_ = 0;  // guarded by mutex_, as are body_ and stop_
  const std::function<void(int)>* body_ = nullptr;
  bool stop_ = false;

  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> phase_{0};
};

}  // namespace espalier
