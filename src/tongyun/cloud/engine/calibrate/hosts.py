"""What the host does to put one call of an operator on a device's queue.

It does not depend on the sizes of the call, so that one figure stands for all calls of a
kind. Knows not how it was measured.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from tongyun.chip.calibrated import HOST
from tongyun.specs.samples import (
    AttentionSample,
    GroupedMatmulSample,
    MatmulSample,
    OverheadSample,
    PassSample,
)


def hosts(samples: Sequence[object], seconds: Sequence[float] | None) -> tuple[OverheadSample, ...]:
    """The median seconds of the host by the kind of operator; none on a device without a queue."""
    if seconds is None:
        return ()
    at: dict[str, list[float]] = defaultdict(list)
    for sample, took_s in zip(samples, seconds, strict=True):
        if kind := _kind(sample):
            at[kind].append(took_s)
    return tuple(
        OverheadSample(what=f"{HOST}{kind}", count=1, seconds=statistics.median(took))
        for kind, took in sorted(at.items())
    )


def _kind(sample: object) -> str | None:
    """The kind as a price asks for it; None of samples that are no operator of a step."""
    match sample:
        case MatmulSample():
            return "matmul"
        case GroupedMatmulSample():
            return "experts"
        case AttentionSample(queries=1):
            return "decode"
        case AttentionSample():
            return "prompt"
        case PassSample(what=what):
            return what
    return None
