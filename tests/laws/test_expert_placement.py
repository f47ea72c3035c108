"""Placing experts: nothing lost, nobody far above the mean, and a price that follows the busiest rank."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tongyun.chip.grouped import picked_rows, random_rows
from tongyun.cloud.sched.experts import balanced, in_order
from tongyun.cost import step_cost
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision, StepShape
from tongyun.model.shard import Shard
from tongyun.model.steps import weight_bytes
from tongyun.specs import find_chip, find_model


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], int, int]:
    """Loads of experts that fill the ranks, ranks, and copies beside them."""
    ranks, each = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    loads = draw(st.lists(st.floats(0.01, 100.0), min_size=ranks * each, max_size=ranks * each))
    return loads, ranks, ranks * draw(st.integers(0, 3))


@settings(deadline=None, max_examples=200)
@given(case=cases())
def test_a_placement_computes_every_token_once_and_no_rank_far_more_than_the_mean(
    case: tuple[list[float], int, int],
) -> None:
    loads, ranks, redundant = case
    where = balanced(loads, ranks, redundant)
    picks = where.picks(loads)
    assert picks.shape == (ranks, (len(loads) + redundant) // ranks)
    assert picks.sum() == pytest.approx(sum(loads))
    assert {expert for rank in where.ranks for expert in rank} == set(range(len(loads)))
    assert picks.sum(axis=1).max() <= sum(loads) / ranks + picks.max() + 1e-9


def test_copies_and_order_by_load_take_from_the_busiest() -> None:
    loads = (np.arange(1, 129, dtype=np.float64) ** -0.7).tolist()
    most = [
        where.picks(loads).sum(axis=1).max() / (sum(loads) / 16)
        for where in (
            in_order(128, 16),
            balanced(loads, 16),
            balanced(loads, 16, 16),
            balanced(loads, 16, 64),
        )
    ]
    assert most[0] > most[1] > most[2] > most[3] >= 1
    assert most[0] > 3
    assert most[3] < 1.05


def test_experts_that_do_not_fill_the_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="10 experts do not fill 4 ranks"):
        in_order(10, 4)


@settings(deadline=None, max_examples=50)
@given(tokens=st.integers(1, 20_000), picks=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=40))
def test_rows_are_those_picked(tokens: int, picks: list[float]) -> None:
    rows = picked_rows(tokens, picks)
    assert (rows >= 0).all()
    assert rows.mean() * len(picks) == pytest.approx(tokens * sum(picks), rel=1e-6)


def test_experts_picked_alike_have_the_rows_of_random_routing() -> None:
    tokens = np.array([1.0, 7.0, 300.0, 9000.0])
    assert (picked_rows(tokens, [8 / 128] * 8) == random_rows(tokens, 8, 128)).all()


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return ModelConfig.from_hf(find_model("Qwen/Qwen3-235B-A22B")[0], name="Qwen3-235B-A22B")


def test_a_crowded_rank_costs_more_and_copies_take_memory(model: ModelConfig) -> None:
    chip, fp8 = find_chip("h100").at(), Precision.of("fp8")
    even = Shard(tp=4, ep=16, dp=4)
    alike = replace(even, expert_picks=(8 / 128,) * 8)
    crowded = replace(even, expert_picks=(0.4, *(8 / 128,) * 7))
    copied = replace(even, expert_picks=(8 / 160,) * 10)
    for shape in (StepShape.decoding(64, 2000), StepShape.prefilling(2048)):
        seconds = [
            float(step_cost(model, shape, chip, shard, fp8).seconds) for shard in (even, alike, crowded)
        ]
        assert seconds[0] == pytest.approx(seconds[1], rel=1e-9)
        assert seconds[2] > 1.02 * seconds[1]
    more = weight_bytes(model, copied, fp8) - weight_bytes(model, even, fp8)
    assert more == 2 * 3 * 4096 * 1536 * 94
