#include "base/threads.h"

namespace espalier {

namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Some tens of microseconds: longer than the skew between members, shorter than a time slice.
constexpr int kSpins = 4000;

std::uint64_t ticket(std::uint32_t serial, int units) {
  return static_cast<std::uint64_t>(serial) << 32 | static_cast<std::uint32_t>(units);
}

}  // namespace

Team::Team(int size) : size_(size < 1 ? 1 : size) {
  threads_.reserve(static_cast<std::size_t>(size_ - 1));
  for (int member = 1; member < size_; ++member) threads_.emplace_back([this, member] { work(member); });
}

Team::~Team() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Team::run(std::span<const int> units, const Body& body) {
  if (size_ == 1) {
    for (int phase = 0; phase < static_cast<int>(units.size()); ++phase)
      for (int unit = 0; unit < units[static_cast<std::size_t>(phase)]; ++unit) body(0, phase, unit);
    return;
  }
  if (units.empty()) return;
  const Job job{serial_.load(std::memory_order_relaxed), static_cast<std::uint32_t>(units.size()), units.data(), &body};
  {
    const std::lock_guard lock(mutex_);
    job_ = job;
    ++calls_;
    if (units[0] == 0)
      advance(job.first_serial, job);
    else
      ticket_.store(ticket(job.first_serial, units[0]), std::memory_order_release);
  }
  wake_.notify_all();
  take_part(0, job);
}

void Team::work(int member) {
  std::uint64_t seen = 0;
  for (;;) {
    Job job;
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return stop_ || calls_ != seen; });
      if (stop_) return;
      seen = calls_;
      job = job_;
    }
    take_part(member, job);
  }
}

void Team::take_part(int member, const Job& job) {
  for (;;) {
    std::uint64_t now = ticket_.load(std::memory_order_acquire);
    const std::uint32_t serial = static_cast<std::uint32_t>(now >> 32), phase = serial - job.first_serial;
    if (phase >= job.phases) return;
    if (static_cast<std::uint32_t>(now) == 0) {
      wait_beyond(serial);
      continue;
    }
    if (!ticket_.compare_exchange_weak(now, now - 1, std::memory_order_acq_rel)) continue;
    // The job cannot end before this unit is done, so its pointers are good.
    const int units = job.units[phase];
    (*job.body)(member, static_cast<int>(phase), units - static_cast<int>(static_cast<std::uint32_t>(now)));
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == units) advance(serial, job);
  }
}

// To the next phase that has units, or past the last.
void Team::advance(std::uint32_t serial, const Job& job) {
  done_.store(0, std::memory_order_relaxed);
  std::uint32_t next = serial + 1;
  while (next - job.first_serial < job.phases && job.units[next - job.first_serial] == 0) ++next;
  const bool more = next - job.first_serial < job.phases;
  const int units = more ? job.units[next - job.first_serial] : 0;
  // The number first: once the ticket is out the phase can end, and the next one must not find the older number stored
  // after its own.
  serial_.store(next, std::memory_order_release);
  ticket_.store(ticket(next, units), std::memory_order_release);
  serial_.notify_all();
}

void Team::wait_beyond(std::uint32_t serial) const {
  for (int i = 0; i < kSpins; ++i) {
    if (serial_.load(std::memory_order_acquire) != serial) return;
    relax();
  }
  serial_.wait(serial, std::memory_order_acquire);
}

}  // namespace espalier
