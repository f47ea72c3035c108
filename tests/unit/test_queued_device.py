"""What a step takes on a device with a queue: the host's time, the device's, and captured steps."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from tongyun.chip.calibrated import engine_precision, measured
from tongyun.chip.roofline import LAST, parts_s, steps_s, streamed_bytes
from tongyun.cli.explained import as_json, tables
from tongyun.cloud.engine.calibrate import steps
from tongyun.cloud.engine.calibrate.hosts import hosts
from tongyun.cloud.engine.calibrate.overheads import overheads
from tongyun.cloud.engine.calibrate.spec import Readings, chip_spec
from tongyun.cloud.engine.calibrate.steps import StepSample
from tongyun.cloud.engine.torch_executor import WARM_PROMPTS, TorchExecutor
from tongyun.codesign import page
from tongyun.codesign.explain import explain
from tongyun.codesign.plan import Plan
from tongyun.codesign.space import Question
from tongyun.codesign.steady import load_at, steady
from tongyun.cost import step_cost
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Kind, Operator, StepShape
from tongyun.model.kernels.device import DeviceOps
from tongyun.model.paged import PagedCache
from tongyun.model.shard import Shard
from tongyun.model.steps import step
from tongyun.model.weights import random_model
from tongyun.report import quantity
from tongyun.specs import Chip, ChipSpec
from tongyun.specs.samples import (
    AttentionSample,
    GroupedMatmulSample,
    MatmulSample,
    MemorySample,
    OverheadSample,
    PassSample,
)
from tongyun.units import DType

MACHINE = {
    "device": "cuda",
    "vendor": "NVIDIA",
    "processor": "a GPU",
    "cores": 8,
    "engine_threads": 1,
    "memory_bytes": 8e10,
    "weights": "bf16",
    "kv": "bf16",
    "activations": "bf16",
}
HOSTS = {"matmul": 1e-5, "experts": 1e-4, "decode": 5e-5, "prompt": 7e-5, "norm": 8e-6, "rotate": 2e-5}
DENSE, SPARSE = steps.synthetic(4), steps.synthetic(4, sparse=True)
DECODING = StepShape.ragged([(1, 100)] * 4)
MIXED = StepShape.ragged([(1, 100)] * 4 + [(32, 0)] * 3)


def attention(queries: int, context: int, seconds: float) -> AttentionSample:
    return AttentionSample(
        dtype=DType.BF16, batch=1, queries=queries, context=context, heads=4, kv_heads=2, head_dim=32,
        seconds=seconds,
    )  # fmt: skip


def gpu(*, replays: bool = True, device_s: float = 1e-6, **more: float) -> Chip:
    return spec_of(replays=replays, device_s=device_s, **more).at()


def spec_of(*, replays: bool = True, device_s: float = 1e-6, **more: float) -> ChipSpec:
    """A calibrated GPU whose every call takes the device about `device_s`."""
    overhead = {f"host_{kind}": s for kind, s in HOSTS.items()} | more
    readings = Readings(
        machine=MACHINE | ({"replays": True} if replays else {}),
        matmul=tuple(
            MatmulSample(dtype=DType.BF16, m=m, n=n, k=64, seconds=device_s)
            for m in (1, 512)
            for n in (64, 4096)
        ),
        grouped_matmul=tuple(
            GroupedMatmulSample(
                dtype=DType.BF16, m=groups * rows, n=128, k=64, groups=groups,
                seconds=40 * device_s + groups * device_s / 10,
            )
            for groups in (2, 8)
            for rows in (1, 128)
        ),
        memory=(MemorySample(footprint_bytes=2**30, bytes_per_s=2e12),),
        attention=tuple(attention(q, c, device_s) for q in (1, 32) for c in (0, 100, 1000)),
        passes=tuple(
            PassSample(what=what, rows=m, width=64, seconds=device_s)
            for what in ("norm", "rotate", "activation")
            for m in (1, 16, 64, 256)
        ),
        overhead=tuple(OverheadSample(what=what, count=1, seconds=s) for what, s in overhead.items()),
    )  # fmt: skip
    return chip_spec(readings)


def parts(chip: Chip, operators: tuple[Operator, ...]) -> list[tuple[Operator, float, float]]:
    footprint = streamed_bytes(operators)
    return [(op, *(float(part) for part in parts_s(op, chip, footprint))) for op in operators]


def operators(chip: Chip, shape: StepShape, config=DENSE) -> tuple[Operator, ...]:
    assert chip.calibration is not None
    return step(config, shape, precision=engine_precision(chip.calibration))


@pytest.mark.parametrize("device_s", [1e-7, 1e-3])
def test_neither_host_nor_device_waits_for_the_other_before_the_last(device_s: float) -> None:
    chip = gpu(replays=False, device_s=device_s)
    of = operators(chip, MIXED)
    host = sum(op.repeat * launch for op, _, launch in parts(chip, of))
    device = sum(op.repeat * work for op, work, _ in parts(chip, of) if op.name not in LAST)
    last = sum(op.repeat * work for op, work, _ in parts(chip, of) if op.name in LAST)
    assert float(steps_s(of, chip).seconds) == pytest.approx(max(host, device) + last)
    assert (host > device) == (device_s < 1e-6)
    assert float(steps_s(of, chip).busy_s) == pytest.approx(device + last)


def test_a_captured_step_takes_what_the_device_does() -> None:
    chip = gpu(replayed_step=2e-4, replayed_operator=1e-7, replayed_sparse_layer=3e-6, step=1e-3)
    for config in (DENSE, SPARSE):
        of = operators(chip, DECODING, config)
        device = sum(op.repeat * work for op, work, _ in parts(chip, of))
        gaps = 1e-7 * sum(op.repeat for op in of) + (4 * 3e-6 if config is SPARSE else 0.0)
        assert float(steps_s(of, chip).seconds) == pytest.approx(device + gaps)
        assert chip.calibration is not None
        precision = engine_precision(chip.calibration)
        whole = step_cost(config, DECODING, chip, precision=precision)
        # The host's own part is that of a captured step, not that of one which it queues.
        assert float(whole.seconds) == pytest.approx(device + gaps + 2e-4)
        queued = step_cost(config, MIXED, chip, precision=precision)
        assert float(queued.seconds) > 1e-3


@pytest.mark.parametrize("replays", [True, False])
@pytest.mark.parametrize("device_s", [1e-7, 1e-3])
@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_an_explained_step_adds_up_to_its_price(config: ModelConfig, device_s: float, replays: bool) -> None:
    rests = {
        "step": 1e-3,
        "sequence": 2e-5,
        "sparse_layer": 3e-6,
        "replayed_step": 2e-4,
        "replayed_operator": 1e-7,
    }
    spec = spec_of(replays=replays, device_s=device_s, **rests)
    chip = spec.at()
    assert chip.calibration is not None
    question = Question(
        model=config, chip=spec, chips=1, isl=200, osl=50, precision=engine_precision(chip.calibration)
    )
    plan = Plan(shard=Shard(), batch=8, step_tokens=64, replicas=1, idle_chips=0)
    told = explain(question, plan)
    load = load_at(question, np.array([8.0]), np.array([64.0]))
    for shape, laid in ((load.decode, told.decode), (load.mixed, told.prefill)):
        price = step_cost(config, shape, chip, precision=question.precision)
        assert laid.seconds == pytest.approx(float(price.seconds[0]), rel=1e-9)
        assert sum(line.seconds for line in laid.lines) == pytest.approx(laid.seconds, rel=1e-9)
        assert sum(laid.by_bound().values()) == pytest.approx(laid.seconds, rel=1e-9)
        assert all(line.seconds >= 0 for line in laid.lines)
        captured = replays and laid is told.decode
        assert set(laid.beside_s) == (set() if captured else {"device" if device_s < 1e-6 else "host"})
        by_name = {line.name: line for line in laid.lines}
        assert by_name["host_step"].seconds == (2e-4 if captured else 1e-3)
        # Nobody waits for work that is done while the host queues, but for the last.
        waited = captured or device_s > 1e-6
        assert (by_name["qkv"].of_roofline is None) != waited
        assert by_name["head"].of_roofline is not None
    state = steady(question, chip, Shard(), np.array([8.0]), np.array([64.0]))
    assert sum(told.tpot_s.values()) == pytest.approx(float(state.tpot_s[0]), rel=1e-9)


def test_what_is_beside_an_explained_step_is_told_with_its_source() -> None:
    spec = spec_of(replays=False, device_s=1e-3)
    assert spec.calibration is not None
    question = Question(
        model=DENSE, chip=spec, chips=1, isl=200, osl=50, precision=engine_precision(spec.calibration)
    )
    told = explain(question, Plan(shard=Shard(), batch=8, step_tokens=64, replicas=1, idle_chips=0))
    out = io.StringIO()
    Console(file=out, width=200).print(*tables(told))
    said = f"Beside that the host is at work for {quantity(told.decode.beside_s['host'], 's')}, measured"
    assert said in " ".join(out.getvalue().split())
    assert said in page._explained(told)
    assert as_json(told)["steps"][0]["beside_s"] == told.decode.beside_s


def test_one_kernel_has_prompts_and_decoding_where_steps_are_captured() -> None:
    """Others queue prompts one by one, beside what decodes."""

    def attending(chip: Chip) -> float:
        of = operators(chip, MIXED)
        without = tuple(op for op in of if op.kind is not Kind.ATTENTION)
        return float(steps_s(of, chip).seconds) - float(steps_s(without, chip).seconds)

    assert attending(gpu()) == pytest.approx(4 * HOSTS["prompt"])
    assert attending(gpu(replays=False)) == pytest.approx(4 * (3 * HOSTS["prompt"] + HOSTS["decode"]))


def test_groups_that_run_side_by_side_cost_little_each() -> None:
    known = measured(gpu())
    assert known is not None
    call_s, *_ = known.grouped[DType.BF16]
    assert call_s == pytest.approx(0.95 * 40.2e-6)


def test_rests_of_captured_steps_are_told_from_those_of_others() -> None:
    """Steps made of known rests: the same come out."""
    true = {"step": 9e-4, "operator": 6e-6, "replayed_step": 1e-4, "replayed_operator": 2e-7}
    chip, made = gpu(), gpu(**true)
    assert chip.calibration is not None
    precision = engine_precision(chip.calibration)
    samples = [
        StepSample(config=config, pieces=pieces, seconds=float(step_cost(
            config, StepShape.ragged(pieces), made, precision=precision).seconds))
        for config in (steps.synthetic(2), steps.synthetic(10), steps.synthetic(28))
        for pieces in (((1, 40),), ((1, 40),) * 8, ((32, 0),), ((128, 0),))
    ]  # fmt: skip
    found = {s.what: s.seconds for s in overheads(samples, chip, precision)}
    assert {what: found[what] for what in true} == pytest.approx(true, rel=0.02)


def test_the_host_has_one_figure_for_each_kind_of_call() -> None:
    samples = [attention(1, 10, 1.0), attention(8, 0, 1.0), attention(1, 20, 1.0), 3.5]
    assert hosts(samples, None) == ()
    found = {s.what: s.seconds for s in hosts(samples, [1e-6, 5e-6, 3e-6, 9.0])}
    assert found == {"host_decode": pytest.approx(2e-6), "host_prompt": pytest.approx(5e-6)}


def test_an_engine_that_captures_runs_what_would_hold_up_its_first_steps() -> None:
    config = replace(steps.synthetic(1), max_positions=512)
    run = TorchExecutor(random_model(config, ops=DeviceOps(fused=False)), PagedCache(config, blocks=40))
    ran: list[int] = []

    class Captured:
        def prepare(self) -> None:
            ran.append(0)

        def logits(self, pieces: object) -> torch.Tensor:
            raise AssertionError("nothing here only decodes")

    run.prepare()
    assert not ran
    run._replays = Captured()  # type: ignore[assignment]
    before = run.execute
    run.execute = lambda batch: ran.append(len(batch.pieces)) or before(batch)  # type: ignore[method-assign]
    run.prepare()
    assert ran == [0, *(decoding + 1 for decoding, _ in WARM_PROMPTS)]
