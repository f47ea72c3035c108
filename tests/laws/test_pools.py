"""Prefill and decode apart: the search against a plain loop, the figures against a played fleet."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tongyun.cloud.sched.router import LeastLoad
from tongyun.cloud.workload import Arrivals, Lengths, Process, Workload, sample
from tongyun.codesign.explain import explain
from tongyun.codesign.fleet import Fleet
from tongyun.codesign.places import Room, counts
from tongyun.codesign.plan import Answer, plan
from tongyun.codesign.pools import PoolPrices, hand_over_link, most_use_s
from tongyun.codesign.replicas import of_a_group, pools_of
from tongyun.codesign.space import BATCHES, CHUNKS, Question, cuts
from tongyun.codesign.steady import USABLE_MEMORY
from tongyun.errors import InputError
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision
from tongyun.model.shard import Shard
from tongyun.specs import find_chip, find_model


def ask(model: str = "Qwen/Qwen3-8B", chip: str = "h20", **changes: object) -> Question:
    given = {
        "model": ModelConfig.from_hf(find_model(model)[0], name=model),
        "chip": find_chip(chip),
        "chips": 6,
        "isl": 3000,
        "osl": 200,
        "precision": Precision.of("bf16"),
        "ttft_s": 2.0,
        "tpot_s": 0.03,
        "pools": "split",
    }
    return Question(**{**given, **changes})  # type: ignore[arg-type]


def rate(answer: Answer) -> float:
    return 0.0 if answer.best is None else answer.best.figures.tok_s_per_chip


def looped(question: Question) -> float:
    """Most tokens per second per chip within the limits, every pair of loads and division one by one."""
    chip, steps = question.at(), question.osl - 1
    prices = PoolPrices(question, chip, BATCHES, np.array(CHUNKS, dtype=float))
    room_bytes = USABLE_MEMORY * chip.memory_bytes
    domain, best = chip.scale_up.domain if chip.scale_up else 1, 0.0
    shards = cuts(question.model, chip, question.chips).legal
    first, second = [], []
    for shard in shards:
        pool = prices.prefill(shard)
        use = most_use_s(pool.step_s, question.ttft_s)
        for i in np.flatnonzero(prices.prefill_bytes(shard) <= room_bytes):
            carried = min(pool.requests_per_s[i] * use[i], shard.dp / pool.hand_over_s)
            first.append((shard, carried, pool.hand_over_s))
        pool = prices.decode(shard)
        for i in np.flatnonzero(prices.decode_bytes(shard) <= room_bytes):
            served = min(pool.requests_per_s[i], shard.dp / pool.hand_over_s)
            second.append((shard, served, pool.step_s[i], pool.hand_over_s))
    for given_chips in range(1, question.chips):
        rooms = (
            Room.of(given_chips, domain),
            Room.of(question.chips - given_chips, domain, behind=given_chips),
        )
        held = {shard: [room.fits(shard) for room in rooms] for shard in shards}
        for one, carried, hand_s in first:
            for other, served, step_s, their_s in second:
                if step_s + max(hand_s, their_s) / steps <= question.tpot_s:
                    requests = min(held[one][0] * carried, held[other][1] * served)
                    best = max(best, requests * question.osl / question.chips)
    return best


@pytest.mark.parametrize("changes", [{}, {"tpot_s": 0.012}, {"chips": 3, "isl": 600, "ttft_s": 0.4}])
def test_the_best_split_is_what_a_plain_loop_finds(changes: dict[str, object]) -> None:
    question = ask(**changes)  # type: ignore[arg-type]
    assert rate(plan(question)) == pytest.approx(looped(question), rel=1e-6)


@given(st.integers(2, 70), st.integers(1, 24), st.lists(st.tuples(st.integers(1, 40), st.integers(1, 4))))
@settings(deadline=None)
def test_places_are_counted_for_all_divisions_as_for_one(
    chips: int, domain: int, sizes: list[tuple[int, int]]
) -> None:
    shards = [Shard(tp=tp, pp=pp) for tp, pp in sizes]
    room = Room.of(chips, domain)
    given_chips = np.arange(1, chips)
    found = counts([room.place(shard) for shard in shards], chips - given_chips, domain, behind=given_chips)
    for row, before in enumerate(given_chips):
        left = Room.of(int(chips - before), domain, behind=int(before))
        assert found[row].tolist() == [left.fits(shard) for shard in shards]


@pytest.mark.parametrize(
    "question",
    [
        ask(),
        ask("Qwen/Qwen3-30B-A3B", "zhenwu-810e", chips=20),
        ask("deepseek-ai/DeepSeek-V3", "h200", chips=40, draft_tokens=1, acceptance=0.8),
    ],
    ids=["dense", "moe-on-ppu", "deepseek-drafting"],
)
def test_both_kinds_share_one_pareto(question: Question) -> None:
    apart, alone, both = (plan(replace(question, pools=pools)) for pools in ("split", "mixed", "both"))
    assert both.best is not None
    assert rate(both) >= max(rate(apart), rate(alone))
    assert both.evaluated == alone.evaluated + apart.evaluated
    for one in both.pareto:
        assert one.plan.chips + one.plan.idle_chips == question.chips
        assert bool(one.plan.idle_chips) == bool(one.plan.idle_reason)
        assert one.figures.ttft_s <= 2.0
        for other in (*apart.pareto, *alone.pareto):
            quicker = other.figures.tpot_s < one.figures.tpot_s * (1 - 1e-9)
            more = other.figures.tok_s_per_chip > one.figures.tok_s_per_chip * (1 + 1e-9)
            assert not (quicker and more)


def test_a_pair_gives_what_its_weaker_pool_carries() -> None:
    question = ask()
    best = plan(question).best
    assert best is not None and best.plan.prefill is not None
    first = best.plan.prefill
    group = best.plan.batch / best.plan.shard.dp / best.plan.shard.pp
    prices = PoolPrices(question, question.at(), np.array([group]), np.array([float(first.step_tokens)]))
    one, other = prices.prefill(first.shard), prices.decode(best.plan.shard)
    use = most_use_s(one.step_s, question.ttft_s)[0]
    least = min(first.replicas * use * one.requests_per_s[0], best.plan.replicas * other.requests_per_s[0])
    assert best.figures.tok_s_per_chip * question.chips == pytest.approx(least * question.osl, rel=1e-9)
    found = explain(question, best.plan)
    assert sum(found.tpot_s.values()) == pytest.approx(best.figures.tpot_s, rel=1e-9)
    assert [pool["role"] for pool in best.plan.pools] == ["prefill", "decode"]


def test_keys_and_values_go_over_the_domain_or_the_network() -> None:
    inside, outside = ask(chip="h200", chips=8), ask(chip="h200", chips=16)
    chip = inside.at()
    assert hand_over_link(inside, chip) is chip.scale_up
    assert hand_over_link(outside, chip) is chip.scale_out
    costs = [
        PoolPrices(question, chip, BATCHES, np.array(CHUNKS, dtype=float)).hand_over_s(Shard(tp=2))
        for question in (inside, outside)
    ]
    assert costs[0] < costs[1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"chips": 1}, "cannot hand keys and values over"),
        ({"ttft_s": 1e-3}, "ttft: no prefill replica computes a prompt in time"),
        ({"tpot_s": 1e-4}, "tpot: nearest is"),
        ({"model": "Qwen/Qwen3-235B-A22B", "chips": 4}, "memory: "),
    ],
)
def test_an_answer_of_no_pools_names_the_limit(changes: dict[str, object], says: str) -> None:
    answer = plan(ask(**changes))  # type: ignore[arg-type]
    assert answer.best is None and answer.limit is not None
    assert says in answer.limit


def test_pools_have_names() -> None:
    with pytest.raises(InputError, match="splitt"):
        ask(pools="splitt")


def test_a_played_fleet_feels_like_its_plan() -> None:
    """The production scheduler at four fifths of the plan's rate: nothing queues up, and tokens come as
    from a decode pool with the batch that carries this rate."""
    question = ask("Qwen/Qwen3-8B", "h200", chips=6, isl=2000, osl=200)
    answer = plan(question)
    offer = max(
        (offer for offer in answer.pareto if offer.meets and offer.plan.shard.pp == 1),
        key=lambda offer: offer.figures.tok_s_per_chip,
    )
    assert offer.plan.prefill is not None and offer.plan.prefill.shard.pp == 1
    requests_per_s = 0.8 * offer.figures.tok_s_per_chip * question.chips / question.osl
    arrivals = sample(
        Workload(
            arrivals=Arrivals(process=Process.POISSON, rate_per_s=requests_per_s),
            prompt=Lengths.fixed(question.isl),
            output=Lengths.fixed(question.osl),
            requests=3000,
        )
    )
    fleet = Fleet(question=question, pools=pools_of(of_a_group(offer.plan)))
    report = fleet.play(arrivals, LeastLoad(), chip=question.at()).report
    assert report.succeeded == 3000
    assert report.ttft_s is not None and report.tpot_s is not None
    assert report.ttft_s.p50 <= offer.figures.ttft_s
    assert report.tpot_s.p99 <= offer.figures.tpot_s
    prices = PoolPrices(question, question.at(), BATCHES, np.array([float(CHUNKS[-1])]))
    pool = prices.decode(offer.plan.shard)
    batch = np.interp(requests_per_s / offer.plan.replicas, pool.requests_per_s, BATCHES)
    expected_s = float(np.interp(batch, BATCHES, pool.step_s)) + pool.hand_over_s / (question.osl - 1)
    assert report.tpot_s.mean == pytest.approx(expected_s, rel=0.1)


@given(st.floats(1.0, 20.0))
@settings(max_examples=8, deadline=None)
def test_a_faster_network_serves_pools_no_less(factor: float) -> None:
    question = ask(chip="h200", chips=12)
    out = question.chip.scale_out
    assert out is not None
    band = out.bandwidth
    quick = replace(band, value=factor * band.value, low=factor * band.low, high=factor * band.high)
    better = replace(question, chip=replace(question.chip, scale_out=replace(out, bandwidth=quick)))
    assert rate(plan(better)) >= rate(plan(question)) * (1 - 1e-12)


def test_chips_beside_two_pools_serve_as_well() -> None:
    """Or why not is in words: what pools of whole replicas leave over takes replicas that do both."""
    question = ask("Qwen/Qwen3-32B", "h200", chips=15, tpot_s=0.04, pools="both")
    answer, apart = plan(question), plan(replace(question, pools="split"))
    filled = [offer.plan for offer in answer.pareto if offer.plan.prefill and offer.plan.others]
    assert filled
    for found in filled:
        assert found.chips + found.idle_chips == 15
        assert [role for role, _ in found.kinds][:3] == ["prefill", "decode", "mixed"]
        assert ("one pool alone would serve no more" in found.idle_reason) == (found.idle_chips > 0)
    assert rate(answer) >= rate(apart)
    with pytest.raises(InputError, match="several kinds"):
        pools_of(filled[0])
