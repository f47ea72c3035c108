"""Measure the operators without products: norms, the preparation of attention, activations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tongyun.cloud.engine.calibrate.bench import Bench, Probe
from tongyun.specs.samples import PassSample

ROWS, WIDTHS = (1, 4, 16, 64, 256), (64, 256, 1024)
HEADS = ((4, 2, 32), (4, 2, 64), (16, 8, 128))
"""Query heads, key/value heads and their width."""
INNER = (64, 512, 3072)
EPSILON = 1e-6


def passes(bench: Bench) -> Iterator[Probe[PassSample]]:
    """`rms_norm`, `attention_inputs` and `swiglu` over rows and widths.

    Where the engine fuses an activation into the product before it, this is what it takes
    alone: the most the fused one can add.
    """
    rows = ROWS if not bench.quick else ROWS[::2]
    for m in rows:
        for width in WIDTHS if not bench.quick else WIDTHS[:2]:
            weight = bench.weight(width)
            call = partial(bench.ops.rms_norm, bench.activation(m, width), weight, EPSILON)
            yield Probe(call=call, sample=partial(_sample, "norm", m, width))
        for heads in HEADS if not bench.quick else HEADS[:2]:
            yield _rotate(bench, m, *heads)
        for width in INNER if not bench.quick else INNER[:2]:
            call = partial(bench.ops.swiglu, bench.activation(m, 2 * width))
            yield Probe(call=call, sample=partial(_sample, "activation", m, width))


def _rotate(bench: Bench, rows: int, heads: int, kv_heads: int, head_width: int) -> Probe[PassSample]:
    both = heads + 2 * kv_heads
    norms = bench.weight(head_width), bench.weight(head_width), EPSILON
    rotation = bench.activation(rows, head_width), bench.activation(rows, head_width)
    # The operation may work in place: normalised again and again, values stay where they are.
    call = partial(
        bench.ops.attention_inputs, bench.activation(rows, both, head_width), norms, *rotation, kv_heads
    )
    return Probe(call=call, sample=partial(_sample, "rotate", rows, both * head_width))


def _sample(what: str, rows: int, width: int, seconds: float) -> PassSample:
    return PassSample(what=what, rows=rows, width=width, seconds=seconds)
