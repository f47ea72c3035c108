"""Steps taken at once leave everything as the same steps taken one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tongyun.cloud.engine.clock import VirtualClock
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.restore import Restore, Way
from tongyun.cloud.engine.simulated import LeapingExecutor, SimulatedExecutor, StepLoad
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig
from tongyun.cloud.simulate import simulate
from tongyun.units import Cost, Source


class Price:
    """Seconds with every bit in use, so that a sum in another order would show."""

    def __call__(self, load: StepLoad) -> Cost:
        if (load.new_tokens == 1).all():
            seconds = float(self.decode(len(load.context), np.array([load.context.sum()]))[0, 0])
        else:
            seconds = 0.1 + 0.037 * float(load.new_tokens.sum()) + 0.0013 * float(load.context.sum())
        return Cost(seconds=seconds, joules=1.0, sources=frozenset({Source.ASSUMED}))

    def mixed(
        self, decoding: int, context_tokens: int, chunks: Sequence[tuple[int, int]], samples: int
    ) -> tuple[float, float]:
        new = decoding + sum(new for new, _ in chunks)
        context = context_tokens + sum(cached for _, cached in chunks)
        if new == decoding + len(chunks):
            return float(self.decode(new, np.array([context]))[0, 0]), 1.0
        return 0.1 + 0.037 * float(new) + 0.0013 * float(context), 1.0

    def decode(self, sequences: int, context_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        seconds = 1 / 7 + sequences / 30 + context_tokens / 1100
        return np.stack((seconds, np.ones_like(seconds)))


def config_of(draft_tokens: int, spare: int, max_sequences: int, **more: Any) -> SchedulerConfig:
    """A budget that is enough for every place's drafts."""
    budget = max_sequences * (1 + draft_tokens) + spare
    return SchedulerConfig(
        draft_tokens=draft_tokens, max_sequences=max_sequences, max_step_tokens=budget, **more
    )


configs = st.builds(
    config_of,
    draft_tokens=st.sampled_from([0, 0, 1, 2, 3, 7]),
    spare=st.integers(0, 18),
    blocks=st.integers(12, 60),
    block_tokens=st.sampled_from([1, 2, 4, 8]),
    max_context_tokens=st.just(80),
    max_sequences=st.integers(1, 6),
    prefix_caching=st.booleans(),
    tiers=st.sampled_from([None, (0,), (3,), (4, 0), (2, 9), (30, 30)]),
)


@st.composite
def loads(draw: st.DrawFn) -> list[Request]:
    moments = sorted(draw(st.lists(st.floats(0, 40), min_size=1, max_size=14)))
    return [
        Request(
            id=f"r{i}",
            # Few different beginnings, so that prefixes are shared.
            prompt=tuple(draw(st.sampled_from([range(30), range(40, 70)]))[: draw(st.integers(1, 30))]),
            output_tokens=draw(st.integers(1, 40)),
            arrival_s=moment,
            priority=draw(st.integers(0, 2)),
        )
        for i, moment in enumerate(moments)
    ]


@given(configs, loads(), st.one_of(st.none(), st.integers(1, 5)))
def test_a_simulation_by_leaps_is_the_one_by_steps(
    config: SchedulerConfig, load: list[Request], users: int | None
) -> None:
    by_leaps = simulate(
        load, config, _outfitted(LeapingExecutor(Price(), vocabulary=97), config), users=users
    )
    by_steps = simulate(
        load, config, _outfitted(SimulatedExecutor(Price(), vocabulary=97), config), users=users
    )
    assert by_leaps == by_steps


