"""A drafted engine by leaps and by steps, on the prices of a real model: the same to the last bit.

Single requests that meet every border are in `tests/laws/test_leaping.py`; here are loads long enough
for preemption, shared prefixes, chunks of prompts and a clock with every bit in use to meet.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tongyun.cloud.engine.clock import VirtualClock
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.simulated import LeapingExecutor, SimulatedExecutor
from tongyun.cloud.engine.step_table import StepTable
from tongyun.cloud.record import Recorder
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig
from tongyun.cloud.simulate import simulate
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision
from tongyun.specs import find_chip, find_model

CONFIG = SchedulerConfig(
    blocks=700, block_tokens=16, max_context_tokens=2000, max_sequences=16, max_step_tokens=200
)
TIGHT = replace(CONFIG, blocks=160, block_tokens=4, max_context_tokens=600)
CASES = {
    "one draft": (replace(CONFIG, draft_tokens=1), 0.85),
    "three drafts": (replace(CONFIG, draft_tokens=3), 0.7),
    "never right": (replace(CONFIG, draft_tokens=2), 0.0),
    "always right": (replace(CONFIG, draft_tokens=2), 1.0),
    "few blocks": (replace(TIGHT, draft_tokens=3), 0.7),
    "few blocks, nothing shared": (replace(TIGHT, draft_tokens=3, prefix_caching=False), 0.7),
    "drafts longer than blocks": (replace(TIGHT, draft_tokens=9), 0.9),
    "tiers": (replace(TIGHT, draft_tokens=2, tiers=(60, 0)), 0.7),
}


def load(seed: int, config: SchedulerConfig) -> list[Request]:
    """Sixty requests, of few beginnings and of two priorities, that find the engine busy."""
    rng = np.random.default_rng(seed)
    long = config.max_context_tokens // 2 - 40
    return [
        Request(
            id=f"r{i}",
            prompt=tuple(range(1000 * int(rng.integers(3)), 9999))[: int(rng.integers(1, long))],
            output_tokens=int(rng.integers(1, 160)),
            arrival_s=moment_s,
            priority=int(rng.integers(5) == 0),
        )
        for i, moment_s in enumerate(np.cumsum(rng.gamma(0.3, 0.5, 60)).tolist())
    ]


@pytest.fixture(scope="module")
def tables() -> dict[int, StepTable]:
    raw, name = find_model("Qwen/Qwen3-32B")
    config, chip = ModelConfig.from_hf(raw, name=name), find_chip("h100").at()
    return {
        drafts: StepTable(
            config,
            chip,
            Precision.of("fp8"),
            max_step_tokens=200,
            max_context_tokens=2000,
            draft_tokens=drafts,
        )
        for drafts in {config.draft_tokens for config, _ in CASES.values()}
    }


def executor(kind: type[SimulatedExecutor], table: StepTable, acceptance: float) -> SimulatedExecutor:
    made = kind(table)
    made.acceptance = acceptance
    return made


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_records_counters_and_joules_are_those_of_single_steps(
    case: str, seed: int, tables: dict[int, StepTable]
) -> None:
    config, acceptance = CASES[case]
    requests = load(seed, config)
    leaping, stepping = (
        executor(kind, tables[config.draft_tokens], acceptance)
        for kind in (LeapingExecutor, SimulatedExecutor)
    )
    by_leaps, by_steps = simulate(requests, config, leaping), simulate(requests, config, stepping)
    assert by_leaps == by_steps
    assert leaping.joules == stepping.joules
    stats = by_leaps.stats
    assert stats.preemptions > 0 or config.blocks > 200
    assert (stats.prefix_hit_tokens > 0) == config.prefix_caching
    assert stats.verifications > 0 and (stats.accepted_tokens > 0) == (acceptance > 0)


@pytest.mark.parametrize("case", ["three drafts", "few blocks"])
def test_a_run_is_taken_down_alike(case: str, tables: dict[int, StepTable]) -> None:
    """Every token is told of in the stretch that it belongs to."""
    config, acceptance = CASES[case]
    told = []
    for kind in (LeapingExecutor, SimulatedExecutor):
        recorder = Recorder()
        tape = recorder.pool("mixed", 1, config.blocks)[0]
        run = simulate(
            load(5, config), config, executor(kind, tables[config.draft_tokens], acceptance), tape=tape
        )
        told.append(recorder.recording(run.records).series[0])
    a, b = told
    assert a.borders_s == pytest.approx(b.borders_s, rel=1e-12)
    spans_s = np.diff(a.borders_s)
    tokens = float((a.decode_tokens_per_s * spans_s).sum())
    assert tokens == pytest.approx(float((b.decode_tokens_per_s * spans_s).sum()), rel=1e-9)


def test_drafted_requests_take_a_handful_of_turns(tables: dict[int, StepTable]) -> None:
    """So that what is compared above are leaps at all."""
    loop = EngineLoop(
        Scheduler(replace(CONFIG, draft_tokens=3)), executor(LeapingExecutor, tables[3], 0.7), VirtualClock()
    )
    for i in range(3):
        loop.add(Request(id=f"r{i}", prompt=tuple(range(i, 60 + i)), output_tokens=1000 + 300 * i))
    turns = 0
    while loop.has_work:
        turns += 1
        assert loop.leap() is not None
    assert loop.stats().steps > 500
    assert turns == 4
