"""What a step costs beyond its operators, told from measured steps of synthetic models.

Each measured step leaves a rest when its priced operators are taken away. The rest is
split, by least squares with no negative part, into what every step, operator, sparse
layer, sequence and token adds. It measures the engine on this machine; no served model
takes part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tongyun.chip.roofline import steps_s
from tongyun.cloud.engine.calibrate.steps import StepSample
from tongyun.model.graph import Precision
from tongyun.model.steps import step
from tongyun.specs import Chip
from tongyun.specs.samples import OverheadSample

TERMS = ("step", "operator", "sparse_layer", "sequence", "token")

Array = NDArray[np.float64]


def overheads(samples: Sequence[StepSample], chip: Chip, precision: Precision) -> tuple[OverheadSample, ...]:
    """Seconds that one of each term adds to a step; a term that adds nothing is left out."""
    bare = replace(chip, kernel_launch_s=0.0, step_host_s=0.0)
    rows, rests, scale = [], [], []
    for sample in samples:
        operators = step(sample.config, sample.shape, precision=precision)
        rests.append(sample.seconds - float(steps_s(operators, bare).seconds))
        scale.append(1 / sample.seconds)
        sparse = sum(op.repeat for op in operators if op.name == "router")
        shape = sample.shape
        # Tokens beyond one a sequence: what prompts add.
        extra = float(shape.tokens - shape.sequences)
        layers = sample.config.layers
        rows.append([1, sum(op.repeat for op in operators), sparse, float(shape.sequences), extra * layers])
    weight = np.array(scale)
    solution = nonnegative(np.array(rows, dtype=np.float64) * weight[:, None], np.array(rests) * weight)
    found = zip(TERMS, solution.tolist(), strict=True)
    return tuple(OverheadSample(what=what, count=1, seconds=s) for what, s in found if s > 0)


def nonnegative(matrix: Array, target: Array) -> Array:
    """Least squares with no negative coefficient (active set: drop the most negative, solve again)."""
    active = list(range(matrix.shape[1]))
    solution = np.zeros(matrix.shape[1])
    while active:
        part, *_ = np.linalg.lstsq(matrix[:, active], target, rcond=None)
        if part.min() >= 0:
            solution[active] = part
            break
        active.pop(int(part.argmin()))
    return solution
