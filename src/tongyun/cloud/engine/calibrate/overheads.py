"""What a step costs beyond its operators, told from measured steps of synthetic models.

Each measured step leaves a rest when its priced operators are taken away. The rest is
split, by least squares with no negative part, into what every step, operator, sparse
layer, sequence, further token of a sequence and written byte adds, and a step in which
threads help each other. It measures the engine on this machine; no served
model takes part in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tongyun.chip.calibrated import measured, shared
from tongyun.chip.curves import nonnegative
from tongyun.chip.roofline import steps_s
from tongyun.cloud.engine.calibrate.steps import StepSample
from tongyun.model.graph import Operator, Precision, StepShape
from tongyun.model.steps import step
from tongyun.specs import Chip
from tongyun.specs.samples import OverheadSample

TERMS = (
    "step",
    "operator",
    "sparse_layer",
    "sequence",
    "token",
    "written_byte",
    "shared_step",
)
QUEUED = ("step", "operator", "sparse_layer", "sequence", "token")
"""Those of a device with a queue, which does not wait for what is written and shares nothing with threads."""
REPLAYED = ("replayed_step", "replayed_operator", "replayed_sparse_layer")
"""Of its captured steps, in place of the first three."""


def overheads(samples: Sequence[StepSample], chip: Chip, precision: Precision) -> tuple[OverheadSample, ...]:
    """Seconds that one of each term adds to a step; a term that adds nothing is left out."""
    known = measured(chip)
    terms = TERMS if known is None or not known.queued else QUEUED + REPLAYED
    rows, rests = [], []
    for sample in samples:
        operators = step(sample.config, sample.shape, precision=precision)
        known_s = float(steps_s(operators, chip).seconds)
        weight = 1 / sample.seconds
        rests.append((sample.seconds - known_s) * weight)
        counts = _counts(operators, sample.shape)
        if known is not None and known.replayed(operators):
            counts |= {to: counts.pop(term) for to, term in zip(REPLAYED, QUEUED, strict=False)}
        rows.append([counts.get(term, 0.0) * weight for term in terms])
    found = zip(terms, nonnegative(np.array(rows), np.array(rests)).tolist(), strict=True)
    return tuple(OverheadSample(what=what, count=1, seconds=s) for what, s in found if s > 0)


def _counts(operators: tuple[Operator, ...], shape: StepShape) -> dict[str, float]:
    """How often each of `TERMS` is in a step."""
    counts = (
        1.0,
        float(sum(op.repeat for op in operators)),
        float(sum(op.repeat for op in operators if op.name == "router")),
        float(shape.sequences),
        float(shape.tokens - shape.sequences),
        float(sum(op.repeat * op.write_bytes for op in operators)),
        float(shared(operators)),
    )
    return dict(zip(TERMS, counts, strict=True))
