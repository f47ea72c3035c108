"""A calibrated chip prices what was sampled as it was sampled, and what lies between in between."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from tongyun.chip.calibrated import Attending, Passing, measured
from tongyun.chip.curves import Ratios
from tongyun.cloud.engine.calibrate import passes, steps
from tongyun.cloud.engine.calibrate.bench import Bench
from tongyun.cloud.engine.calibrate.spec import Readings, chip_spec
from tongyun.model.graph import Kind, Operator, Precision, StepShape
from tongyun.model.kernels import TorchOps
from tongyun.model.steps import step
from tongyun.specs.samples import (
    AttentionSample,
    GroupedMatmulSample,
    MatmulSample,
    MemorySample,
    PassSample,
)
from tongyun.units import DType

MODEL = steps.synthetic(2)
SPARSE = steps.synthetic(2, sparse=True)
F32 = Precision.of("f32")


def attention(batch: int, queries: int, context: int, *, heads: int = 4) -> AttentionSample:
    """Seconds that no sum of parts has: two threads share what is large."""
    seconds = 1e-6 + 1e-8 * batch * queries * heads * (context + queries)
    return AttentionSample(
        dtype=DType.F32, batch=batch, queries=queries, context=context, heads=heads, kv_heads=2, head_dim=32,
        seconds=seconds / (2 if seconds > 2e-5 else 1),
    )  # fmt: skip


DECODES = [attention(b, 1, c, heads=h) for b, c, h in product((1, 4, 16), (15, 255), (4, 32))]
PROMPTS = [attention(1, q, c) for q, c in product((8, 128), (0, 512))]


def of(name: str, shape: StepShape, config: steps.ModelConfig = MODEL) -> Operator:
    return next(op for op in step(config, shape, precision=F32) if op.name == name)


def test_ratios_are_straight_in_logarithms_and_flat_beyond() -> None:
    ratios = Ratios.through([(1, 10, 1.0), (1, 1000, 4.0), (100, 10, 9.0), (100, 1000, 9.0)])
    assert ratios(1, 100) == pytest.approx(2.0)
    assert ratios(10, 10) == pytest.approx(3.0)
    assert ratios(10, 100) == pytest.approx(np.sqrt(18.0))
    assert ratios(0.01, 1e9) == pytest.approx(4.0) and ratios(1e9, 1e-9) == pytest.approx(9.0)
    assert ratios(1, np.array([10.0, 1000.0])).tolist() == pytest.approx([1.0, 4.0])


def test_decoding_costs_what_its_samples_say() -> None:
    attending = Attending.through(DECODES, np.inf)
    assert attending is not None
    for sample in DECODES:
        if sample.heads == MODEL.heads:
            op = of("attention_decode", StepShape.decoding(sample.batch, sample.context))
            assert attending(op, op.groups, 0.0) == pytest.approx(sample.seconds)


def test_prompts_cost_what_their_samples_say() -> None:
    attending = Attending.through(PROMPTS, np.inf)
    assert attending is not None
    for sample in PROMPTS:
        op = of("attention_prefill", StepShape.prefilling(sample.queries, sample.context))
        assert attending(op, sample.queries, 0.0) == pytest.approx(sample.seconds)


def test_a_pass_costs_what_its_samples_say() -> None:
    # Threads that are woken for the largest take longer than they save.
    samples = [
        PassSample(what="norm", rows=m, width=n, seconds=1e-6 + 1e-10 * m * n * (4 if m > 64 else 1))
        for m, n in product((1, 64, 256), (64, 1024))
    ]
    passing = Passing.through(samples)
    for sample in samples:
        assert passing(sample.rows, sample.width) == pytest.approx(sample.seconds)


def chip(*more: PassSample):  # type: ignore[no-untyped-def]
    products = [
        MatmulSample(dtype=DType.F32, m=m, n=n, k=64, seconds=1e-6) for m in (1, 512) for n in (4, 512)
    ]
    experts = [
        GroupedMatmulSample(dtype=DType.F32, m=8 * r, n=128, k=64, groups=8, seconds=1e-5) for r in (1, 64)
    ]
    return chip_spec(
        Readings(
            machine={
                "device": "cpu", "vendor": "nobody", "processor": "a CPU", "cores": 2, "engine_threads": 2,
                "memory_bytes": 8e9, "weights": "f32", "kv": "f32", "activations": "f32",
            },
            matmul=tuple(products),
            grouped_matmul=tuple(experts),
            memory=(MemorySample(footprint_bytes=2**30, bytes_per_s=1e10),),
            attention=tuple(DECODES),
            passes=more,
        )
    ).at()  # fmt: skip


def test_choosing_experts_and_adding_the_residual_are_in_the_price() -> None:
    samples = [PassSample(what="choice", rows=m, width=4, seconds=3e-6 * m) for m in (1, 16)]
    samples += [PassSample(what="sum", rows=m, width=64, seconds=5e-6 * m) for m in (1, 16)]
    bare, known = measured(chip()), measured(chip(*samples))
    assert bare is not None and known is not None
    shape = StepShape.decoding(16, 31)
    more = {
        op.name: float(known.work_s(op, DType.F32, 0.0) or 0.0)
        - float(bare.work_s(op, DType.F32, 0.0) or 0.0)
        for op in step(SPARSE, shape, precision=F32)
        if op.kind in (Kind.MATMUL, Kind.GROUPED_MATMUL)
    }
    assert more.pop("router") == pytest.approx(16 * 3e-6)
    assert more.pop("experts_down") == pytest.approx(16 * 5e-6)
    assert more and all(each == 0.0 for each in more.values())


def test_what_is_rotated_again_and_again_stays_in_its_numbers() -> None:
    bench = Bench(
        device=torch.device("cpu"),
        ops=TorchOps(),
        weight_type=DType.BF16,
        kv_type=DType.F32,
        activation_type=DType.F32,
    )
    probe = passes._rotate(bench, 2, 4, 2, 64)
    heads = probe.call.args[0]  # type: ignore[attr-defined]
    for _ in range(300):
        q, k, _ = probe.call()
        heads[:, :4], heads[:, 4:6] = q, k
    tiny = torch.finfo(torch.float32).tiny
    assert (heads[:, :6].abs() > 1e6 * tiny).all()
