"""Measure choosing a token from its logits, greedily, as a load generator asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tongyun.cloud.engine.calibrate.bench import Bench, Probe
from tongyun.cloud.engine.torch_executor import GREEDY
from tongyun.model.sampling import Draw, sample
from tongyun.specs.samples import OverheadSample
from tongyun.units import DType

ROWS, VOCABULARIES = 8, (4096, 65536)


def drawing(bench: Bench) -> Iterator[Probe[float]]:
    """A short and a long vocabulary; the samples are plain seconds."""
    draws = [Draw(options=GREEDY, seed=0, history=(0,), prompt_tokens=1)] * ROWS
    for vocabulary in VOCABULARIES:
        logits_NV = bench.activation(ROWS, vocabulary).float()
        yield Probe(call=partial(sample, logits_NV, draws, bench.ops.argmax), sample=float, waits=True)


def logit_byte(short_s: float, long_s: float) -> tuple[OverheadSample, ...]:
    """What a byte of logits adds, from the difference of the two; none where it is lost in noise."""
    more_bytes = int(ROWS * (VOCABULARIES[1] - VOCABULARIES[0]) * DType.F32.bytes)
    if long_s <= short_s:
        return ()
    return (OverheadSample(what="logit_byte", count=more_bytes, seconds=long_s - short_s),)
