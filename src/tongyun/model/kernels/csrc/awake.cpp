#include "awake.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace tongyun {

#if defined(__linux__)
namespace {

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

struct Watch {
  std::atomic<int64_t> until_ns{0};
  std::atomic<uint32_t> calls{0};
  std::atomic<int> asleep{0};
  int threads = 0;

  // Plain arithmetic between two looks at the clock: a hypervisor takes a core away from who
  // only pauses on it.
  void spin() {
    for (;;) {
      const uint32_t seen = calls.load();
      while (now_ns() < until_ns.load(std::memory_order_relaxed)) {
        for (volatile int i = 0; i < 1000; i = i + 1) {
        }
      }
      asleep.fetch_add(1);
      if (now_ns() >= until_ns.load()) calls.wait(seen);
      asleep.fetch_sub(1);
    }
  }

  void start() {
    cpu_set_t mine;
    if (sched_getaffinity(0, sizeof mine, &mine) != 0) return;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &mine)) continue;
      ++threads;
      std::thread([this, cpu] {
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        sched_param none{};
        // At a usual priority it would take half of the core.
        if (sched_setaffinity(0, sizeof one, &one) != 0 || sched_setscheduler(0, SCHED_IDLE, &none) != 0) return;
        spin();
      }).detach();
    }
  }
};

// Never destroyed: its threads may still look at it while the process ends.
Watch& watch() {
  static Watch* one = [] {
    Watch* made = new Watch;
    made->start();
    return made;
  }();
  return *one;
}

}  // namespace

void keep_awake(double seconds) {
  Watch& w = watch();
  w.until_ns.store(now_ns() + int64_t((seconds > 0 ? seconds : 0) * 1e9));
  if (w.asleep.load() > 0) {
    w.calls.fetch_add(1);
    w.calls.notify_all();
  }
}
#else
void keep_awake(double) {}
#endif

}  // namespace tongyun
