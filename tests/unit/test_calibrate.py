"""Calibration: what is kept, when it is stale, and how overheads are told from steps."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from tongyun.chip.curves import nonnegative
from tongyun.cli.calibrate import calibrated
from tongyun.cloud.engine.calibrate import machine, products, steps
from tongyun.cloud.engine.calibrate import pace as pace_module
from tongyun.cloud.engine.calibrate.machine import Elsewhere
from tongyun.cloud.engine.calibrate.measure import Setting, measure
from tongyun.cloud.engine.calibrate.spec import Readings, chip_spec, kept, local_path, stale
from tongyun.cloud.engine.calibrate.stopwatch import Stopwatch
from tongyun.specs import ChipSpec, find_chip, load, save
from tongyun.specs.samples import (
    AttentionSample,
    GroupedMatmulSample,
    MatmulSample,
    MemorySample,
    OverheadSample,
)
from tongyun.units import DType, Source

QUICK = Setting(device="cpu", threads=1, kernels="torch", quick=True)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TONGYUN_HOME", str(tmp_path))
    return tmp_path


def readings(**changes: object) -> Readings:
    made = Readings(
        machine=QUICK.machine(),
        matmul=(
            MatmulSample(dtype=DType.BF16, m=1, n=64, k=32, seconds=1e-6),
            MatmulSample(dtype=DType.BF16, m=8, n=64, k=32, seconds=2e-6),
            MatmulSample(dtype=DType.F32, m=1, n=64, k=32, seconds=2e-6),
        ),
        grouped_matmul=(GroupedMatmulSample(dtype=DType.BF16, m=4, n=64, k=32, groups=2, seconds=3e-6),),
        memory=(
            MemorySample(footprint_bytes=1024, bytes_per_s=5e10),
            MemorySample(footprint_bytes=2**28, bytes_per_s=1e10),
        ),
        attention=(
            AttentionSample(
                dtype=DType.F32, batch=1, queries=8, context=0, heads=4, kv_heads=2, head_dim=32, seconds=1e-5
            ),
        ),
        overhead=(
            OverheadSample(what="operator", count=1, seconds=4e-6),
            OverheadSample(what="step", count=1, seconds=1e-4),
        ),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_a_spec_reads_back_as_it_was_written(tmp_path: Path) -> None:
    spec = chip_spec(readings())
    save(spec, tmp_path / "one.toml")
    assert load(tmp_path / "one.toml", ChipSpec) == spec


def test_the_figures_of_the_spec_rest_on_the_samples() -> None:
    spec = chip_spec(readings())
    assert spec.matmul.peak[DType.BF16].value == pytest.approx(2 * 8 * 64 * 32 / 2e-6)
    assert spec.memory.bandwidth.value == 1e10
    assert spec.overhead.kernel_launch.value == 4e-6
    assert spec.overhead.step_host.value == 1e-4
    assert spec.memory.bandwidth.source is Source.MEASURED
    assert spec.power.tdp.source is Source.ASSUMED and spec.power.tdp.has_range


def test_a_machine_never_measured_is_stale_and_a_measured_one_is_not() -> None:
    assert stale(QUICK.machine()) == ["this machine was not measured before"]
    save(chip_spec(readings()), local_path())
    assert stale(QUICK.machine()) == []
    assert find_chip("local") == kept()


@pytest.mark.parametrize("key", ["kernels", "torch", "engine_threads", "processor", "kv"])
def test_another_kernel_version_or_machine_makes_it_stale(key: str) -> None:
    then = {**QUICK.machine(), key: "another"}
    save(chip_spec(readings(machine=then)), local_path())
    assert stale(QUICK.machine()) == [f"{key} was another, is {QUICK.machine()[key]}"]


def test_what_does_not_change_a_measurement_does_not_make_it_stale() -> None:
    then = {**QUICK.machine(), "system": "another", "memory_bytes": 1}
    save(chip_spec(readings(machine=then)), local_path())
    assert stale(QUICK.machine()) == []


def test_a_valid_calibration_is_measured_once_and_again_when_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    command = import_module("tongyun.cli.calibrate")
    monkeypatch.setattr(command, "_measure", lambda *_: measured.append(1) or chip_spec(readings()))
    for force in (False, False, True):
        spec, path = calibrated(QUICK, force=force, quiet=True)
    assert len(measured) == 2
    assert path == local_path() and find_chip("local") == spec


def test_the_digest_follows_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.cpp").write_text("int a;")
    monkeypatch.setattr(machine, "KERNELS", tmp_path)
    before = machine.kernels_digest()
    (tmp_path / "a.cpp").write_text("int b;")
    assert machine.kernels_digest() != before


def test_the_stopwatch_reads_seconds_of_one_call() -> None:
    calls: list[str] = []
    watch = Stopwatch([lambda: time.sleep(0.002), lambda: calls.append("now")])
    watch.visit()
    watch.visit()
    slow, quick = watch.seconds()
    assert 0.002 <= slow < 0.02
    # A call far below the clock's grain is timed in bursts.
    assert 0 < quick < 1e-5 and len(calls) > 100


def test_work_of_other_processes_is_noticed_and_ones_own_is_not() -> None:
    with Elsewhere() as others:
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        time.sleep(1.0)
    assert others.cores > 0.4
    with Elsewhere() as alone:
        busy.kill()
        busy.wait()
        until = time.perf_counter() + 1.0
        while time.perf_counter() < until:
            pass
    # What the child did before it was waited for counts as ours, and so does our own loop.
    assert alone.cores < others.cores


def test_overheads_are_found_and_never_negative() -> None:
    rows = np.array([[1, 10, 1], [1, 50, 1], [1, 10, 8], [1, 50, 8]], dtype=float)
    assert nonnegative(rows, rows @ [3.0, 2.0, 0.5]) == pytest.approx([3.0, 2.0, 0.5])
    found = nonnegative(rows, rows @ [3.0, 2.0, -0.5])
    assert found.min() >= 0 and found[2] == 0


def test_experts_are_measured_with_equal_rows_each() -> None:
    chosen_TN, weight_TN = products._balanced(12, 8, torch.device("cpu"))
    assert torch.bincount(chosen_TN.flatten(), minlength=8).tolist() == [3] * 8
    assert (chosen_TN[:, 0] != chosen_TN[:, 1]).all()
    assert weight_TN.sum(1).tolist() == [1.0] * 12


@pytest.mark.slow
def test_a_quick_calibration_of_this_machine_is_whole() -> None:
    done: list[float] = []
    spec = measure(QUICK, lambda what, share: done.append(share))
    assert done == sorted(done) and done[-1] == 1.0
    save(spec, local_path())
    assert find_chip("local") == spec
    calibration = spec.calibration
    assert calibration is not None
    assert calibration.matmul and calibration.grouped_matmul and calibration.attention and calibration.memory
    assert float(calibration.machine[pace_module.REFERENCE]) > 0
    assert calibration.served and all(sample.way_s > 0 for sample in calibration.served)
    assert all(figure.value > 0 for key, figure in spec.figures() if not key.startswith("overhead"))


def test_a_machine_half_as_fast_as_its_calibration_has_a_pace_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    then = MatmulSample(dtype=DType.BF16, m=1, n=64, k=64, seconds=1e-6)
    calibration = chip_spec(readings(matmul=(then,) * 8)).at().calibration
    assert calibration is not None
    monkeypatch.setattr(Stopwatch, "seconds", lambda self: [2e-6] * len(self._calls))
    monkeypatch.setattr(pace_module, "KINDS", pace_module.KINDS[:1])
    before = torch.get_num_threads()
    assert pace_module.pace(QUICK.bench(), calibration) == pytest.approx(2.0)
    # Whole steps count as well, and the one that is farther off is told.
    monkeypatch.setattr(steps.Reference, "seconds", lambda self: 3e-3)
    slow = replace(calibration, machine={**calibration.machine, pace_module.REFERENCE: 1e-3})
    assert pace_module.pace(QUICK.bench(), slow) == pytest.approx(3.0)
    torch.set_num_threads(before)
