"""Calibration: what is kept, when it is stale, and how overheads are told from steps."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from tongyun.chip.curves import nonnegative
from tongyun.cli.calibrate import calibrated
from tongyun.cloud.engine.calibrate import machine, products, serving
from tongyun.cloud.engine.calibrate.loads import CELLS
from tongyun.cloud.engine.calibrate.machine import Elsewhere
from tongyun.cloud.engine.calibrate.measure import Setting, measure
from tongyun.cloud.engine.calibrate.pace import LOOP, Pace
from tongyun.cloud.engine.calibrate.spec import Readings, chip_spec, kept, local_path, stale
from tongyun.cloud.engine.calibrate.stopwatch import Stopwatch, typical
from tongyun.cloud.engine.cores import aside
from tongyun.cloud.pauses import settled
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


@pytest.mark.parametrize("key", ["method", "kernels", "torch", "engine_threads", "processor", "kv"])
def test_another_kernel_version_or_machine_makes_it_stale(key: str) -> None:
    then = {**QUICK.machine(), key: "another"}
    save(chip_spec(readings(machine=then)), local_path())
    assert stale(QUICK.machine()) == [f"{key} was another, is {QUICK.machine()[key]}"]


def test_a_calibration_of_before_its_method_was_kept_is_stale() -> None:
    then = {key: value for key, value in QUICK.machine().items() if key != "method"}
    save(chip_spec(readings(machine=then)), local_path())
    assert stale(QUICK.machine()) == [f"method was None, is {machine.METHOD}"]


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
    assert float(calibration.machine[LOOP]) > 0
    assert calibration.served and all(sample.way_s > 0 for sample in calibration.served)
    assert all(figure.value > 0 for key, figure in spec.figures() if not key.startswith("overhead"))


class Scripted(Pace):
    """A pace that is read off a script."""

    def __init__(self, paces: list[float], patience_s: float = 60.0) -> None:
        super().__init__(patience_s=patience_s)
        self._paces = iter(paces)

    def _paced(self, call: Callable[[], Any]) -> tuple[Any, float]:
        return call(), next(self._paces)


def test_what_was_disturbed_is_measured_again_and_the_calmest_is_taken() -> None:
    numbers = iter(range(9))
    assert Scripted([1.3, 1.2, 1.05]).calmly(lambda: next(numbers)) == (2, 1.05)
    assert Scripted([1.5, 1.2, 1.3, 1.4]).calmly(lambda: next(numbers)) == (4, 1.2)
    # Without patience the first one has to do.
    assert Scripted([1.5], patience_s=0).calmly(lambda: next(numbers)) == (7, 1.5)


def test_rounds_go_on_until_each_had_its_share_of_calm() -> None:
    first: list[str] = []
    second: list[str] = []
    pace = Scripted([1.0, 1.0, 1.4, 1.0, 1.05])
    calmest = pace.rounds((lambda: first.append("x"), lambda: second.append("x")), 2, lambda share: None)
    assert calmest == ((0, 2), (0, 1)) and len(first) == 3 and len(second) == 2
    assert pace.taken() == pytest.approx((1.0 + 1.05 + 1.0 + 1.0) / 4)
    assert pace.taken() == 1.0


def test_a_reading_is_the_mean_without_its_extremes() -> None:
    assert typical([9.0, 1.0, 2.0, 3.0]) == 2.5
    assert typical([9.0, 1.0, 2.0, 3.0], [1, 2]) == 1.5


def test_the_pace_of_this_machine_is_sampled_and_never_far_below_its_best() -> None:
    with Pace() as pace:
        time.sleep(0.4)
        assert pace.read() > 0.8
        quickest_s = pace.quickest_s
    # A loop of plain Python on any machine: some ten nanoseconds a turn.
    assert 1e-6 < quickest_s < 1e-2
    with Pace(quickest_s=quickest_s / 2) as slow:
        time.sleep(0.4)
        assert slow.read() > 1.6


def test_who_serves_an_engine_leaves_it_a_core() -> None:
    before = os.sched_getaffinity(0)
    with aside():
        kept = os.sched_getaffinity(0)
    assert os.sched_getaffinity(0) == before
    assert kept == (before if len(before) == 1 else before - {min(before)})


def test_what_is_there_is_set_aside_until_the_block_ends_and_what_comes_is_collected() -> None:
    class Knot:
        def __init__(self) -> None:
            self.itself = self

    before = gc.get_freeze_count()
    with settled():
        assert gc.get_freeze_count() > before + 1000
        old = weakref.ref(Knot())
        gc.collect()
        assert old() is None
    assert gc.get_freeze_count() == 0
    with pytest.raises(KeyError), settled():
        raise KeyError
    assert gc.get_freeze_count() == 0


def served_step(ended_s: float, sequences: int, *, new: int = 1, prompt: int = 128) -> serving._Step:
    return serving._Step(ended_s=ended_s, tokens=sequences, pieces=((new, 150),) * sequences, prompt=prompt)


def served(*excess: tuple[int, int, float]) -> list[serving._Round]:
    loaded = serving._Loaded(cell=CELLS[0], ways=(), excess=excess)
    return [serving._Round(way_s=(0.0, 0.0), loaded=(loaded,), paces=(1.0,))]


def test_gaps_are_of_steps_that_only_decode_with_the_requests_that_came_meanwhile() -> None:
    seen = serving._Seen(
        came_s={"a": (128, 0.5), "b": (128, 2.5), "c": (17, 2.6), "d": (128, 4.0)},
        steps=[
            served_step(1.0, 1, new=128),
            served_step(2.0, 1),
            served_step(3.5, 1),
            served_step(5.0, 2, new=128),
            served_step(6.0, 3),
            # Another load's.
            served_step(7.0, 3, prompt=129),
        ],
    )
    assert [(len(pieces), came, s) for pieces, came, s in seen.gaps(128)] == [
        (1, 0, 1.0),
        (1, 2, 1.5),
        (3, 0, 1.0),
    ]


def test_what_serving_adds_to_a_step_is_told_from_made_up_steps() -> None:
    base_s, stream_s, coming_s = 1e-4, 2e-5, 3e-4

    def price(pieces: serving.Pieces) -> float:
        return 1e-3 + 1e-5 * len(pieces)

    seen, chance, now_s = serving._Seen(), Random(0), 0.0
    for number in range(2000):
        sequences, came = chance.randint(1, 40), chance.choice((0, 0, 1, 2))
        step = served_step(now_s, sequences)
        took_s = price(step.pieces) + base_s + stream_s * sequences + coming_s * came
        # What waited for something else says nothing.
        took_s += 0.08 if number % 50 == 0 else 0.0
        seen.came_s |= {f"{number}.{i}": (128, now_s + took_s / 2) for i in range(came)}
        now_s += took_s
        seen.steps.append(replace(step, ended_s=now_s))
    excess = serving._excess(seen.gaps(128), price)
    assert len(excess) == 1999 - 39
    step_s, each_s = serving._slower(served(*excess))
    assert step_s == pytest.approx({n: base_s + stream_s * n for n in serving.STREAMS})
    assert each_s == pytest.approx(coming_s)


def test_serving_more_streams_never_costs_less_and_few_steps_tell_no_cost_of_their_own() -> None:
    dipping = [(1, 0, 2e-4)] * 30 + [(4, 0, 1e-4)] * 30 + [(24, 0, 1e-4)] * 3
    step_s, each_s = serving._slower(served(*dipping))
    assert step_s == pytest.approx({1: 2e-4, 4: 2e-4}) and each_s == 0.0
    # More streams than are asked for at most are no evidence.
    assert serving._slower(served(*[(1, 0, 2e-4)] * 30, *[(60, 0, 1.0)] * 30))[0] == pytest.approx({1: 2e-4})
