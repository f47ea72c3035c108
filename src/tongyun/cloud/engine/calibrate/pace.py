"""Tell whether the machine still runs as fast as when it was calibrated.

A shared host is slower in one minute than in the next, and not in all that it does: who runs
on the other thread of a core slows interpreted code down by half and products by a tenth.
Some of the calibration's own samples are taken again, of products and of whole steps; nothing
of a served model is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from tongyun.cloud.engine.calibrate import attention, products, steps
from tongyun.cloud.engine.calibrate.bench import Bench, Probe
from tongyun.cloud.engine.calibrate.stopwatch import stopwatch
from tongyun.specs import Calibration

KINDS: tuple[tuple[Callable[[Bench], Iterator[Probe[Any]]], str], ...] = (
    (products.linear, "matmul"),
    (products.experts, "grouped_matmul"),
    (attention.attention, "attention"),
)
"""What is measured again, and where the calibration keeps its samples."""
EVERY = 7
VISITS = 3
STEP_VISITS = 12
REFERENCE = "reference_step_s"
"""Where a calibration's description of its machine keeps the seconds of a `Reference` step."""


def pace(bench: Bench, calibration: Calibration) -> float:
    """What samples take now over what they took; 1.1 is a tenth slower.

    Of products and attention, the geometric mean of every seventh sample, and of whole steps: the one
    that is farther from 1.
    """
    return max(_operators(bench, calibration), _steps(bench, calibration), key=lambda ratio: abs(ratio - 1))


def _operators(bench: Bench, calibration: Calibration) -> float:
    again = [
        (probe.call, then.seconds)
        for measured, kind in KINDS
        for probe, then in islice(
            zip(measured(bench), getattr(calibration, kind), strict=False), 0, None, EVERY
        )
    ]
    watch = stopwatch([call for call, _ in again], bench.device)
    with torch.inference_mode():
        for _ in range(VISITS):
            watch.visit()
    ratios = np.array(watch.seconds()) / np.array([then for _, then in again])
    return float(np.exp(np.log(ratios).mean()))


def _steps(bench: Bench, calibration: Calibration) -> float:
    """1 for a calibration that kept no step to compare with."""
    then_s = calibration.machine.get(REFERENCE)
    if then_s is None:
        return 1.0
    reference = steps.Reference(bench)
    for _ in range(STEP_VISITS):
        reference.visit()
    return reference.seconds() / float(then_s)
