"""A simulated run as a trace that Perfetto and chrome://tracing open: kernels and engines over time.

One slice a kernel, and one for each engine that is busy in it: drawn from the kernel's beginning, as long as
the engine is busy, in the mean over the cores. When within a kernel an engine is busy is not told.
Kernels that `simulate_repeated` left out are left out here; the slice of one that stands for others
says for how many.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tongyun.chip.ppu.isa import ENGINES, Engine
from tongyun.chip.ppu.rates import TICKS
from tongyun.chip.ppu.timing import COUNTERS, Timing

KERNELS = 0
"""The thread of the kernels; engines are the threads behind it."""


def trace(timing: Timing) -> dict[str, Any]:
    """Events in microseconds of simulated time, in the Trace Event Format."""
    names = ["kernels", *(engine.value for engine in ENGINES if engine is not Engine.CONTROL)]
    events: list[dict[str, Any]] = [_named("process_name", KERNELS, f"{timing.ppu.name} (simulated)")]
    events += [_named("thread_name", number, name) for number, name in enumerate(names)]
    us = 1e6 / TICKS
    begin = 0.0
    for place, name in enumerate(timing.names):
        whole = float(timing.ticks[place])
        counts = dict(zip(COUNTERS, timing.counters[place].tolist(), strict=True))
        told = {key: counts[key] for key in ("flops", "hbm_bytes", "l2_bytes")}
        more = {**told, "stands_for": int(timing.times[place])}
        events.append(_slice(name, KERNELS, begin * us, whole * us, more))
        for number, engine in enumerate(names[1:], start=1):
            busy = counts[f"{engine}_ticks"] / timing.ppu.cores
            if busy:
                busy = min(busy, whole)
                events.append(_slice(name, number, begin * us, busy * us, {"busy_of_kernel": busy / whole}))
        begin += whole
    return {
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {
            "source": "simulated",
            "engines": "busy time, mean over cores, from the kernel's start",
        },
    }


def save_trace(timing: Timing, path: Path) -> int:
    """Write the trace under a temporary name, then rename; how many events it has."""
    content = trace(timing)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    fresh.write_text(json.dumps(content))
    fresh.replace(path)
    return len(content["traceEvents"])


def _named(kind: str, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": 0, "tid": thread, "args": {"name": name}}


def _slice(name: str, thread: int, at_us: float, us: float, more: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "X", "name": name, "pid": 0, "tid": thread, "ts": at_us, "dur": us, "args": more}
