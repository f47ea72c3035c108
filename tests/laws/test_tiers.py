"""Memories behind the KV cache: nothing is lost or kept twice, more never hits less, none is none."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tongyun.cloud.engine.clock import VirtualClock
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.restore import Restore, Way
from tongyun.cloud.engine.simulated import SimulatedExecutor, StepLoad
from tongyun.cloud.sched.request import Piece, Request
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig
from tongyun.units import Cost, Source

CONFIG = SchedulerConfig(
    blocks=14, block_tokens=4, max_context_tokens=48, max_sequences=4, max_step_tokens=16, tiers=(0, 0)
)
WAYS = (Way(latency_s=0.0, block_s=0.5), Way(latency_s=2.0, block_s=1.0))
sizes = st.tuples(st.integers(0, 12), st.integers(0, 12))


def price(load: StepLoad) -> Cost:
    return Cost(
        seconds=1.0 + 0.1 * float(load.new_tokens.sum()), joules=1.0, sources=frozenset({Source.ASSUMED})
    )


@st.composite
def prompts(draw: st.DrawFn) -> list[Request]:
    """Few beginnings of many lengths, so that prefixes are shared and evicted."""
    shapes = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 40)), min_size=1, max_size=30))
    return [
        Request(id=f"r{i}", prompt=tuple(range(100 * kind, 100 * kind + length)), output_tokens=2)
        for i, (kind, length) in enumerate(shapes)
    ]


def engine(tiers: tuple[int, ...] | None) -> tuple[Scheduler, EngineLoop]:
    scheduler, executor = Scheduler(replace(CONFIG, tiers=tiers)), SimulatedExecutor(price, vocabulary=97)
    if tiers:
        executor.restore = Restore(ways=WAYS[: len(tiers)], overlap=False, waiting_w=0.0)
    return scheduler, EngineLoop(scheduler, executor, VirtualClock())


@given(prompts(), sizes)
def test_blocks_are_conserved_over_the_tiers(load: list[Request], tiers: tuple[int, int]) -> None:
    scheduler, loop = engine(tiers)
    store = scheduler.tiers
    assert store is not None
    for request in load:
        loop.add(request)
    while loop.has_work:
        loop.step()
        assert all(kept <= size for kept, size in zip(store.kept, tiers, strict=True))
        gone = [store.restored[i] + store.dropped[i] + store.kept[i] for i in range(2)]
        # What came down to a tier lies there, went back up, was computed anew or went further down.
        assert store.demoted[0] == gone[0] + store.demoted[1]
        assert store.demoted[1] == gone[1] + store.lost
        places = [*scheduler.pool._block_by_key, *store._kept[0], *store._kept[1]]
        assert len(places) == len(set(places))


@given(prompts(), sizes, sizes)
def test_a_larger_tier_never_hits_less(
    load: list[Request], tiers: tuple[int, int], more: tuple[int, int]
) -> None:
    """One request after another, so that the order of use is the same: a stack in the sense of LRU."""
    hits = []
    for each in (tiers, (tiers[0] + more[0], tiers[1] + more[1])):
        scheduler, loop = engine(each)
        found = []
        for request in load:
            loop.add(request)
            before = scheduler.counters.prefix_hit_tokens
            while loop.has_work:
                loop.step()
            found.append(scheduler.counters.prefix_hit_tokens - before)
        hits.append(found)
    assert all(less <= at_least for less, at_least in zip(*hits, strict=True))


@given(prompts())
def test_tiers_of_no_size_are_no_tiers(load: list[Request]) -> None:
    logs = []
    for tiers in (None, (0, 0)):
        _, loop = engine(tiers)
        for request in load:
            loop.add(request)
        logs.append([loop.step() for _ in iter(lambda loop=loop: loop.has_work, False)])
        stats = loop.stats()
        assert sum(stats.tier_hit_tokens) == 0
        logs[-1].append(replace(stats, tier_hit_tokens=()))  # type: ignore[arg-type]
    assert logs[0] == logs[1]


def test_blocks_come_back_at_the_price_of_their_way() -> None:
    """Blocks that another prompt evicted come back from host memory, each for its half second."""
    scheduler, loop = engine((20,))
    first = Request(id="a", prompt=tuple(range(40)), output_tokens=1)
    other = Request(id="b", prompt=tuple(range(100, 140)), output_tokens=1)
    for request in (first, other):
        loop.add(request)
        while loop.has_work:
            loop.step()
    assert scheduler.tiers is not None
    lower = scheduler.tiers.kept[0]
    began_s = loop.clock.now()
    loop.add(replace(first, id="c"))
    loop.step()
    assert scheduler.counters.tier_hit_tokens == [4 * scheduler.tiers.restored[0]]
    assert 0 < scheduler.tiers.restored[0] <= lower
    computed = 40 - scheduler.counters.prefix_hit_tokens
    spent_s = 1.0 + 0.1 * computed + 0.5 * scheduler.tiers.restored[0]
    assert abs(loop.clock.now() - began_s - spent_s) < 1e-9


def test_a_step_that_overlaps_takes_the_longer_of_both() -> None:
    request = Request(id="a", prompt=(1,), output_tokens=1)
    piece = Piece(request, 0, 1, True, (1,), (0,), 0, (2, 1))
    behind = Restore(ways=WAYS, overlap=True, waiting_w=10.0)
    assert behind.whole(1.5, 7.0, [piece]) == (4.0, 7.0 + 25.0)
    assert behind.whole(9.0, 7.0, [piece]) == (9.0, 7.0)
    assert replace(behind, overlap=False).whole(1.5, 7.0, [piece]) == (5.5, 7.0 + 40.0)
    assert behind.whole(1.5, 7.0, [piece._replace(restored=())]) == (1.5, 7.0)
