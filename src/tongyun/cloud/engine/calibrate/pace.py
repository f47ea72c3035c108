"""Tell whether the machine still runs as fast as when it was calibrated.

A shared host is slower in one minute than in the next. Some of the calibration's own samples
are taken again; nothing of a served model is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from tongyun.cloud.engine.calibrate import attention, products
from tongyun.cloud.engine.calibrate.bench import Bench, Probe
from tongyun.cloud.engine.calibrate.stopwatch import Stopwatch
from tongyun.specs import Calibration

KINDS: tuple[tuple[Callable[[Bench], Iterator[Probe[Any]]], str], ...] = (
    (products.linear, "matmul"),
    (products.experts, "grouped_matmul"),
    (attention.attention, "attention"),
)
"""What is measured again, and where the calibration keeps its samples."""
EVERY = 7
VISITS = 3


def pace(bench: Bench, calibration: Calibration) -> float:
    """Geometric mean of what every seventh sample takes now over what it took; 1.1 is a tenth slower."""
    again = [
        (probe.call, then.seconds)
        for measured, kind in KINDS
        for probe, then in islice(
            zip(measured(bench), getattr(calibration, kind), strict=False), 0, None, EVERY
        )
    ]
    watch = Stopwatch([call for call, _ in again], bench.device)
    with torch.inference_mode():
        for _ in range(VISITS):
            watch.visit()
    ratios = np.array(watch.seconds()) / np.array([then for _, then in again])
    return float(np.exp(np.log(ratios).mean()))
