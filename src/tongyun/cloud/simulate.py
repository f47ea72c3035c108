"""Play requests through one engine, or a fleet of them, on virtual time and record what each one felt.

The scheduler, the loop and the records are those of the live engine; only the executor
and the clock differ. Knows no workload and no price: both come in ready.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from tongyun.cloud.engine.clock import VirtualClock
from tongyun.cloud.engine.interface import Engine
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.protocol import Executor, Tape
from tongyun.cloud.front import Front, Fronts
from tongyun.cloud.instance import Instance, Simulated
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.relay import Relay
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.router import Router
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig


def simulate(
    requests: Iterable[Request],
    scheduler_config: SchedulerConfig,
    executor: Executor,
    *,
    users: int | None = None,
    tape: Tape | None = None,
) -> Simulated:
    """Every request from its arrival to its end, in virtual seconds.

    Requests come in order of `arrival_s` (open loop) and are taken one by one, so they may
    be generated. With `users`, a closed loop instead: that many are in flight at a time
    and the next arrives when one ends. A request the engine refuses is recorded as failed;
    an executor that fails ends the simulation. A `tape` is told of every step.
    """
    run = Instance(EngineLoop(Scheduler(scheduler_config), executor, VirtualClock()))
    run.loop.tape = tape
    if users is None:
        _play_open(run, iter(requests))
    else:
        _play_closed(run, iter(requests), users)
    return run.result()


def play(requests: Iterable[Request], fleet: Fronts) -> list[RequestRecord]:
    """Every request of a load to its end; the records of all."""
    names = []
    for request in requests:
        names.append(request.id)
        fleet.send(request)
    fleet.advance(float("inf"))
    return fleet.records(names)


def play_fleet(requests: Iterable[Request], loops: Iterable[Engine], router: Router) -> list[Simulated]:
    """Every request through the engine that `router` gives it to; one result per engine."""
    front = Front(loops, router)
    play(requests, front)
    return [one.result() for one in front.instances]


def play_pools(
    requests: Iterable[Request],
    pools: tuple[Iterable[Engine], Iterable[Engine]],
    routers: tuple[Router, Router],
    hand_over_s: Callable[[Request], float],
) -> tuple[tuple[RequestRecord, ...], tuple[list[Simulated], list[Simulated]]]:
    """Every request through an engine that prefills it and another that decodes the rest (see `Relay`).

    Returns a record for each request in order of arrival, and what happened in each pool.
    """
    relay = Relay(pools, routers, hand_over_s)
    records = play(requests, relay)
    return tuple(records), relay.results()


def _play_open(run: Instance, requests: Iterator[Request]) -> None:
    clock = run.loop.clock
    coming = next(requests, None)
    while coming is not None or run.in_flight:
        if coming is not None and not run.in_flight:
            clock.wait_until(coming.arrival_s)
        now_s = clock.now()
        while coming is not None and coming.arrival_s <= now_s:
            run.send(coming)
            sent, coming = coming, next(requests, None)
            if coming is not None and coming.arrival_s < sent.arrival_s:
                raise ValueError(f"request '{coming.id}' arrives before '{sent.id}', which came first")
        run.move(coming.arrival_s if coming is not None else float("inf"))


def _play_closed(run: Instance, requests: Iterator[Request], users: int) -> None:
    if users < 1:
        raise ValueError(f"a closed loop needs at least one user, not {users}")
    coming = next(requests, None)
    while coming is not None or run.in_flight:
        # A refused request leaves its place to the next at once.
        while coming is not None and len(run.in_flight) < users:
            run.send(replace(coming, arrival_s=run.loop.clock.now()))
            coming = next(requests, None)
        if run.in_flight:
            run.move()
