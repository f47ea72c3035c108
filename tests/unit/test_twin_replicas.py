"""A twin whose replicas fail, come and go and whose requests move does what the simulation of that does."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.laws.test_autoscale import rule
from tests.laws.test_failures import CHIP, OFTEN, script, site
from tests.unit.test_twin import CONFIG, HAND_OVER_S, Price, Reader

from tongyun.cli.fleet import read_fleet
from tongyun.cloud.engine.clock import VirtualClock
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.simulated import LeapingExecutor, SimulatedExecutor
from tongyun.cloud.front import Front
from tongyun.cloud.migration import Mover, Moving
from tongyun.cloud.prompts import PromptMover
from tongyun.cloud.relay import Relay
from tongyun.cloud.retries import LOST
from tongyun.cloud.sched.migrate import MigrationPolicy, PromptPolicy
from tongyun.cloud.sched.request import Finish, Request
from tongyun.cloud.sched.router import LeastLoad, RoundRobin
from tongyun.cloud.sched.scheduler import Scheduler
from tongyun.cloud.twin import Lost, Twin, Watch
from tongyun.codesign.at_work import AtWork, put_to_work
from tongyun.codesign.upkeep import Upkeep
from tongyun.specs import AutoscaleSpec, FailureSpec, Figure, OutageSpec
from tongyun.units import Source

EAGER = MigrationPolicy(interval_s=0.02, below_steps=30, above_steps=30, last_tokens=2)
SCALED = rule(
    min=1,
    target=3.0,
    interval_s=0.1,
    cooldown_down_s=0.2,
    engine_start=Figure.of(0.1, Source.ASSUMED, "a test's"),
)
OUTAGES = tuple(
    OutageSpec(at_s=at_s, instance=name, for_s=0.3)
    for at_s, name in ((0.4, "{}-0"), (0.9, "{}-1"), (1.3, "{}-0"))
)
Build = Callable[[tuple[Watch | None, Watch | None], Lost | None, type[SimulatedExecutor]], AtWork]


def outages(role: str, **more: object) -> FailureSpec:
    return script(*(replace(one, instance=str(one.instance).format(role)) for one in OUTAGES), **more)


def one_pool(failures: FailureSpec | None, rules: tuple[AutoscaleSpec, ...], *, moving: bool) -> Build:
    def build(
        watches: tuple[Watch | None, Watch | None], lost: Lost | None, kind: type[SimulatedExecutor]
    ) -> AtWork:
        tight = replace(CONFIG, blocks=50)
        engines = [EngineLoop(Scheduler(tight), kind(Price()), VirtualClock()) for _ in range(3)]
        front = Front(engines, RoundRobin(), watch=watches[0])
        movers = (Mover(front, EAGER, lambda tokens: 0.003 + tokens * 1e-4),) if moving else ()
        running = None
        if failures is not None or rules:
            running = Upkeep(failures=failures, autoscale=rules).attach(
                front, [site("mixed", 3)], CHIP, movers=movers, told=lost
            )
        return AtWork(front=front, running=running, movers=movers, changing=None)

    return build


def two_pools(
    failures: FailureSpec, rules: tuple[AutoscaleSpec, ...], *, moving: bool = False, prompts: bool = False
) -> Build:
    def build(
        watches: tuple[Watch | None, Watch | None], lost: Lost | None, kind: type[SimulatedExecutor]
    ) -> AtWork:
        config = replace(CONFIG, blocks=50 if moving else CONFIG.blocks)
        # One prompt at a time, in small pieces, so that others wait.
        configs = (replace(config, max_sequences=1, max_step_tokens=4) if prompts else config), config
        pools = [
            [EngineLoop(Scheduler(each), kind(Price()), VirtualClock()) for _ in range(2)] for each in configs
        ]
        routers = RoundRobin() if prompts else LeastLoad(), RoundRobin() if moving else LeastLoad()
        relay = Relay((pools[0], pools[1]), routers, lambda _: HAND_OVER_S, watches=watches)
        sites = [site("prefill", 2), site("decode", 2)]
        movers: list[Moving] = []
        if moving:
            movers.append(Mover(relay.second, EAGER, lambda tokens: 0.003 + tokens * 1e-4))
        if prompts:
            movers.append(PromptMover(relay.first, PromptPolicy(interval_s=0.05), 0.003))
        running = Upkeep(failures=failures, autoscale=rules).attach(
            relay, sites, CHIP, movers=movers, told=lost
        )
        return AtWork(front=relay, running=running, movers=tuple(movers), changing=None)

    return build


STORMS = replace(OFTEN, chip_mtbf_hours=1.5 / 3600, chip_repair_hours=0.2 / 3600, retries=1)
FLEETS = {
    "moves": one_pool(None, (), moving=True),
    "outages, lost": one_pool(outages("mixed", on_failure="lose"), (), moving=False),
    "storms": one_pool(STORMS, (), moving=False),
    "scaled": one_pool(None, (SCALED,), moving=False),
    "all": one_pool(outages("mixed"), (SCALED,), moving=True),
    "decode fails": two_pools(outages("decode"), ()),
    "decode fails and moves": two_pools(outages("decode"), (replace(SCALED, pool="decode"),), moving=True),
    "prompts move": two_pools(outages("prefill"), (), moving=True, prompts=True),
    "prefill fails": two_pools(outages("prefill"), (replace(SCALED, pool="decode"),)),
}


@pytest.mark.parametrize("build", FLEETS.values(), ids=FLEETS)
def test_moments_are_those_of_the_simulation_to_the_last_bit(build: Build) -> None:
    reader, rng = Reader(), np.random.default_rng(5)
    work: list[AtWork] = []

    def start(watches: tuple[Watch, Watch], lost: Lost) -> AtWork:
        work.append(build(watches, lost, SimulatedExecutor))
        return work[0]

    # Time enough to hand a request over, however busy the machine: moments stay exact.
    twin, sent = Twin(start, reader, grace_s=0.25), []
    try:
        for i in range(70):
            moment_s = time.perf_counter()
            request = Request(
                id=f"r{i}",
                prompt=tuple(range(i, i + int(rng.integers(1, 60)))),
                output_tokens=int(rng.integers(1, 50)),
                arrival_s=moment_s,
            )
            twin.submit(request)
            sent.append(replace(request, arrival_s=moment_s - twin._origin_s))
            time.sleep(float(rng.exponential(0.02)))
        reader.wait(*(request.id for request in sent))
        stats = twin.stats()
    finally:
        twin.close()
    assert stats.running == stats.waiting == stats.kv_blocks_used == 0
    simulated = build((None, None), None, LeapingExecutor)
    records = {record.id: record for record in simulated.play(sent)}
    assert len(records) == 70
    for name, record in records.items():
        told = reader.events[name]
        tokens = [event for event in told if event.token is not None]
        assert len(tokens) == record.output_tokens
        assert (tokens[0].moment_s if tokens else None) == record.first_token_s
        if record.ok:
            assert told[-1].moment_s == record.last_token_s
            assert [event.finish for event in told] == [None] * (len(told) - 1) + [Finish.LENGTH]
        else:
            assert told[-1].finish is Finish.ERROR and told[-1].moment_s == record.ended_s
            assert told[-1].error == record.error and str(record.error).startswith(LOST)
    same(work[0], simulated)


EXPERTS = """
name = "wide"
model = "Qwen/Qwen3-30B-A3B"
chip = "h100"

