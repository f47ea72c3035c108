"""Layers priced once are steps priced whole; routing conserves choices; borders cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tongyun.chip.grouped import random_rows
from tongyun.chip.roofline import parts_s
from tongyun.cost import StepPrices, step_cost
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Kind, Operator, Precision, StepShape
from tongyun.model.shard import Shard, broken_rule
from tongyun.model.steps import layer_counts, layer_operators, slice_of, step, weight_bytes
from tongyun.specs import Chip, find_chip, find_model

NAMES = ("Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V3", "openai/gpt-oss-20b")
CONFIGS = {name: ModelConfig.from_hf(find_model(name)[0], name=name) for name in NAMES}
CUTS = (Shard(), Shard(tp=4), Shard(pp=2), Shard(tp=2, pp=3), Shard(pp=4, ep=4, dp=4), Shard(tp=2, ep=4, dp=2))
CHIPS = {name: find_chip(name).at() for name in ("h100", "a100", "zhenwu-810e", "mi300x")}

configs = st.sampled_from(NAMES).map(CONFIGS.__getitem__)
cuts = st.sampled_from(CUTS)
chips = st.sampled_from(sorted(CHIPS)).map(CHIPS.__getitem__)
shapes = st.one_of(
    st.builds(StepShape.decoding, st.integers(1, 512), st.integers(0, 20_000)),
    st.builds(StepShape.prefilling, st.integers(2, 8192), st.integers(0, 8192)),
)
precisions = st.sampled_from(["bf16", "fp8", "fp8_block", "int4"]).map(Precision.of)


@given(configs, shapes, chips, cuts, precisions)
@settings(max_examples=60, deadline=None)
def test_layers_make_up_the_step(
    config: ModelConfig, shape: StepShape, chip: Chip, cut: Shard, precision: Precision
) -> None:
    if broken_rule(config, cut):
        return
    prices = StepPrices(config, shape, chip, precision)
    for stage in range(cut.pp):
        whole = step_cost(config, shape, chip, cut, precision, stage=stage)
        layered = prices.at(cut, stage)
        assert float(layered.seconds) == pytest.approx(float(whole.seconds), rel=1e-12)
        assert float(layered.joules) == pytest.approx(float(whole.joules), rel=1e-12)


@given(configs, cuts, precisions)
@settings(max_examples=60, deadline=None)
def test_layers_hold_the_weights_of_the_step(config: ModelConfig, cut: Shard, precision: Precision) -> None:
    if broken_rule(config, cut):
        return
    shape = StepShape.prefilling(1)
    for stage in range(cut.pp):
        whole = sum(op.resident_bytes for op in step(config, shape, cut, precision, stage=stage))
        assert weight_bytes(config, cut, precision, stage=stage) == pytest.approx(whole, rel=1e-12)
        kinds = layer_operators(config, shape, cut, precision)
        counts = layer_counts(slice_of(config, cut, stage))
        names = {op.name for kind, ops in kinds.items() if counts[kind] for op in ops}
        assert names == {op.name for op in step(config, shape, cut, precision, stage=stage)}


@given(
    st.integers(1, 100_000), st.integers(1, 5000), st.sampled_from([(8, 128), (4, 32), (8, 256), (1, 16), (2, 2)])
)
@settings(max_examples=60, deadline=None)
def test_random_routing_conserves_choices_and_grows(tokens: int, more: int, routing: tuple[int, int]) -> None:
    chosen, experts = routing
    rows, fuller = random_rows(np.array([tokens, tokens + more]), chosen, experts)
    assert rows.mean() * experts == pytest.approx(tokens * chosen, rel=1e-9)
    assert (rows >= 0).all()
    assert rows.max() <= tokens * (1 + 1e-9)
    assert (fuller >= rows * (1 - 1e-9)).all()


def test_random_routing_touches_as_many_experts_as_expected() -> None:
    for tokens in (1, 3, 17, 64):
        touched = np.minimum(random_rows(tokens, 8, 128), 1.0).mean()
        assert touched == pytest.approx(1 - (1 - 8 / 128) ** tokens, abs=0.03)


@given(configs, chips, st.integers(1, 300), st.integers(0, 5000))
@settings(max_examples=30, deadline=None)
def test_a_grid_costs_what_its_points_cost(config: ModelConfig, chip: Chip, batch: int, context: int) -> None:
    batches = np.arange(1.0, 101.0) * batch
    grid = step_cost(config, StepShape.decoding(batches, context), chip).seconds
    for i in (0, 50, 99):
        alone = step_cost(config, StepShape.decoding(float(batches[i]), context), chip).seconds
        assert float(np.asarray(grid)[i]) == pytest.approx(float(alone), rel=1e-12)


@pytest.mark.parametrize("kind", [Kind.ALL_REDUCE, Kind.ALL_GATHER, Kind.ALL_TO_ALL])
def test_a_domain_border_costs(kind: Kind) -> None:
    chip = CHIPS["h100"]
    assert chip.scale_up is not None

    def seconds(ranks: int, domain: int) -> float:
        assert chip.scale_up is not None
        wide = replace(chip, scale_up=replace(chip.scale_up, domain=domain))
        op = Operator(name="x", kind=kind, ranks=ranks, payload_bytes=4e6)
        return float(sum(parts_s(op, wide, 0.0)))

    assert seconds(8, 8) == pytest.approx(seconds(8, 16))
    assert seconds(16, 8) > seconds(16, 16)
    assert seconds(32, 8) > seconds(16, 8)