@given(configs, loads(), st.integers(1, 12), st.floats(0.2, 40))
def test_the_scheduler_is_left_as_by_single_steps(
    config: SchedulerConfig, load: list[Request], every: int, reach_s: float
) -> None:
    """After every leap the same clock and counters, and whenever it is settled the same blocks in
    the same hands, the same ones published and free."""
    loops = []
    for executor in (LeapingExecutor(Price(), vocabulary=97), SimulatedExecutor(Price(), vocabulary=97)):
        scheduler = Scheduler(config)
        loops.append((scheduler, EngineLoop(scheduler, _outfitted(executor, config), VirtualClock())))
    (ours, leaping), (theirs, stepping) = loops
    coming = [
        one
        for one in load
        if len(one.prompt) + one.output_tokens <= min(80, config.blocks * config.block_tokens)
    ]
    turns = 0
    while coming or leaping.has_work:
        # Whoever has arrived by now; somebody, where nobody is left.
        while coming and (coming[0].arrival_s <= leaping.clock.now() or not leaping.has_work):
            request = replace(coming.pop(0), arrival_s=leaping.clock.now())
            for loop in (leaping, stepping):
                loop.add(request)
        turns += 1
        if leaping.leap(until_s=leaping.clock.now() + reach_s) is None:
            leaping.step()
        while stepping.stats().steps < leaping.stats().steps:
            stepping.step()
        assert leaping.stats() == stepping.stats()
        assert leaping.clock.now() == stepping.clock.now()
        if turns % every == 0 or not leaping.has_work:
            assert _state(ours) == _state(theirs)
    assert not stepping.has_work


@given(configs, loads(), st.data())
def test_an_abort_amid_leaps_leaves_what_it_leaves_amid_steps(
    config: SchedulerConfig, load: list[Request], data: st.DataObject
) -> None:
    loops = []
    for executor in (LeapingExecutor(Price(), vocabulary=97), SimulatedExecutor(Price(), vocabulary=97)):
        scheduler = Scheduler(config)
        loops.append((scheduler, EngineLoop(scheduler, _outfitted(executor, config), VirtualClock())))
    (ours, leaping), (theirs, stepping) = loops
    fitting = [
        one
        for one in load
        if len(one.prompt) + one.output_tokens <= min(80, config.blocks * config.block_tokens)
    ]
    for request in fitting:
        leaping.add(request)
        stepping.add(request)
    while leaping.has_work:
        if leaping.leap(until_s=leaping.clock.now() + 1.0) is None:
            leaping.step()
        while stepping.stats().steps < leaping.stats().steps:
            stepping.step()
        left = sorted(ours._sequences)
        if left and data.draw(st.booleans()):
            gone = data.draw(st.sampled_from(left))
            assert leaping.produced(gone) == stepping.produced(gone)
            leaping.abort(gone)
            stepping.abort(gone)
            assert _state(ours) == _state(theirs)
    assert leaping.stats() == stepping.stats()


def _outfitted(executor: SimulatedExecutor, config: SchedulerConfig) -> SimulatedExecutor:
    ways = tuple(Way(latency_s=0.3 + i, block_s=0.7 + i / 3) for i in range(len(config.tiers or ())))
    executor.restore = Restore(ways=ways, overlap=config.blocks % 2 == 0, waiting_w=3.0) if ways else None
    executor.acceptance = config.blocks % 11 / 10
    return executor


def _state(scheduler: Scheduler) -> object:
    scheduler.settle()
    pool = scheduler.pool
    held = {
        name: (seq.state, seq.history, seq.computed, seq.blocks, seq.room, seq.published, seq.publish_at)
        for name, seq in scheduler._sequences.items()
    }
    order = [[seq.request.id for seq in group] for group in (scheduler._decoding, scheduler._prefilling)]
    tiers = scheduler.tiers
    lower = tiers and (
        [list(tier.items()) for tier in tiers._kept],
        tiers.demoted,
        tiers.restored,
        tiers.lost,
    )
    return held, order, pool._blank, list(pool._idle), pool._holders, pool._block_by_key, pool._key, lower


def test_lonely_requests_take_a_handful_of_turns() -> None:
    """So that the laws above speak of leaps at all."""
    config = SchedulerConfig(blocks=400, block_tokens=16, max_context_tokens=4096, max_sequences=8)
    scheduler = Scheduler(config)
    loop = EngineLoop(scheduler, LeapingExecutor(Price()), VirtualClock())
    for i in range(3):
        loop.add(Request(id=f"r{i}", prompt=tuple(range(i, 100 + i)), output_tokens=1000 + 100 * i))
    turns = 0
    while loop.has_work:
        turns += 1
        if loop.leap() is None:
            loop.step()
    assert loop.stats().steps == 1200
    assert turns == 4
