"""What a step costs beyond its products, told from measured steps of synthetic models.

Each measured step leaves a rest when its priced products are taken away. The rest is
split, by least squares with no negative part, into what every step, operator, sparse
layer, sequence and byte passed on adds. It measures the engine on this machine; no
served model takes part in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tongyun.chip.calibrated import nonnegative
from tongyun.chip.rates import PRODUCTS
from tongyun.chip.roofline import streamed_bytes, work_s
from tongyun.cloud.engine.calibrate.steps import StepSample
from tongyun.model.graph import Kind, Operator, Precision
from tongyun.model.steps import step
from tongyun.specs import Chip
from tongyun.specs.samples import OverheadSample

TERMS = ("step", "operator", "sparse_layer", "sequence", "passed_byte")
PASSING = frozenset({Kind.NORM, Kind.ELEMENTWISE, Kind.EMBED})


def overheads(samples: Sequence[StepSample], chip: Chip, precision: Precision) -> tuple[OverheadSample, ...]:
    """Seconds that one of each term adds to a step; a term that adds nothing is left out."""
    rows, rests = [], []
    for sample in samples:
        operators = step(sample.config, sample.shape, precision=precision)
        footprint = streamed_bytes(operators)
        products = [op for op in operators if op.kind in PRODUCTS]
        known_s = sum(op.repeat * float(work_s(op, chip, footprint)) for op in products)
        weight = 1 / sample.seconds
        rests.append((sample.seconds - known_s) * weight)
        rows.append([count * weight for count in _counts(operators, float(sample.shape.sequences))])
    found = zip(TERMS, nonnegative(np.array(rows), np.array(rests)).tolist(), strict=True)
    return tuple(OverheadSample(what=what, count=1, seconds=s) for what, s in found if s > 0)


def _counts(operators: tuple[Operator, ...], sequences: float) -> list[float]:
    """How often each of `TERMS` is in a step."""
    return [
        1.0,
        float(sum(op.repeat for op in operators)),
        float(sum(op.repeat for op in operators if op.name == "router")),
        sequences,
        float(sum(op.repeat * op.moved_bytes for op in operators if op.kind in PASSING)),
    ]
