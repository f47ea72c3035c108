"""Calibrate: measure the machine this runs on, stage by stage, into a chip spec.

Decides what is measured and in which order. It writes no file and draws no bar: the
caller is told which stage runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from tongyun.chip.calibrated import engine_precision
from tongyun.cloud.engine.calibrate import (
    attention,
    machine,
    memory,
    passes,
    products,
    sampling,
    serving,
    steps,
)
from tongyun.cloud.engine.calibrate.bench import Bench, Probe
from tongyun.cloud.engine.calibrate.hosts import hosts
from tongyun.cloud.engine.calibrate.overheads import overheads
from tongyun.cloud.engine.calibrate.pace import LOOP, PACE, SERVED_PACE, Pace
from tongyun.cloud.engine.calibrate.spec import Readings, chip_spec
from tongyun.cloud.engine.calibrate.stopwatch import stopwatch
from tongyun.cloud.engine.torch_executor import ExecutorOptions, choose_engine_ops, default_threads
from tongyun.model.kernels.device import DeviceOps
from tongyun.specs import ChipSpec
from tongyun.specs.samples import OverheadSample
from tongyun.units import DType

VISITS = 10
ENGINE_SHARE = 0.5
"""Of the time, what operators and steps take; the rest is serving's."""

Tell = Callable[[str, float], object]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the engine will run: a calibration holds for one setting only."""

    device: str = "cpu"
    threads: int = 1
    kernels: str | None = None
    quick: bool = False
    """A few points in a second or two, for tests; not to be trusted."""

    def bench(self) -> Bench:
        device = torch.device(self.device)
        gpu = device.type == "cuda"
        return Bench(
            device=device,
            ops=choose_engine_ops(
                ExecutorOptions(device=self.device, kernels=self.kernels, threads=self.threads)
            ),
            weight_type=DType.BF16,
            kv_type=DType.BF16 if gpu else DType.F32,
            activation_type=DType.BF16 if gpu else DType.F32,
            quick=self.quick,
        )

    def machine(self) -> machine.Description:
        """The machine as this setting uses it."""
        with _threads_as_before():
            bench = self.bench()
        return {
            **machine.describe(bench.device, threads=self.threads, ops=bench.ops.name),
            "weights": bench.weight_type.value,
            "kv": bench.kv_type.value,
            "activations": bench.activation_type.value,
            "quick": self.quick,
            **({"replays": True} if isinstance(bench.ops, DeviceOps) and bench.ops.fused else {}),
        }


def setting(*, device: str | None, threads: int | None, kernels: str | None, quick: bool) -> Setting:
    """How the engine would run here by default, with what was asked for instead."""
    return Setting(
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        threads=threads or default_threads(),
        kernels=kernels,
        quick=quick,
    )


def measure(setting: Setting, tell: Tell, *, patience_s: float = 0.0) -> ChipSpec:
    """Measure this machine; `tell` is called with what is being measured and the share that is done.

    What falls into a moment in which others slow the processors down is measured again, for
    `patience_s` seconds in all.
    """
    with _threads_as_before(), Pace(patience_s=patience_s) as pace:
        bench = setting.bench()
        bare, extra = _engine(
            setting, bench, pace, lambda share: tell("operators and steps", ENGINE_SHARE * share)
        )
        tell("serving", ENGINE_SHARE)
        paces = {PACE: pace.taken()}
        alone = chip_spec(replace(bare, overhead=extra)).at()
        around, served, paces[SERVED_PACE] = serving.serving(bench, pace, alone)
        paces[LOOP] = pace.quickest_s
    tell("done", 1.0)
    machine = {**bare.machine, **paces}
    return chip_spec(replace(bare, machine=machine, overhead=extra + around, served=served))


def _engine(
    setting: Setting, bench: Bench, pace: Pace, done: Callable[[float], object]
) -> tuple[Readings, tuple[OverheadSample, ...]]:
    """All operators and whole steps, in turns; and what steps take beyond their operators."""
    kinds: list[list[Probe[Any]]] = [
        [*products.linear(bench), *products.exact(bench)],
        list(products.experts(bench)),
        list(attention.attention(bench)),
        list(memory.bandwidth(bench)),
        list(passes.passes(bench)),
        list(sampling.drawing(bench)),
    ]
    probes = [probe for kind in kinds for probe in kind]
    watch = stopwatch([p.call for p in probes], bench.device, waiting=[p.waits for p in probes])
    whole = steps.Steps(bench)

    def operators() -> None:
        with torch.inference_mode():
            watch.visit()

    calm, calm_whole = pace.rounds((operators, whole.visit), 1 if setting.quick else VISITS, done)
    left = iter(watch.seconds(calm))
    matmul, grouped, attending, reading, passing, drawn = (
        tuple(probe.sample(next(left)) for probe in kind) for kind in kinds
    )
    bare = Readings(
        machine=setting.machine(),
        matmul=matmul,
        grouped_matmul=grouped,
        memory=reading,
        attention=attending,
        passes=passing,
    )
    known = hosts([*matmul, *grouped, *attending, *reading, *passing, *drawn], watch.host_s(calm))
    known += sampling.logit_byte(*drawn)
    return bare, known + _rests(replace(bare, overhead=known), whole.samples(calm_whole))


def _rests(bare: Readings, whole: list[steps.StepSample]) -> tuple[OverheadSample, ...]:
    chip = chip_spec(bare).at()
    assert chip.calibration is not None
    return overheads(whole, chip, engine_precision(chip.calibration))


@contextmanager
def _threads_as_before() -> Iterator[None]:
    """Choosing the engine's operations sets PyTorch's threads for the whole process."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
