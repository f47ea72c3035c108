// Keep the cores from falling asleep between two operations.
//
// Under a hypervisor a core without work is given back to the host. To have it again takes
// tens of microseconds, and what runs on it then is slow for milliseconds, until its clock
// has risen and its caches are warm: a model of small steps takes twice as long. Threads of
// idle priority that do nothing keep it; whoever wants the core has it at once.
#pragma once

namespace tongyun {

// From now on and for so many seconds; less than 0 or 0 lets the cores sleep at once.
void keep_awake(double seconds);

}  // namespace tongyun
