#include "parallel.h"

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>

namespace tongyun {
namespace {

constexpr uint64_t CLOSED = 0xffffffffu;
constexpr int LOOKS = 4000;  // about 40 µs of looking before a helper sleeps

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One job at a time. `ticket` holds the job's number above and its next item below, so
// that an item can only be claimed from the job whose fields were read: a helper that
// comes late finds another number there and its claim fails.
struct Pool {
  std::atomic<uint64_t> ticket{CLOSED};
  std::atomic<void (*)(const void*, long)> run{nullptr};
  std::atomic<const void*> context{nullptr};
  std::atomic<long> items{0}, done{0}, threads{1};
  std::atomic<uint32_t> alarms{0};
  std::atomic<int> asleep{0};
  std::mutex one_caller;
  long helpers = 0;

  // Takes items of the current job until none is left; false if there was none.
  bool work() {
    bool any = false;
    for (;;) {
      uint64_t seen = ticket.load();
      const long item = long(seen & CLOSED);
      const auto f = run.load(std::memory_order_relaxed);
      const void* c = context.load(std::memory_order_relaxed);
      if (uint64_t(item) == CLOSED || item >= items.load(std::memory_order_relaxed)) return any;
      if (!ticket.compare_exchange_weak(seen, seen + 1)) continue;
      f(c, item);
      done.fetch_add(1, std::memory_order_release);
      any = true;
    }
  }

  void help(long index) {
    for (;;) {
      for (int look = 0; look < LOOKS; ++look) {
        if (index < threads.load(std::memory_order_relaxed) && work()) look = 0;
        pause();
      }
      const uint32_t alarm = alarms.load();
      asleep.fetch_add(1);
      if (!available(index)) alarms.wait(alarm);
      asleep.fetch_sub(1);
    }
  }

  bool available(long index) const {
    const uint64_t seen = ticket.load();
    return index < threads.load() && (seen & CLOSED) != CLOSED && long(seen & CLOSED) < items.load();
  }

  void submit(long count, void (*f)(const void*, long), const void* c) {
    while (helpers < threads.load() - 1) {
      const long index = ++helpers;
      std::thread([this, index] { help(index); }).detach();
    }
    const uint64_t number = (ticket.load() >> 32) + 1;
    ticket.store((number << 32) | CLOSED);  // nobody claims while the fields change
    run.store(f, std::memory_order_relaxed);
    context.store(c, std::memory_order_relaxed);
    items.store(count, std::memory_order_relaxed);
    done.store(0, std::memory_order_relaxed);
    ticket.store(number << 32);
    if (asleep.load() > 0) {
      alarms.fetch_add(1);
      alarms.notify_all();
    }
    work();
    // Items still out are with helpers; one that lost its core needs ours to finish.
    for (int look = 0; done.load(std::memory_order_acquire) < count; ++look) {
      pause();
      if (look > LOOKS) std::this_thread::yield();
    }
  }
};

// Never destroyed: helpers may still look at it while the process ends.
Pool& pool() {
  static Pool* one = new Pool;
  return *one;
}

}  // namespace

void set_threads(long threads) { pool().threads.store(threads < 1 ? 1 : threads); }

long thread_count() { return pool().threads.load(std::memory_order_relaxed); }

void on_threads(long items, void (*run)(const void*, long), const void* context) {
  Pool& p = pool();
  std::unique_lock<std::mutex> lock(p.one_caller, std::try_to_lock);
  if (lock.owns_lock()) {
    p.submit(items, run, context);
    return;
  }
  for (long i = 0; i < items; ++i) run(context, i);
}

}  // namespace tongyun