[experts]
skew = { ratio = 0.6, kind = "assumed", source = "this test" }
rebalance = true
redundant = 16
drift = { fraction = 0.3, kind = "assumed", source = "this test" }
drift_s = 0.5
window_s = 0.2

[[pool]]
replicas = 2
tp = 1
ep = 8
dp = 8

[migration]

[failures]
[[failures.event]]
at_s = 0.3
instance = "mixed-1"
for_s = 0.5
"""


def test_experts_are_placed_anew_beside_a_failure_at_the_moments_of_the_simulation(tmp_path: Path) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(EXPERTS)
    _, fleet = read_fleet(file)
    chip, words = fleet.question.chip.at(), range(100)
    logs, moments = [], []
    reader, work = Reader(), []
    sent: list[Request] = []

    def start(watches: tuple[Watch, Watch], lost: Lost) -> AtWork:
        pools = [fleet.engines(pool, chip, words=words) for pool in fleet.pools]
        work.append(put_to_work(fleet, pools, LeastLoad(), chip, watches=watches, told=lost))
        return work[0]

    twin = Twin(start, reader, grace_s=0.25)
    try:
        for i in range(40):
            moment_s = time.perf_counter()
            request = Request(
                id=f"r{i}", prompt=tuple(range(i, i + 300)), output_tokens=60, arrival_s=moment_s
            )
            twin.submit(request)
            sent.append(replace(request, arrival_s=moment_s - twin._origin_s))
            time.sleep(0.025)
        reader.wait(*(request.id for request in sent))
    finally:
        twin.close()
    moments.append({name: told[-1].moment_s for name, told in reader.events.items()})
    work.append(put_to_work(fleet, [fleet.engines(pool, chip) for pool in fleet.pools], LeastLoad(), chip))
    moments.append({record.id: record.last_token_s for record in work[1].play(sent)})
    for one in work:
        assert one.changing is not None
        logs.append(one.changing.log)
    assert moments[0] == moments[1]
    assert len(logs[1]) > 1 and logs[0][: len(logs[1])] == logs[1]
    assert len({one.moved_bytes / one.experts for one in logs[1]}) == 2
    same(work[0], replace(work[1], movers=()))


def same(twin: AtWork, simulated: AtWork) -> None:
    """What came and went is too, as far as the shorter of both saw it."""
    for ours, theirs in zip(twin.movers, simulated.movers, strict=False):
        assert theirs.log and ours.log == theirs.log
    if simulated.running is not None and twin.running is not None:
        for ours, theirs in zip(twin.running.replicas, simulated.running.replicas, strict=True):
            count = min(len(ours.log), len(theirs.log))
            assert ours.log[:count] == theirs.log[:count]
        assert twin.running.retries.retries == simulated.running.retries.retries


def test_an_aborted_request_is_gone_wherever_it_is() -> None:
    """Held before anybody is up, at work, and between two engines."""
    reader = Reader()
    work: list[AtWork] = []
    build = one_pool(None, (replace(SCALED, min=0),), moving=True)

    def start(watches: tuple[Watch, Watch], lost: Lost) -> AtWork:
        work.append(build(watches, lost, SimulatedExecutor))
        return work[0]

    twin = Twin(start, reader, grace_s=0.02)
    try:
        for i in range(30):
            twin.submit(
                Request(id=f"r{i}", prompt=(1, 2, 3), output_tokens=90, arrival_s=time.perf_counter())
            )
        time.sleep(0.05)
        for i in range(30):
            twin.abort(f"r{i}")
            time.sleep(0.02)
        reader.wait(*(f"r{i}" for i in range(30)))
    finally:
        twin.close()
    assert work[0].front.in_flight == 0
    assert all(one.moves == 0 or work[0].movers for one in work[0].front.fronts[0].instances)
    assert {reader.events[f"r{i}"][-1].finish for i in range(30)} <= {Finish.ABORT, Finish.LENGTH}
    stats = twin.stats()
    assert stats.running == stats.waiting == 0
