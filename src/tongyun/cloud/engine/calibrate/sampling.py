"""Measure choosing a token from its logits, greedily, as a load generator asks for it."""

from __future__ import annotations

from collections.abc import Iterator

from tongyun.cloud.engine.calibrate.bench import Bench
from tongyun.cloud.engine.torch_executor import GREEDY
from tongyun.model.sampling import Draw, sample
from tongyun.specs.samples import OverheadSample
from tongyun.units import DType

ROWS, VOCABULARIES = 8, (4096, 65536)


def drawing(bench: Bench) -> Iterator[OverheadSample]:
    """Seconds a byte of logits adds: the difference between a long vocabulary and a short one."""
    short_s, long_s = (_seconds(bench, vocabulary) for vocabulary in VOCABULARIES)
    more_bytes = int(ROWS * (VOCABULARIES[1] - VOCABULARIES[0]) * DType.F32.bytes)
    if long_s > short_s:
        yield OverheadSample(what="logit_byte", count=more_bytes, seconds=long_s - short_s)


def _seconds(bench: Bench, vocabulary: int) -> float:
    logits_NV = bench.activation(ROWS, vocabulary).float()
    draws = [Draw(options=GREEDY, seed=0, history=(0,), prompt_tokens=1)] * ROWS
    return bench.seconds(lambda: sample(logits_NV, draws, bench.ops.argmax))
