"""A simulated run's schedule as a trace that Perfetto and chrome://tracing open.

A process for each engine: its steps on one track (a leap is one slice that says how many steps it is),
its requests on as many tracks as were in flight at once, each with the phases of its life there, and
counters of requests and KV blocks. Arrows lead from prefill to decode, and along with requests that move.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from tongyun.cloud.engine.protocol import Stretch
from tongyun.cloud.schedule import DECODE, EngineSchedule, Phase, Schedule
from tongyun.errors import InputError

STEPS = 0
"""The thread of an engine's steps; those behind it are lanes of requests."""
Event = dict[str, Any]
Lanes = dict[tuple[int, str], list[tuple[float, float, int]]]
"""By engine and request: from when to when it was there each time, and on which track."""


def events(schedule: Schedule) -> Iterator[Event]:
    """Events in microseconds of simulated time, in the Trace Event Format."""
    lanes: Lanes = {}
    for engine in schedule.engines:
        names = [engine.model, "" if engine.role == "mixed" else engine.role, f"engine {engine.place}"]
        title = f"{' '.join(filter(None, names))} (simulated)"
        yield _named("process_name", engine.number, STEPS, title)
        yield {
            **_named("process_sort_index", engine.number, STEPS, ""),
            "args": {"sort_index": engine.number},
        }
        yield _named("thread_name", engine.number, STEPS, "steps")
        yield from _steps(engine)
        yield from _requests(engine, lanes)
        for model, begin_s, end_s in engine.changes():
            yield _slice(f"to {model}", engine.number, STEPS, begin_s, end_s, {"model": model})
        for begin_s, end_s, standing in engine.moves:
            if standing:
                yield _slice("experts move", engine.number, STEPS, begin_s, end_s, {})
                continue
            # Steps go on: a slice would lie across theirs.
            for what, moment_s in (("experts set off", begin_s), ("experts are there", end_s)):
                yield {"ph": "i", "s": "p", **_at(what, engine.number, STEPS, moment_s)}
        for moment_s, up in engine.turns:
            what = "given requests" if up else "given no more requests"
            yield {"ph": "i", "s": "p", **_at(what, engine.number, STEPS, moment_s)}
    for number, hand in enumerate(schedule.hands):
        # Within the slices they bind to, not at their ends.
        source_s, target_s = hand.source_s - 1e-6, hand.target_s - 1e-6
        source = _lane(lanes, hand.source, hand.request_id, source_s)
        target = _lane(lanes, hand.target, hand.request_id, target_s)
        if source is not None and target is not None:
            flow = {"cat": hand.name, "id": number}
            yield {"ph": "s", **flow, **_at(hand.name, hand.source, source, source_s)}
            yield {"ph": "f", "bp": "e", **flow, **_at(hand.name, hand.target, target, target_s)}


def _lane(lanes: Lanes, engine: int, request_id: str, moment_s: float) -> int | None:
    """The track of a request in an engine at a moment; None where it was not there."""
    stays = lanes.get((engine, request_id), ())
    return next((lane for begin_s, end_s, lane in stays if begin_s <= moment_s <= end_s), None)


