"""Prompts that wait go where they are computed sooner: the laws of `test_moving_pools` hold for them, too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.laws.test_autoscale import rule
from tests.laws.test_failures import script, whole
from tests.laws.test_migration import NEVER, TIGHT, crowd, load_of
from tests.laws.test_moving_pools import SPLIT, Pools

from tongyun.cli.fleet import read_fleet
from tongyun.cloud.latency import RequestRecord, Slo, summarise
from tongyun.cloud.migration import Move
from tongyun.cloud.replica import State
from tongyun.cloud.sched.freeness import Load
from tongyun.cloud.sched.migrate import PromptPolicy
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.router import RoundRobin
from tongyun.cloud.workload import Arrival
from tongyun.errors import SpecError
from tongyun.specs import OutageSpec

OFTEN = PromptPolicy(interval_s=0.05)
SLOTS = replace(TIGHT, max_sequences=2, max_step_tokens=32)
"""Few at a time, so that others wait."""


def uneven(count: int = 120) -> list[Request]:
    """Turn by turn, one of two engines gets all the long prompts."""
    return [
        Request(
            id=f"r{i}",
            prompt=tuple(range(100 * i, 100 * i + (90, 6)[i % 2])),
            output_tokens=2,
            arrival_s=0.02 * i,
        )
        for i in range(count)
    ]


def moved(one: Pools) -> list[Move]:
    return one.movers[1].log


def ttft_s(records: list[RequestRecord]) -> float:
    found = summarise(records, Slo()).ttft_s
    assert found is not None
    return found.mean


def test_what_waits_for_the_longer_queue_goes_to_the_shorter_and_is_there_sooner() -> None:
    still, one = Pools(SLOTS, NEVER), Pools(SLOTS, NEVER, prompts=OFTEN)
    still.relay.first._router = RoundRobin()
    before, after = still.play(uneven())[0], one.play(uneven())[0]
    whole(after, uneven())
    log = moved(one)
    assert {move.outcome for move in log} == {"prompt"} and len(log) > 10
    assert (log[0].source, log[0].target) == (0, 1)
    assert all(move.tokens == 0 and move.downtime_s >= 0.003 for move in log)
    assert ttft_s(after) < 0.8 * ttft_s(before)
    computed = [
        sum(e.loop.stats().computed_tokens for e in run.relay.first.instances) for run in (still, one)
    ]
    assert computed[0] == computed[1] == sum(len(request.prompt) for request in uneven())


def due(tokens: int, **more: object) -> Load:
    return load_of(50, 2, **more)._replace(prompt_tokens=tokens)


def test_a_prompt_goes_where_it_is_done_sooner_and_nowhere_else() -> None:
    policy, last = PromptPolicy(), {0: 300, 1: 100, 2: 50}
    assert policy.pair([due(1000), due(600), due(500)], last.get) == (0, 2)
    # Behind what is there it would be done when it is done here.
    assert policy.pair([due(800), due(600), due(500)], last.get) is None
    assert policy.pair([due(801), due(500)], last.get) == (0, 1)
    # Nobody waits at the fullest.
    assert policy.pair([due(1000), due(900), due(100)], {1: 100}.get) == (1, 2)
    assert policy.pair([due(500), due(500)], last.get) is None
    assert policy.pair([due(10, up=False), due(900)], {0: 10}.get) == (0, 1)
    assert policy.pair([due(900), due(10, up=False)], {0: 10}.get) is None


SLOWLY = 0.5
"""Seconds on the way, in which something happens."""


def test_who_is_on_the_way_goes_back_from_an_engine_that_dies_and_is_not_held_by_one_it_left() -> None:
    calm = Pools(SLOTS, NEVER, prompts=OFTEN, send_s=SLOWLY)
    calm.play(uneven())
    first = moved(calm)[0]
    at_s = first.moment_s - 0.6 * SLOWLY
    for index, outcome in ((1, "called off"), (0, "prompt")):
        failures = script(OutageSpec(at_s=at_s, instance=f"prefill-{index}", for_s=2.0))
        one = Pools(SLOTS, NEVER, failures, prompts=OFTEN, send_s=SLOWLY)
        records, _, _ = one.play(uneven())
        whole(records, uneven())
        assert all(record.ok for record in records) and one.running is not None
        found = next(move for move in moved(one) if move.request_id == first.request_id)
        assert found.outcome == outcome
        # It was not lost, and is no retry.
        assert first.request_id not in one.running.retries._stories


@pytest.mark.parametrize("policy", ["retry", "lose"])
def test_who_can_neither_arrive_nor_go_back_is_sent_again_or_lost(policy: str) -> None:
    calm = Pools(SLOTS, NEVER, prompts=OFTEN, send_s=SLOWLY)
    calm.play(uneven())
    first = moved(calm)[0]
    at_s = first.moment_s - 0.6 * SLOWLY
    events = [
        OutageSpec(at_s=at_s + after_s, instance=f"prefill-{index}", for_s=2.0)
        for index, after_s in ((0, 0.0), (1, 0.05))
    ]
    one = Pools(SLOTS, NEVER, script(*events, on_failure=policy), prompts=OFTEN, send_s=SLOWLY)
    records, _, _ = one.play(uneven())
    whole(records, uneven())
    torn = {move.request_id for move in moved(one) if move.outcome == "torn"}
    assert first.request_id in torn
    ended = {record.id: record.ok for record in records}
    assert all(ended[name] == (policy == "retry") for name in torn)


def test_an_engine_that_is_stopped_gives_away_what_waits_and_one_that_comes_up_takes() -> None:
    scaled = rule(pool="prefill", min=1, target=4.0, interval_s=0.2, cooldown_down_s=0.1)
    load = [*uneven(), *(replace(one, id=f"x{one.id}", arrival_s=one.arrival_s + 9.0) for one in uneven(20))]
    one = Pools(SLOTS, NEVER, None, (scaled,), prompts=OFTEN)
    records, kept, _ = one.play(load)
    whole(records, load)
    assert kept is not None and all(record.ok for record in records)
    came = min(change.moment_s for change in kept.log if change.state is State.UP and change.moment_s > 0)
    assert sum(move.moment_s > came and move.target == 1 for move in moved(one)) > 3


@pytest.mark.parametrize("seed", range(2))
def test_prompts_and_requests_that_decode_move_side_by_side(seed: int) -> None:
    one = Pools(
        replace(TIGHT, max_sequences=6), replace(NEVER, below_steps=30, above_steps=30), prompts=OFTEN
    )
    records, _, log = one.play(crowd(seed))
    whole(records, crowd(seed))
    assert any(move.outcome == "migrated" for move in log)
    assert any(move.outcome == "prompt" for move in moved(one))


def test_a_fleet_file_says_so_and_one_without_such_a_pool_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "fleet.toml"
    arrivals = [Arrival(0.05 * i, (6000, 100)[i % 4 > 0], 4) for i in range(120)]
    moves = {}
    for said in ("", "prompts = true"):
        file.write_text(SPLIT.format(more=f"[migration]\n{said}"))
        _, fleet = read_fleet(file, isl=1500, osl=600)
        played = fleet.play(arrivals, RoundRobin(), chip=fleet.question.chip.at())
        assert played.moves is not None and played.report.ttft_s is not None
        moves[said] = played.moves.prompts, played.report.ttft_s.mean
    assert moves[""][0] == 0 < moves["prompts = true"][0]
    assert moves["prompts = true"][1] < moves[""][1]
    text = SPLIT.format(more="[migration]\nprompts = true").split("[[pool]]")[0]
    file.write_text(text + "[[pool]]\nreplicas = 4\n")
    with pytest.raises(SpecError, match="no pool has that role") as caught:
        read_fleet(file)
    assert caught.value.exit_code == 2
