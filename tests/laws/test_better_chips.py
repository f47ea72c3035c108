"""More bandwidth, more links or more FLOPS are never slower: for each plan, and for the best of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tongyun.codesign.plan import plan
from tongyun.codesign.pools import PoolPrices
from tongyun.codesign.space import Question, cuts
from tongyun.codesign.steady import steady
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision
from tongyun.specs import ChipSpec, Figure, find_chip, find_model

LEEWAY = 1 + 1e-9
MODELS = ("Qwen/Qwen3-8B", "Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V3")


def more(figure: Figure, factor: float) -> Figure:
    return replace(figure, value=factor * figure.value, low=factor * figure.low, high=factor * figure.high)


def flops(spec: ChipSpec, factor: float) -> ChipSpec:
    peak = {dtype: more(figure, factor) for dtype, figure in spec.matmul.peak.items()}
    return replace(spec, matmul=replace(spec.matmul, peak=peak))


def memory(spec: ChipSpec, factor: float) -> ChipSpec:
    return replace(spec, memory=replace(spec.memory, bandwidth=more(spec.memory.bandwidth, factor)))


def link(spec: ChipSpec, factor: float) -> ChipSpec:
    """Wider links in the domain."""
    assert spec.scale_up is not None
    return replace(spec, scale_up=replace(spec.scale_up, bandwidth=more(spec.scale_up.bandwidth, factor)))


def ports(spec: ChipSpec, factor: float) -> ChipSpec:
    """More links as wide as those there are: a whole number of times as many."""
    up, times = link(spec, round(factor)).scale_up, round(factor)
    assert up is not None
    return replace(spec, scale_up=up if up.ports is None else replace(up, ports=more(up.ports, times)))


def network(spec: ChipSpec, factor: float) -> ChipSpec:
    assert spec.scale_out is not None
    return replace(spec, scale_out=replace(spec.scale_out, bandwidth=more(spec.scale_out.bandwidth, factor)))


WAYS: tuple[Callable[[ChipSpec, float], ChipSpec], ...] = (flops, memory, link, ports, network)


def ask(model: str, chip: str, **changes: object) -> Question:
    given = {
        "model": ModelConfig.from_hf(find_model(model)[0], name=model),
        "chip": find_chip(chip),
        "chips": 32,
        "isl": 2000,
        "osl": 300,
        "precision": Precision.of("bf16"),
    }
    return Question(**{**given, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@given(
    model=st.sampled_from(MODELS),
    chip=st.sampled_from(["h20", "h200", "zhenwu-810e", "mi300x", "tpu-v5p"]),
    factor=st.floats(1.0, 4.0),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_no_plan_is_slower_on_a_better_chip(
    way: Callable[[ChipSpec, float], ChipSpec], model: str, chip: str, factor: float, data: st.DataObject
) -> None:
    question = ask(model, chip)
    if way is network and question.chip.scale_out is None:
        return
    better = replace(question, chip=way(question.chip, factor))
    shard = data.draw(st.sampled_from(cuts(question.model, question.at(), 32).legal))
    batch, budget = np.array([1.0, 20.0, 300.0]), np.array([2048.0, 4096.0, 8192.0])
    before, after = (steady(q, q.at(), shard, batch, budget) for q in (question, better))
    assert (after.ttft_s <= before.ttft_s * LEEWAY).all()
    assert (after.tpot_s <= before.tpot_s * LEEWAY).all()
    assert (after.tokens_per_s * LEEWAY >= before.tokens_per_s).all()
    for task in ("prefill", "decode"):
        slow, quick = (getattr(PoolPrices(q, q.at(), batch, budget), task)(shard) for q in (question, better))
        assert (quick.step_s <= slow.step_s * LEEWAY).all()
        assert (quick.requests_per_s * LEEWAY >= slow.requests_per_s).all()
        assert quick.hand_over_s <= slow.hand_over_s * LEEWAY


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@given(factor=st.floats(1.0, 4.0), pools=st.sampled_from(["mixed", "both"]))
@settings(max_examples=3, deadline=None)
def test_the_best_serves_no_less_on_a_better_chip(
    way: Callable[[ChipSpec, float], ChipSpec], factor: float, pools: str
) -> None:
    question = ask("Qwen/Qwen3-30B-A3B", "zhenwu-810e", chips=20, ttft_s=2.0, tpot_s=0.05, pools=pools)
    rates = [
        answer.best.figures.tok_s_per_chip if answer.best else 0.0
        for answer in (plan(question), plan(replace(question, chip=way(question.chip, factor))))
    ]
    assert rates[1] * LEEWAY >= rates[0]
