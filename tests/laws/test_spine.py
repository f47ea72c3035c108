"""What happens at a moment happens in order, changes nothing by itself, and loses no request."""

from __future__ import annotations

from functools import partial

import pytest
from tests.laws.test_fleet import crowd, fleet

from tongyun.cloud.front import Front
from tongyun.cloud.sched.router import find_router
from tongyun.cloud.simulate import play_fleet


def test_events_run_in_order_of_moment_and_then_of_asking() -> None:
    front = Front(fleet(2), find_router("least-load"))
    seen: list[str] = []
    for moment, name in ((3.0, "c"), (1.0, "a"), (3.0, "d"), (2.0, "b")):
        front.at(moment, partial(seen.append, name))
    front.advance(2.5)
    assert seen == ["a", "b"]
    with pytest.raises(ValueError, match="when it is"):
        front.at(2.0, lambda: None)
    front.advance(float("inf"))
    assert seen == ["a", "b", "c", "d"]


def test_an_event_that_does_nothing_changes_nothing() -> None:
    load, front = crowd(1), Front(fleet(3), find_router("least-load"))
    for tick in range(100):
        front.at(tick * 0.37, lambda: None)
    for request in load:
        front.send(request)
    front.advance(float("inf"))
    plain = play_fleet(load, fleet(3), find_router("least-load"))
    assert [one.result().records for one in front.instances] == [one.records for one in plain]


def test_an_engine_that_is_not_up_gets_nothing_and_finishes_what_it_has() -> None:
    load, front = crowd(2), Front(fleet(2), find_router("round-robin"))
    front.at(5.0, lambda: front.close(0))
    front.at(6.0, lambda: front.close(1))
    held: list[int] = []
    front.at(8.0, lambda: held.append(front.held))
    front.at(8.0, lambda: front.open(1))
    for request in load:
        front.send(request)
    front.advance(float("inf"))
    results = [one.result() for one in front.instances]
    assert held[0] > 0
    assert front.held == 0
    assert all(record.arrival_s < 5.0 for record in results[0].records)
    records = [record for one in results for record in one.records]
    assert sorted(record.id for record in records) == sorted(request.id for request in load)
    late = [record for record in records if 6.0 < record.arrival_s < 8.0]
    assert all(record.first_token_s is not None and record.first_token_s > 8.0 for record in late)
    assert all(one.stats.kv_blocks_used == 0 for one in results)
