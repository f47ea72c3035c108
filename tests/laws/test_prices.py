"""Every price: nothing beats its roofline, more hardware never slows, more work never speeds up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tongyun.chip.collective import all_reduce_s, gather_s
from tongyun.chip.curves import Curve, Linear
from tongyun.chip.rates import rate_dtype
from tongyun.chip.roofline import steps_s, work_s
from tongyun.cost import step_cost, usd_per_mtoken
from tongyun.errors import Infeasible
from tongyun.model.config import ModelConfig
from tongyun.model.graph import COLLECTIVES, Precision, StepShape
from tongyun.model.shard import Shard
from tongyun.model.steps import step
from tongyun.specs import Calibration, Chip, find_chip, find_model
from tongyun.specs.samples import (
    AttentionSample,
    GroupedMatmulSample,
    MatmulSample,
    MemorySample,
    OverheadSample,
)
from tongyun.units import DType, Source

CONFIGS = {
    name: ModelConfig.from_hf(find_model(name)[0], name=name)
    for name in ("Qwen/Qwen3-8B", "Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V3", "openai/gpt-oss-20b")
}
NAMES = sorted(CONFIGS)
CHIPS = {name: find_chip(name).at() for name in ("a100", "h20", "zhenwu-810e", "mi300x", "tpu-v5p")}
CUTS = (
    Shard(),
    Shard(tp=4),
    Shard(tp=2, pp=2),
    Shard(ep=4, dp=4),
    Shard(tp=2, ep=16, dp=8),
    Shard(tp=4, ep=2),
)

configs = st.sampled_from(NAMES).map(CONFIGS.__getitem__)
chips = st.sampled_from(sorted(CHIPS)).map(CHIPS.__getitem__)
cuts = st.sampled_from(CUTS)
precisions = st.sampled_from(["bf16", "fp8", "int4"]).map(Precision.of)
shapes = st.one_of(
    st.builds(StepShape.decoding, st.integers(1, 512), st.integers(0, 20_000)),
    st.builds(StepShape.prefilling, st.integers(1, 8192), st.integers(0, 8192)),
)


def faster(chip: Chip, factor: float, what: str) -> Chip:
    """A chip with one thing improved by a factor."""
    if what == "bandwidth":
        return replace(chip, memory_bytes_per_s=factor * chip.memory_bytes_per_s)
    if what == "flops":
        return replace(chip, peak_flops_per_s={d: factor * p for d, p in chip.peak_flops_per_s.items()})
    if what == "overhead":
        return replace(
            chip, kernel_launch_s=chip.kernel_launch_s / factor, step_host_s=chip.step_host_s / factor
        )
    assert chip.scale_up is not None and chip.scale_out is not None
    links = (
        replace(link, bytes_per_s=factor * link.bytes_per_s, latency_s=link.latency_s / factor)
        for link in (chip.scale_up, chip.scale_out)
    )
    up, out = links
    return replace(chip, scale_up=up, scale_out=out)


def seconds(config: ModelConfig, shape: StepShape, chip: Chip, cut: Shard, precision: Precision) -> float:
    try:
        return float(step_cost(config, shape, chip, cut, precision).seconds)
    except Infeasible:
        return float("nan")


@given(configs, shapes, chips, cuts, precisions, st.floats(1.0, 10.0))
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("what", ["bandwidth", "flops", "overhead", "links"])
def test_a_better_chip_is_never_slower(
    what: str,
    config: ModelConfig,
    shape: StepShape,
    chip: Chip,
    cut: Shard,
    precision: Precision,
    factor: float,
) -> None:
    if chip.scale_up is None or chip.scale_out is None:
        return
    before = seconds(config, shape, chip, cut, precision)
    after = seconds(config, shape, faster(chip, factor, what), cut, precision)
    assert not after > before


@given(configs, chips, cuts, precisions, st.integers(1, 400), st.integers(0, 9000), st.integers(1, 100))
@settings(max_examples=100, deadline=None)
def test_more_work_never_takes_less(
    config: ModelConfig, chip: Chip, cut: Shard, precision: Precision, batch: int, context: int, more: int
) -> None:
    shape = StepShape.decoding(
        np.array([batch, batch + more, batch]), np.array([context, context, context + more])
    )
    try:
        cost = step_cost(config, shape, chip, cut, precision)
    except Infeasible:
        return
    for values in (np.asarray(cost.seconds), np.asarray(cost.joules)):
        assert values[1] >= values[0] * (1 - 1e-12)
        assert values[2] >= values[0] * (1 - 1e-12)


@given(configs, shapes, chips, precisions)
@settings(max_examples=100, deadline=None)
def test_nothing_is_faster_than_its_roofline(
    config: ModelConfig, shape: StepShape, chip: Chip, precision: Precision
) -> None:
    operators = step(config, shape, Shard(), precision)
    whole = steps_s(operators, chip).seconds
    products = sum(
        op.repeat * op.flops / chip.peak_flops_per_s[rate_dtype(chip, op.compute)] for op in operators
    )
    moved = sum(op.repeat * op.moved_bytes for op in operators) / chip.memory_bytes_per_s
    assert whole >= max(float(products), float(moved))
    # … and one at a time.
    for op in operators:
        least_s = op.moved_bytes / chip.memory_bytes_per_s
        assert op.kind in COLLECTIVES or work_s(op, chip, 1e9) >= least_s


@given(st.floats(1, 1e9), st.integers(1, 64))
@settings(deadline=None)
def test_collectives_move_at_least_what_must_cross(payload: float, ranks: int) -> None:
    link = CHIPS["h20"].scale_up
    assert link is not None
    least = payload * (ranks - 1) / ranks / link.bytes_per_s
    assert gather_s(payload, ranks, link) >= least
    assert all_reduce_s(payload, ranks, link) == pytest.approx(2 * gather_s(payload, ranks, link))
    assert all_reduce_s(payload, 1, link) == 0


def test_a_chip_without_links_cannot_be_cut() -> None:
    alone = replace(CHIPS["a100"], scale_up=None, scale_out=None)
    with pytest.raises(Infeasible, match="no scale-"):
        step_cost(CONFIGS["Qwen/Qwen3-8B"], StepShape.decoding(1, 1), alone, Shard(tp=2))


def test_a_missing_type_is_taken_in_the_next_wider_one() -> None:
    assert rate_dtype(CHIPS["a100"], DType.FP8) is DType.BF16
    assert rate_dtype(CHIPS["h20"], DType.FP8) is DType.FP8
    assert rate_dtype(CHIPS["a100"], DType.INT8) is DType.INT8


def test_a_price_names_what_it_rests_on() -> None:
    cost = step_cost(CONFIGS["Qwen/Qwen3-8B"], StepShape.decoding(1, 1), CHIPS["a100"])
    assert Source.ANALYTIC in cost.sources
    assert {Source.VENDOR, Source.ASSUMED} <= cost.sources


def test_dollars_of_a_million_tokens() -> None:
    # 8 chips at 2 $/h and 1000 tokens/s: 3.6 M tokens an hour for 16 $.
    assert usd_per_mtoken(1000.0, 8, 2.0) == pytest.approx(16 / 3.6)


# ── calibrated ───────────────────────────────────────────────────────────────────────

times = st.lists(st.tuples(st.integers(1, 4096), st.floats(1e-6, 1e2)), min_size=1, max_size=8)


@given(times, st.floats(0.5, 1e5), st.floats(1.0, 10.0))
@settings(deadline=None)
def test_measured_times_never_make_more_work_quicker(
    points: list[tuple[int, float]], rows: float, factor: float
) -> None:
    curve = Curve.through(points)
    assert curve(factor * rows) >= curve(rows) * (1 - 1e-9)
    # Beyond the last sample time grows in proportion, never slower.
    last = max(x for x, _ in points)
    assert curve(last * factor) == pytest.approx(float(curve(last)) * factor)


@given(st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=3, max_size=9))
@settings(deadline=None)
def test_no_part_of_a_fit_is_negative(rows: list[list[float]]) -> None:
    fitted = Linear.fit([tuple(row) for row in rows], [1 + sum(row) for row in rows])
    assert min(fitted.coefficients) >= 0


def calibrated(cache_bytes: int = 10_000_000) -> Chip:
    """A machine of exactly 1 TFLOPS, 10 GB/s beyond a cache and 100 within; 16 rows hide most of that."""
    products = tuple(
        MatmulSample(dtype=DType.F32, m=m, n=n, k=n, seconds=2 * m * n * n / 1e12)
        for m in (1, 16, 256)
        for n in (64, 1024)
    )
    return replace(
        CHIPS["a100"],
        name="calibrated",
        peak_flops_per_s={DType.F32: 1e12},
        kernel_launch_s=0.0,
        step_host_s=0.0,
        calibration=Calibration(
            when="now",
            tool="test",
            machine={},
            matmul=products,
            grouped_matmul=tuple(
                GroupedMatmulSample(
                    dtype=DType.F32, m=8 * r, n=64, k=64, groups=8, seconds=8 * r * 64 * 64 * 2 / 1e11
                )
                for r in (1, 64)
            ),
            memory=(
                MemorySample(footprint_bytes=cache_bytes, bytes_per_s=1e11),
                MemorySample(footprint_bytes=cache_bytes + 1, bytes_per_s=1e10),
                MemorySample(footprint_bytes=cache_bytes, rows=16, bytes_per_s=2e10),
                MemorySample(footprint_bytes=cache_bytes + 1, rows=16, bytes_per_s=1.25e10),
            ),
            attention=tuple(
                AttentionSample(
                    dtype=DType.F32,
                    batch=1,
                    queries=q,
                    context=c,
                    heads=4,
                    kv_heads=4,
                    head_dim=64,
                    seconds=4 * 4 * 64 * (q * c + q * (q + 1) / 2) / (5e10 if q == 1 else 5e11),
                )
                for q, c in ((1, 10), (1, 1000), (128, 0))
            ),
            overhead=(OverheadSample(what="sequence", count=10, seconds=1e-3),),
        ),
    )


def test_a_calibrated_chip_gives_back_what_was_measured() -> None:
    chip, f32 = calibrated(), Precision.of("f32")
    config = CONFIGS["Qwen/Qwen3-30B-A3B"]
    operators = {op.name: op for op in step(config, StepShape.prefilling(100_000), Shard(), f32)}
    for name, rate in (("qkv", 1e12), ("experts_up", 1e11), ("attention_prefill", 5e11)):
        op = operators[name]
        assert work_s(op, chip, 1e5) == pytest.approx(float(op.flops) / rate, rel=1e-6), name
    one = {op.name: op for op in step(config, StepShape.decoding(1, 99), Shard(), f32)}
    attend = one["attention_decode"]
    assert work_s(attend, chip, 1e5) == pytest.approx(float(attend.flops) / 5e10, rel=1e-6)


@pytest.mark.parametrize(("rows", "waits"), [(1, 9e-11), (4, 6e-11), (16, 3e-11), (64, 3e-11)])
def test_weights_beyond_the_caches_are_waited_for_as_long_as_products_of_so_many_rows_were(
    rows: int, waits: float
) -> None:
    chip, f32 = calibrated(), Precision.of("f32")
    operators = step(CONFIGS["Qwen/Qwen3-8B"], StepShape.decoding(rows, 1), Shard(), f32)
    qkv = next(op for op in operators if op.name == "qkv")
    near, far = work_s(qkv, chip, 1e5), work_s(qkv, chip, 1e9)
    assert near == pytest.approx(float(qkv.flops) / 1e12, rel=1e-6)
    assert far - near == pytest.approx(waits * float(qkv.weight_bytes), rel=1e-6)


def test_weights_that_no_cache_held_when_they_were_sampled_are_waited_for_no_longer() -> None:
    chip, f32 = calibrated(cache_bytes=1_000_000), Precision.of("f32")
    operators = step(CONFIGS["Qwen/Qwen3-8B"], StepShape.decoding(1, 1), Shard(), f32)
    qkv = next(op for op in operators if op.name == "qkv")
    assert work_s(qkv, chip, 1e9) == pytest.approx(float(qkv.flops) / 1e12, rel=1e-6)


def test_each_sequence_adds_its_overhead() -> None:
    chip, f32 = calibrated(), Precision.of("f32")
    config = CONFIGS["Qwen/Qwen3-8B"]
    shape = StepShape.ragged([(1, 5)] * 7)
    bare = steps_s(step(config, shape, Shard(), f32), chip).seconds
    assert step_cost(config, shape, chip, Shard(), f32).seconds - bare == pytest.approx(7e-4)
