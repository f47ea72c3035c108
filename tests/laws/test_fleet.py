"""A fleet loses nothing, repeats itself, and is what its engines are alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tongyun.cloud.engine.clock import VirtualClock
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.simulated import LeapingExecutor, StepLoad
from tongyun.cloud.instance import Simulated
from tongyun.cloud.latency import Slo, summarise
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.router import ROUTERS, Load, find_router
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig
from tongyun.cloud.simulate import play_fleet, simulate
from tongyun.errors import InputError
from tongyun.units import Cost, Source

CONFIG = SchedulerConfig(
    blocks=200, block_tokens=4, max_context_tokens=200, max_sequences=8, max_step_tokens=64
)


class Price:
    """Seconds that grow with what is computed and what is remembered."""

    def __call__(self, load: StepLoad) -> Cost:
        seconds = 0.02 + 0.001 * float(load.new_tokens.sum()) + 1e-5 * float(load.context.sum())
        return Cost(seconds=seconds, joules=1.0, sources=frozenset({Source.ASSUMED}))

    def mixed(
        self, decoding: int, context_tokens: int, chunks: Sequence[tuple[int, int]], samples: int
    ) -> tuple[float, float]:
        new = decoding + sum(new for new, _ in chunks)
        context = context_tokens + sum(cached for _, cached in chunks)
        return 0.02 + 0.001 * float(new) + 1e-5 * float(context), 1.0

    def decode(self, sequences: int, context_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        seconds = 0.02 + 0.001 * sequences + 1e-5 * context_tokens
        return np.stack((seconds, np.ones_like(seconds)))


def fleet(engines: int) -> list[EngineLoop]:
    return [EngineLoop(Scheduler(CONFIG), LeapingExecutor(Price()), VirtualClock()) for _ in range(engines)]


@st.composite
def loads(draw: st.DrawFn) -> list[Request]:
    moments = sorted(draw(st.lists(st.floats(0, 20), min_size=1, max_size=30)))
    return [
        Request(
            id=f"r{i}",
            prompt=tuple(range(draw(st.integers(0, 2)) * 1000, 9999))[: draw(st.integers(1, 120))],
            output_tokens=draw(st.integers(1, 40)),
            arrival_s=moment,
        )
        for i, moment in enumerate(moments)
    ]


@given(loads(), st.integers(1, 5), st.sampled_from(sorted(ROUTERS)))
def test_every_request_ends_once_and_every_block_comes_back(
    load: list[Request], engines: int, name: str
) -> None:
    results = play_fleet(load, fleet(engines), find_router(name))
    ended = sorted(record.id for one in results for record in one.records)
    assert ended == sorted(request.id for request in load)
    assert all(one.stats.kv_blocks_used == one.stats.running == one.stats.waiting == 0 for one in results)
    assert sum(one.stats.output_tokens for one in results) == sum(r.output_tokens for r in load)
    assert results == play_fleet(load, fleet(engines), find_router(name))


@given(loads())
def test_a_fleet_of_one_is_the_engine_alone(load: list[Request]) -> None:
    (one,) = play_fleet(load, fleet(1), find_router("least-load"))
    assert one == simulate(load, CONFIG, LeapingExecutor(Price()))


@given(loads(), st.integers(1, 4))
def test_turn_by_turn_is_so_many_engines_alone(load: list[Request], engines: int) -> None:
    results = play_fleet(load, fleet(engines), find_router("round-robin"))
    for index, one in enumerate(results):
        alone = load[index::engines]
        if alone:
            assert one == simulate(alone, CONFIG, LeapingExecutor(Price()))


def crowd(seed: int, rate: float = 12.0, count: int = 300) -> list[Request]:
    """Lognormal lengths in bursts: what round robin is bad at."""
    rng = np.random.default_rng(seed)
    moments = np.cumsum(rng.gamma(0.25, 4 / rate, count))
    prompts = np.clip(rng.lognormal(3, 1, count), 1, 120).astype(int)
    outputs = np.clip(rng.lognormal(2.5, 1, count), 1, 70).astype(int)
    return [
        Request(id=f"r{i}", prompt=tuple(range(i, i + p)), output_tokens=int(o), arrival_s=float(t))
        for i, (t, p, o) in enumerate(zip(moments, prompts, outputs, strict=True))
    ]


def goodput(results: list[Simulated]) -> int:
    records = [record for one in results for record in one.records]
    return summarise(records, Slo(ttft_s=1.0, tpot_s=0.2)).met_slo


@pytest.mark.parametrize("seed", range(6))
def test_more_engines_never_serve_fewer_requests_in_time(seed: int) -> None:
    load = crowd(seed)
    met = [goodput(play_fleet(load, fleet(n), find_router("least-load"))) for n in (1, 2, 4, 8)]
    assert met == sorted(met)
    assert met[0] < met[-1]


def test_looking_at_the_load_shortens_the_tail_of_a_crowded_fleet() -> None:
    def tail_s(name: str, seed: int) -> float:
        results = play_fleet(crowd(seed, rate=30, count=600), fleet(4), find_router(name))
        ttft = summarise([record for one in results for record in one.records]).ttft_s
        assert ttft is not None
        return ttft.p99

    ratios = [tail_s("round-robin", seed) / tail_s("least-load", seed) for seed in range(5)]
    # 1.36 over eight seeds at 98 % use; with engines to spare there is nothing to gain.
    assert np.median(ratios) > 1.15


def test_a_prefix_is_sent_where_it_was_unless_that_engine_is_crowded() -> None:
    router = find_router("prefix")
    idle = Load(0, 0)

    def request(first: int, tokens: int = 1100) -> Request:
        return Request(id="r", prompt=tuple(range(first, first + tokens)), output_tokens=1)

    assert router.choose(request(0), [Load(1, 5), idle, idle]) == 1
    assert router.choose(request(0), [idle, Load(5, 0), idle]) == 1
    assert router.choose(request(7000), [Load(1, 0), Load(5, 0), idle]) == 2
    assert router.choose(request(0), [idle, Load(40, 0), idle]) == 0
    # Now both hold it; the one with less to do is asked.
    assert router.choose(request(0), [Load(2, 0), Load(1, 0), idle]) == 1
    # Too short to be known by its blocks.
    assert router.choose(request(0, tokens=100), [Load(2, 0), Load(1, 0), idle]) == 2


def test_a_misspelt_router_is_told_its_neighbours() -> None:
    with pytest.raises(InputError, match="prefix"):
        find_router("prefxi")
