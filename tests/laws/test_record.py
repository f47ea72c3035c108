"""A run taken down over time: the same by leaps and by steps, adding up, and changing nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tongyun.cloud import record
from tongyun.cloud.engine.clock import VirtualClock
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.protocol import Stretch
from tongyun.cloud.engine.simulated import LeapingExecutor, SimulatedExecutor
from tongyun.cloud.engine.step_table import StepTable
from tongyun.cloud.front import Front
from tongyun.cloud.instance import Simulated
from tongyun.cloud.record import Recorder, Recording
from tongyun.cloud.sched.router import find_router
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig
from tongyun.cloud.simulate import play_fleet
from tongyun.cloud.workload import Arrivals, Distribution, Lengths, Process, Workload, requests, sample
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision
from tongyun.specs import find_chip, find_model

LIMITS = SchedulerConfig(blocks=900, max_context_tokens=2000, max_sequences=16, max_step_tokens=256)


def load(count: int = 120) -> Workload:
    return Workload(
        arrivals=Arrivals(process=Process.GAMMA, rate_per_s=9.0, variation=3.0),
        prompt=Lengths(distribution=Distribution.LOGNORMAL, mean=300, variation=1.0, low=4, high=900),
        output=Lengths(distribution=Distribution.LOGNORMAL, mean=80, variation=1.0, low=1, high=400),
        requests=count,
        seed=2,
    )


class Witness:
    """Every stretch as it was told, with nothing summed up."""

    def __init__(self) -> None:
        self.stretches: list[Stretch] = []

    def queued(self, request: Any) -> None: ...
    def preempted(self, request_id: str, moment_s: float) -> None: ...
    def left(self, request_id: str, moment_s: float) -> None: ...
    def arrived(self, traveller: Any, moment_s: float, decodes: bool) -> None: ...
    def turned(self, up: bool, moment_s: float) -> None: ...
    def moved(self, begin_s: float, end_s: float, standing: bool) -> None: ...
    def note(self, stretch: Stretch, pieces: Any, ended: Any) -> None:
        self.stretches.append(stretch)


def play(
    kind: type[SimulatedExecutor], *, blocks: int = 900, recorder: Recorder | None = None, count: int = 120
) -> list[Simulated]:
    raw, name = find_model("Qwen/Qwen3-8B")
    config = ModelConfig.from_hf(raw, name=name, file=name)
    limits = SchedulerConfig(**{**vars(LIMITS), "blocks": blocks})
    tokens = {"max_step_tokens": limits.max_step_tokens, "max_context_tokens": limits.max_context_tokens}
    price = StepTable(config, find_chip("h20").at(), Precision(), **tokens)
    loops = [EngineLoop(Scheduler(limits), kind(price), VirtualClock()) for _ in range(2)]
    if recorder is not None:
        for loop, tape in zip(loops, recorder.pool("mixed", 2, blocks), strict=True):
            loop.tape = tape
    drawn = requests(sample(load(count)), vocabulary=32_000)
    return play_fleet(drawn, loops, find_router("least-load"))


def recorded(kind: type[SimulatedExecutor], **more: Any) -> tuple[Recording, list[Simulated], list[Witness]]:
    witnesses = [Witness(), Witness()]
    recorder = Recorder(lambda *_: witnesses)
    results = play(kind, recorder=recorder, **more)
    return recorder.recording([one for result in results for one in result.records]), results, witnesses


@pytest.mark.parametrize("blocks", [900, 110])
def test_leaps_and_steps_are_taken_down_alike(blocks: int) -> None:
    """Few blocks: requests are preempted, and what they knew is computed again."""
    leapt, results, told = recorded(LeapingExecutor, blocks=blocks)
    stepped, others, each = recorded(SimulatedExecutor, blocks=blocks)
    assert results == others == play(LeapingExecutor, blocks=blocks)
    assert (results[0].stats.preemptions > 0) == (blocks < 900)
    assert len(told[0].stretches) < len(each[0].stretches) / 3
    assert leapt.occupancy[0].most == stepped.occupancy[0].most
    # A leap's blocks are said to be taken evenly.
    assert leapt.occupancy[0].mean == pytest.approx(stepped.occupancy[0].mean, rel=0.01)
    assert leapt.occupancy[0].p99 == pytest.approx(stepped.occupancy[0].p99, abs=0.01)
    a, b = leapt.series[0], stepped.series[0]
    assert a.width_s == b.width_s
    for name in ("running", "waiting", "busy"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-6), name
    assert a.prompt_tokens_per_s == pytest.approx(b.prompt_tokens_per_s, abs=1e-3)
    assert np.abs(a.kv - b.kv).max() < 16 / blocks


@pytest.mark.parametrize("kind", [LeapingExecutor, SimulatedExecutor])
def test_integrals_are_the_engines_own_counts(kind: type[SimulatedExecutor]) -> None:
    taken, results, _ = recorded(kind, blocks=110)
    series = taken.series[0]
    assert series.until_s == pytest.approx(max(one.ended_s for one in taken.records))
    spans_s = np.diff(series.borders_s)
    stats = [result.stats for result in results]
    computed = sum(one.computed_tokens for one in stats)
    told = ((series.decode_tokens_per_s + series.prompt_tokens_per_s) * spans_s).sum()
    assert told == pytest.approx(computed, rel=1e-9)
    assert (series.busy * spans_s).sum() * 2 == pytest.approx(sum(one.busy_s for one in stats), rel=1e-9)
    assert (series.engines == 2).all() and series.kv.max() <= 1 and series.busy.max() <= 1 + 1e-9


def test_coarser_parts_have_the_same_integrals() -> None:
    series = recorded(LeapingExecutor)[0].series[0]
    for most in (240, 7, 1):
        coarse = series.coarse(most)
        assert most / 2 <= len(coarse.running) <= most
        for name in ("running", "kv", "decode_tokens_per_s", "busy", "engines"):
            fine, rough = ((getattr(one, name) * np.diff(one.borders_s)).sum() for one in (series, coarse))
            assert rough == pytest.approx(fine), name
        decoded = [(one.batch * one.busy * np.diff(one.borders_s)).sum() for one in (series, coarse)]
        assert decoded[1] == pytest.approx(decoded[0])


def test_little_holds_between_running_and_the_time_in_the_engine() -> None:
    """Requests in the engine, over time, are the time that requests spend in it."""
    taken, *_ = recorded(LeapingExecutor)
    series = taken.series[0]
    end_s = max(one.ended_s for one in taken.records)
    spans_s = np.minimum(series.width_s, end_s - np.arange(len(series.busy)) * series.width_s)
    inside_s = ((series.running + series.waiting) * spans_s).sum()
    felt_s = sum(one.ended_s - one.arrival_s for one in taken.records)
    # One that comes in the midst of a step is counted from the next.
    steps_s = sum(one.ended_s > one.arrival_s for one in taken.records) * 0.06
    assert felt_s - steps_s < inside_s <= felt_s + 1e-6


def test_memory_does_not_grow_and_parts_double() -> None:
    recorder = Recorder()
    (tape,) = recorder.pool("mixed", 1, 100)
    for i in range(20_000):
        tape.note(Stretch(i * 1.0, i + 0.5, 10, 2, 50, 4, 3, 1, 10, 30), (), {})
    assert len(tape._held) < record._HELD  # type: ignore[attr-defined]
    series = recorder.series(20_000.0)[0]
    assert record.PARTS / 2 <= len(series.busy) <= record.PARTS
    assert series.busy == pytest.approx(0.5, abs=0.03) and series.batch == pytest.approx(2.0)
    spans_s = np.full(len(series.busy), series.width_s)
    spans_s[-1] = 20_000.0 - (len(spans_s) - 1) * series.width_s
    assert (series.decode_tokens_per_s * spans_s).sum() == pytest.approx(20 * 20_000)
    occupied = recorder.occupancy(20_000.0)[0]
    assert occupied.mean == pytest.approx(0.1) and occupied.most == 0.3
    # Half of the time idle; of the other half, evenly from 10 % to 30 %.
    assert occupied.p99 == pytest.approx(0.296, abs=0.002)


def test_an_engine_that_closes_is_no_longer_up() -> None:
    recorder = Recorder()
    raw, name = find_model("Qwen/Qwen3-8B")
    config = ModelConfig.from_hf(raw, name=name, file=name)
    table = StepTable(
        config, find_chip("h20").at(), Precision(), max_step_tokens=256, max_context_tokens=2000
    )
    loops = [EngineLoop(Scheduler(LIMITS), LeapingExecutor(table), VirtualClock()) for _ in range(2)]
    for loop, tape in zip(loops, recorder.pool("mixed", 2, 900), strict=True):
        loop.tape = tape
    front = Front(loops, find_router("least-load"))
    front.at(2.0, lambda: front.close(1))
    front.at(6.0, lambda: front.open(1))
    front.advance(8.0)
    up = recorder.series(8.0)[0].engines
    assert up.mean() == pytest.approx(1.5) and up[0] == 2 and up[len(up) // 2] == 1
