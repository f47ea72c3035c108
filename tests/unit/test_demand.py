"""A plan for a demand: few chips, kept tails, and formulas that play agrees with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tongyun.cloud.workload import Arrival, Arrivals, Lengths, Process, Workload
from tongyun.codesign.demand import Demand, of_rate, of_trace, of_workload
from tongyun.codesign.plan import plan
from tongyun.codesign.played import play, play_users
from tongyun.codesign.space import Question
from tongyun.errors import Infeasible, InputError
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision
from tongyun.model.shard import Shard
from tongyun.specs import find_chip, find_model, find_price


def ask(rate_per_s: float = 4.0, **changes: object) -> Question:
    name = "Qwen/Qwen3-8B"
    given = {
        "model": ModelConfig.from_hf(find_model(name)[0], name=name),
        "chip": find_chip("h100"),
        "chips": 4,
        "isl": 1000,
        "osl": 100,
        "precision": Precision.of("bf16"),
        "ttft_s": 1.0,
        "tpot_s": 0.05,
        "price": find_price("h100"),
        "demand": of_rate(rate_per_s, 1000, 100),
    }
    return Question(**{**given, **changes})  # type: ignore[arg-type]


def test_a_small_demand_takes_one_chip_and_says_the_rest_is_idle() -> None:
    best = plan(ask(1.0)).best
    assert best is not None and best.meets
    assert best.plan.replicas * best.plan.shard.ranks == 1
    assert best.plan.idle_chips == 3


def test_more_demand_takes_no_fewer_chips() -> None:
    used = []
    for rate in (1.0, 20.0, 60.0):
        best = plan(ask(rate)).best
        assert best is not None
        used.append(4 - best.plan.idle_chips)
    assert used == sorted(used)


def test_too_much_demand_is_refused_with_the_reason() -> None:
    answer = plan(ask(100_000.0))
    assert answer.best is None
    assert answer.limit is not None and "requests/s" in answer.limit


def test_tails_are_in_order_and_within_the_limits() -> None:
    question = ask(10.0)
    best = plan(question).best
    assert best is not None and best.figures.tails is not None
    tails = best.figures.tails
    assert tails.ttft_p50_s <= tails.ttft_p90_s <= tails.ttft_p99_s <= 1.0
    assert best.figures.tpot_s <= tails.tpot_p99_s <= 0.05
    assert best.play_error is not None


def test_the_same_demand_has_the_same_answer() -> None:
    assert plan(ask()) == plan(ask())


def test_a_busier_group_waits_longer() -> None:
    best = plan(ask(10.0)).best
    assert best is not None
    lone = replace(best.plan, replicas=1)
    calm, busy = (play(ask(rate), of_rate(rate, 1000, 100), lone) for rate in (2.0, 12.0))
    assert busy.tails.ttft_p99_s > calm.tails.ttft_p99_s
    assert busy.tpot_s > calm.tpot_s


def test_users_of_a_full_chip_wait_for_each_other() -> None:
    question = ask(demand=None)
    one, many = (play_users(question, Shard(), users, 2048, 3) for users in (1, 32))
    assert many.ttft_s > one.ttft_s and many.tpot_s > one.tpot_s


def test_a_model_that_leaves_no_room_for_a_request_cannot_be_played() -> None:
    name = "meta-llama/Llama-3.1-70B"
    model = ModelConfig.from_hf(find_model(name)[0], name=name)
    with pytest.raises(Infeasible, match="no room"):
        play_users(ask(model=model, demand=None), Shard(), 1, 2048, 1)


def test_a_trace_gives_its_rate_and_spread() -> None:
    arrivals = [Arrival(float(i), 100 if i % 2 else 300, 50) for i in range(101)]
    demand = of_trace(arrivals, name="t")
    assert demand.rate_per_s == pytest.approx(1.0)
    assert demand.gap_variation == pytest.approx(0.0)
    assert demand.isl == 201 and demand.isl_variation == pytest.approx(0.5, rel=0.01)
    assert of_trace(arrivals, 5.0, name="t").rate_per_s == 5.0
    with pytest.raises(InputError, match="no rate"):
        of_trace(arrivals[:1], name="t")


def test_a_workload_gives_its_rate_and_a_closed_loop_needs_one() -> None:
    workload = Workload(
        arrivals=Arrivals(process=Process.GAMMA, rate_per_s=3.0, variation=2.0),
        prompt=Lengths.fixed(64),
        output=Lengths.fixed(32),
        requests=200,
    )
    demand = of_workload(workload)
    assert (demand.rate_per_s, demand.gap_variation, demand.isl, demand.osl) == (3.0, 2.0, 64, 32)
    closed = replace(workload, arrivals=Arrivals(process=Process.CLOSED, users=4))
    with pytest.raises(InputError, match="closed loop"):
        of_workload(closed)


def test_a_share_of_a_demand_comes_at_that_share_of_its_rate() -> None:
    demand = Demand(rate_per_s=8.0, isl=10, osl=10, gap_variation=3.0)
    times = np.asarray([arrival.time_s for arrival in demand.played(4000, 0.25)])
    assert len(times) / times[-1] == pytest.approx(2.0, rel=0.15)
    assert (np.diff(times) >= 0).all()


def test_a_rate_must_be_positive() -> None:
    with pytest.raises(InputError, match="rate must be positive|positive number"):
        of_rate(0.0, 1, 2)


def test_flags_of_a_demand_are_checked(tmp_path: Path) -> None:
    from tongyun.cli.plan import _demand

    none = {"isl": None, "osl": None, "rate": None, "workload": None, "trace": None}
    with pytest.raises(InputError, match="how long"):
        _demand(none)
    with pytest.raises(InputError, match="one of --workload and --trace"):
        _demand({**none, "workload": "chat", "isl": 5})
    assert _demand({**none, "isl": 5, "osl": 5}) is None
    found = _demand({**none, "workload": "chat", "rate": 2.0})
    assert found is not None and found.rate_per_s == 2.0 and found.isl > 1
