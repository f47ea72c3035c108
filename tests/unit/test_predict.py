"""Predicting a served load: the same every time, and never better on a slower machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tongyun.cloud.sched.scheduler import SchedulerConfig
from tongyun.cloud.workload import Arrival, Arrivals, Lengths, Process, Workload, sample
from tongyun.codesign.fidelity import compare
from tongyun.codesign.predict import Deployment, Serving
from tongyun.errors import InputError
from tongyun.model.config import ModelConfig
from tongyun.specs import Calibration, find_chip
from tongyun.specs.samples import (
    AttentionSample,
    MatmulSample,
    MemorySample,
    OverheadSample,
    ServedSample,
)
from tongyun.units import DType

CONFIG = ModelConfig(
    name="small", family="qwen3", layers=4, hidden=128, heads=4, kv_heads=2, head_dim=32, intermediate=256,
    vocab=512, max_positions=512, rope_theta=1e4, norm_eps=1e-6, tied=True, qk_norm=True,
)  # fmt: skip
LIMITS = SchedulerConfig(blocks=400, max_context_tokens=512, max_sequences=16, max_step_tokens=128)


def deployment(
    slowness: float = 1.0, *, token_s: float = 5e-5, way_s: float = 2e-3, **overheads: float
) -> Deployment:
    """A machine of 100 GFLOPS, all `slowness` times slower; a way is half as long again with 16 streams."""
    extra = {"sequence": 1e-5, "prompt_token": 1e-6} | overheads
    attention = [(1, 1, 63), (8, 1, 255), (1, 64, 0), (1, 128, 128)]
    calibration = Calibration(
        when="now",
        tool="test",
        machine={"weights": "bf16", "activations": "f32", "kv": "f32"},
        matmul=tuple(
            MatmulSample(dtype=DType.BF16, m=m, n=n, k=n, seconds=slowness * 2 * m * n * n / 1e11)
            for m in (1, 16, 256)
            for n in (64, 1024)
        ),
        memory=(MemorySample(footprint_bytes=2**20, bytes_per_s=1e10 / slowness),),
        attention=tuple(
            AttentionSample(
                dtype=DType.F32, batch=b, queries=q, context=c, heads=4, kv_heads=2, head_dim=32,
                seconds=slowness * 4 * 4 * 32 * b * (q * c + q * q / 2) / 1e10,
            )
            for b, q, c in attention
        ),
        overhead=tuple(OverheadSample(what=k, count=1, seconds=slowness * v) for k, v in extra.items()),
        served=tuple(
            ServedSample(streams=n, step_s=slowness * n * token_s, way_s=slowness * longer * way_s)
            for n, longer in ((1, 1.0), (16, 1.5))
        ),
    )  # fmt: skip
    chip = replace(
        find_chip("h200").at(),
        name="local",
        kernel_launch_s=slowness * 5e-6,
        step_host_s=slowness * 1e-4,
        peak_flops_per_s={DType.BF16: 1e11 / slowness, DType.F32: 1e11 / slowness},
        calibration=calibration,
    )
    return Deployment(config=CONFIG, chip=chip, limits=LIMITS)


def poisson(rate: float, count: int = 40, seed: int = 0) -> list[Arrival]:
    arrivals = Arrivals(process=Process.POISSON, rate_per_s=rate)
    prompt, output = Lengths.fixed(64), Lengths.fixed(32)
    return sample(Workload(arrivals=arrivals, prompt=prompt, output=output, requests=count, seed=seed))


def test_the_same_load_is_predicted_the_same() -> None:
    first, second = (deployment().predict(poisson(20.0)) for _ in range(2))
    assert first == second
    assert first.report.succeeded == 40
    assert all(record.output_tokens == 32 for record in first.records)


def test_what_surrounds_the_engine_is_in_the_time_to_the_first_token() -> None:
    with_it = deployment().predict([Arrival(0.0, 64, 2)]).report.ttft_s
    without = deployment(way_s=0.0, prompt_token=0.0).predict([Arrival(0.0, 64, 2)]).report.ttft_s
    assert with_it is not None and without is not None
    way = Serving.of(deployment().chip).way_s(64)
    assert way == pytest.approx(2e-3 + 64e-6)
    assert with_it.p50 - without.p50 == pytest.approx(way)


def test_a_first_token_that_leaves_with_many_others_comes_later() -> None:
    burst = [Arrival(0.0, 8, 2)] * 16
    made = deployment(prompt_token=0.0)
    with_it, without = made.predict(burst).report.ttft_s, deployment(way_s=0.0).predict(burst).report.ttft_s
    assert with_it is not None and without is not None
    assert Serving.of(made.chip).way_s(8, 16) == pytest.approx(3e-3)
    assert with_it.p50 - without.p50 == pytest.approx(3e-3, rel=0.01)


def test_streaming_slows_steps_by_the_tokens_of_the_one_before() -> None:
    burst = [Arrival(0.0, 64, 32)] * 8
    slow, quick = (deployment(token_s=each).predict(burst).report.tpot_s for each in (1e-3, 0.0))
    assert slow is not None and quick is not None
    assert slow.p50 - quick.p50 == pytest.approx(8e-3, rel=0.15)


@pytest.mark.parametrize("slowness", [1.0, 1.3, 2.0, 10.0])
@pytest.mark.parametrize("rate", [1.0, 20.0, 1000.0])
def test_a_slower_machine_is_never_predicted_to_do_better(slowness: float, rate: float) -> None:
    usual, slow = (deployment(s).predict(poisson(rate)).report for s in (1.0, slowness))
    for name in ("ttft_s", "tpot_s", "latency_s"):
        ours, theirs = getattr(usual, name), getattr(slow, name)
        assert theirs.mean >= ours.mean * (1 - 1e-9), name
        assert theirs.p50 >= ours.p50 * (1 - 1e-9), name
    assert slow.output_tokens_per_s <= usual.output_tokens_per_s * (1 + 1e-9)
    assert deployment(slowness).capacity_per_s(64, 32) <= deployment().capacity_per_s(64, 32) * (1 + 1e-9)


def test_a_load_at_capacity_is_served_at_capacity() -> None:
    made = deployment()
    capacity = made.capacity_per_s(64, 32)
    report = made.predict(poisson(3 * capacity, count=300)).report
    assert report.requests_per_s == pytest.approx(capacity, rel=0.1)
    light = made.predict(poisson(0.3 * capacity, count=300)).report
    assert light.requests_per_s == pytest.approx(0.3 * capacity, rel=0.15)


def test_an_empty_load_and_an_uncalibrated_chip_are_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        deployment().predict([])
    bare = Deployment(config=CONFIG, chip=find_chip("h200").at(), limits=LIMITS)
    with pytest.raises(InputError, match="not calibrated"):
        bare.predict(poisson(1.0))


def test_a_comparison_tells_the_error_against_what_was_measured() -> None:
    fast, slow = (deployment(s).predict(poisson(5.0)).report for s in (1.0, 2.0))
    rows = {row.name: row for row in compare(slow, fast)}
    assert rows["TPOT p50"].error > 0.5
    assert {"TTFT p50", "TTFT p99", "TPOT p50", "throughput"} <= set(rows)
    assert all(row.error == 0 for row in compare(fast, fast))
