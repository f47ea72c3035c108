// Share numbered items among a few threads. Which thread runs an item never changes what
// the item computes, so results do not depend on the number of threads.
//
// Not OpenMP: its regions end in a barrier that waits for every thread to have come, so
// that on a machine with other work a region of microseconds takes a scheduler's slice.
// Here the caller works through the items itself, and waits only for items that a helper
// has taken. Helpers look out for work for some microseconds and then sleep.
#pragma once

namespace tongyun {

void set_threads(long threads);
long thread_count();

// Runs items 0 … items-1, on the caller alone if the helpers are busy with another call.
void on_threads(long items, void (*run)(const void*, long), const void* context);

// `cost` is the multiply-adds of all items together; below about 50k a thread a helper
// costs more to wake than it saves.
template <class F>
inline void parallel(long items, double cost, const F& run) {
  if (items < 2 || cost < 1e5 || thread_count() < 2) {
    for (long i = 0; i < items; ++i) run(i);
    return;
  }
  on_threads(items, [](const void* context, long i) { (*static_cast<const F*>(context))(i); }, &run);
}

}  // namespace tongyun
