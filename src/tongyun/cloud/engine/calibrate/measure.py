"""Calibrate: measure the machine this runs on, stage by stage, into a chip spec.

Decides what is measured and in which order. It writes no file and draws no bar: the
caller is told which stage runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from tongyun.chip.calibrated import engine_precision
from tongyun.cloud.engine.calibrate import attention, machine, memory, products, sampling, serving, steps
from tongyun.cloud.engine.calibrate.bench import Bench
from tongyun.cloud.engine.calibrate.overheads import overheads
from tongyun.cloud.engine.calibrate.spec import Readings, chip_spec
from tongyun.cloud.engine.calibrate.stopwatch import Stopwatch
from tongyun.cloud.engine.torch_executor import ExecutorOptions, choose_engine_ops, default_threads
from tongyun.specs import ChipSpec
from tongyun.units import DType

STAGES = ("linear layers", "experts", "attention", "memory", "whole steps", "serving")

Tell = Callable[[str], None]


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
            stopwatch=Stopwatch(device=device, budget_s=0.002 if self.quick else 0.01),
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
        }


def setting(*, device: str | None, threads: int | None, kernels: str | None, quick: bool) -> Setting:
    """How the engine would run here by default, with what was asked for instead."""
    return Setting(
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        threads=threads or default_threads(),
        kernels=kernels,
        quick=quick,
    )


def measure(setting: Setting, tell: Tell) -> ChipSpec:
    """Measure this machine; `tell` is called with the name of each stage of `STAGES` as it begins."""
    with _threads_as_before():
        bench = setting.bench()
        tell(STAGES[0])
        matmul = tuple(products.linear(bench)) + tuple(products.exact(bench))
        tell(STAGES[1])
        grouped = tuple(products.experts(bench))
        tell(STAGES[2])
        attending = tuple(attention.attention(bench))
        drawn = tuple(sampling.drawing(bench))
        tell(STAGES[3])
        reading = tuple(memory.bandwidth(bench))
        tell(STAGES[4])
        whole = tuple(steps.steps(bench))
        tell(STAGES[5])
        around = tuple(serving.serving(bench))
    bare = Readings(
        machine=setting.machine(), matmul=matmul, grouped_matmul=grouped, memory=reading, attention=attending
    )
    chip = chip_spec(bare).at()
    assert chip.calibration is not None
    rests = overheads(whole, chip, engine_precision(chip.calibration))
    return chip_spec(replace(bare, overhead=rests + drawn + around))


@contextmanager
def _threads_as_before() -> Iterator[None]:
    """Choosing the engine's operations sets PyTorch's threads for the whole process."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
