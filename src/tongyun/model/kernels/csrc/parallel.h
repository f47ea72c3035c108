// Share numbered items among PyTorch's threads. Which thread runs an item never changes
// what the item computes, so results do not depend on the number of threads.
#pragma once
#include <atomic>

namespace tongyun {

// Defined in bindings.cpp, so that only one file is slowed down by PyTorch's headers.
long thread_count();
void on_threads(long threads, void (*run)(void*), void* context);

// `cost` is the multiply-adds of all items together; below about 50k a second thread
// costs more to wake than it saves.
template <class F>
inline void parallel(long items, double cost, const F& run) {
  long threads = thread_count();
  if (threads > items) threads = items;
  if (threads > 1 && cost < 5e4 * threads) threads = 1;
  if (threads <= 1) {
    for (long i = 0; i < items; ++i) run(i);
    return;
  }
  // Items are taken from a counter: on a shared machine one core is often slower.
  struct Share {
    const F& run;
    long items;
    std::atomic<long> next{0};
  } share{run, items};
  on_threads(threads, [](void* context) {
    Share& s = *static_cast<Share*>(context);
    for (long i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.items;) s.run(i);
  }, &share);
}

}  // namespace tongyun