def save(schedule: Schedule, path: Path) -> int:
    """Write the trace event by event under a temporary name, then rename; how many there are."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with fresh.open("w", encoding="utf-8") as file:
            other = json.dumps({"source": "simulated", **_window(schedule)})
            file.write(f'{{"displayTimeUnit": "ms", "otherData": {other}, "traceEvents": [\n')
            for event in events(schedule):
                file.write((",\n" if count else "") + json.dumps(event, separators=(",", ":")))
                count += 1
            file.write("\n]}\n")
        fresh.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        fresh.unlink(missing_ok=True)
    return count


def _window(schedule: Schedule) -> dict[str, Any]:
    end_s = schedule.end_s if schedule.end_s < float("inf") else None
    return {"begin_s": schedule.begin_s, "end_s": end_s, "cut_by_size": schedule.cut}


def _steps(engine: EngineSchedule) -> Iterator[Event]:
    """Slices, and counters wherever they change; between stretches an engine has no requests."""
    pid, before_s = engine.number, 0.0
    shown: dict[str, dict[str, int]] = {}

    def counters(moment_s: float, running: int, waiting: int, blocks: int) -> Iterator[Event]:
        told = {"requests": {"running": running, "waiting": waiting}, "KV blocks": {"held": blocks}}
        for name, values in told.items():
            if shown.get(name) != values:
                shown[name] = values
                yield {"ph": "C", "name": name, "pid": pid, "ts": _us(moment_s), "args": values}

    for one in engine.stretches():
        if one.begin_s > before_s:
            yield from counters(before_s, 0, 0, 0)
        yield _slice(_what(one), pid, STEPS, one.begin_s, one.end_s, _told(one))
        yield from counters(one.begin_s, one.running, one.waiting, one.kv_begin)
        yield from counters(one.end_s, one.running, one.waiting, one.kv_end)
        before_s = one.end_s
    yield from counters(before_s, 0, 0, 0)


def _what(one: Stretch) -> str:
    if not one.prompt_tokens:
        return DECODE if one.steps == 1 else f"decode × {one.steps}"
    return f"prefill {one.prompt_tokens}" + (f" + decode {one.decoding}" if one.decoding else "")


def _told(one: Stretch) -> dict[str, Any]:
    told = {"accepted_tokens": one.accepted_tokens} if one.accepted_tokens else {}
    return told | {
        "steps": one.steps,
        "decoding": one.decoding,
        "context_tokens": one.context_tokens,
        "prompt_tokens": one.prompt_tokens,
        "ms_per_step": round((one.end_s - one.begin_s) * 1e3 / one.steps, 4),
    }


def _requests(engine: EngineSchedule, lanes: Lanes) -> Iterator[Event]:
    """Each request on a lane of its own as long as it is there, with its phases beneath it."""
    pid = engine.number
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    most = 0
    for phases in _stays(engine):
        request_id, begin_s, end_s = phases[0].request_id, phases[0].begin_s, phases[-1].end_s
        while busy and busy[0][0] <= begin_s:
            heappush(free, heappop(busy)[1])
        lane = heappop(free) if free else most + 1
        if lane > most:
            most = lane
            yield _named("thread_name", pid, lane, f"requests {lane}")
        heappush(busy, (end_s, lane))
        lanes.setdefault((pid, request_id), []).append((begin_s, end_s, lane))
        preempted = sum(phase.note == "preempted" for phase in phases)
        told = {"ended": phases[-1].note or "not within the window", "preemptions": preempted}
        yield _slice(request_id, pid, lane, begin_s, end_s, told)
        for phase in phases:
            yield _slice(phase.name, pid, lane, phase.begin_s, phase.end_s, {"request": request_id})
            if phase.note == "preempted":
                yield {"ph": "i", "s": "t", **_at("preempted", pid, lane, phase.end_s)}


def _stays(engine: EngineSchedule) -> list[list[Phase]]:
    """A request's phases from its coming to its going, in the order in which they came; it may come back."""
    found: list[list[Phase]] = []
    before: dict[str, list[Phase]] = {}
    for phase in sorted(engine.phases(), key=lambda phase: (phase.begin_s, phase.end_s)):
        stay = before.get(phase.request_id)
        if stay is not None and stay[-1].end_s == phase.begin_s:
            stay.append(phase)
        else:
            before[phase.request_id] = stay = [phase]
            found.append(stay)
    return sorted(found, key=lambda stay: (stay[0].begin_s, stay[0].request_id))


def _named(kind: str, pid: int, thread: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": thread, "args": {"name": name}}


def _at(name: str, pid: int, thread: int, moment_s: float) -> Event:
    return {"name": name, "pid": pid, "tid": thread, "ts": _us(moment_s)}


def _slice(name: str, pid: int, thread: int, begin_s: float, end_s: float, more: dict[str, Any]) -> Event:
    # The difference of rounded ends: slices that touch must not overlap.
    begin_us, end_us = _us(begin_s), _us(end_s)
    span = {"ts": begin_us, "dur": round(end_us - begin_us, 3)}
    return {"ph": "X", "name": name, "pid": pid, "tid": thread, **span, "args": more}


def _us(moment_s: float) -> float:
    return round(moment_s * 1e6, 3)
