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

EVERY = 7
VISITS = 3


def pace(bench: Bench, calibration: Calibration) -> float:
    """Geometric mean of what every seventh sample takes now over what it took; 1.1 is a tenth slower."""
    kinds: list[tuple[Callable[[Bench], Iterator[Probe[Any]]], tuple[Any, ...]]] = [
        (products.linear, calibration.matmul),
        (products.experts, calibration.grouped_matmul),
        (attention.attention, calibration.attention),
    ]
    again = [
        (probe.call, then.seconds)
        for measured, samples in kinds
        for probe, then in islice(zip(measured(bench), samples, strict=False), 0, None, EVERY)
    ]
    watch = Stopwatch([call for call, _ in again], bench.device)
    with torch.inference_mode():
        for _ in range(VISITS):
            watch.visit()
    ratios = np.array(watch.seconds()) / np.array([then for _, then in again])
    return float(np.exp(np.log(ratios).mean()))
