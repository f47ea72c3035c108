"""Measure the operators without products: norms, the preparation of attention, activations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from tongyun.cloud.engine.calibrate.bench import Bench, Probe
from tongyun.specs.samples import PassSample

ROWS, WIDTHS = (1, 4, 16, 64, 256), (64, 256, 1024)
HEADS = ((4, 2, 32), (4, 2, 64), (16, 8, 128))
"""Query heads, key/value heads and their width."""
INNER = (64, 512, 3072)
EXPERTS = ((4, 2), (16, 4), (128, 8))
"""Experts of a layer, and those of a token."""
EPSILON = 1e-6


def passes(bench: Bench) -> Iterator[Probe[PassSample]]:
    """`rms_norm`, `attention_inputs`, `swiglu`, `choose` and a residual's sum over rows and widths.

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
        for count, each in EXPERTS if not bench.quick else EXPERTS[:2]:
            choose = partial(bench.ops.choose, bench.activation(m, count), each, True)
            yield Probe(call=choose, sample=partial(_sample, "choice", m, count))
        for width in WIDTHS if not bench.quick else WIDTHS[:2]:
            call = partial(torch.add, bench.activation(m, width), bench.activation(m, width))
            yield Probe(call=call, sample=partial(_sample, "sum", m, width))


def _rotate(bench: Bench, rows: int, heads: int, kv_heads: int, head_width: int) -> Probe[PassSample]:
    both = heads + 2 * kv_heads
    # The operation may work in place: with equal weights and true angles, values stay as large as they
    # are. With others all but one fade, call by call, into numbers so small that processors slow down.
    even = torch.ones_like(bench.weight(head_width))
    angles = bench.activation(rows, head_width)
    call = partial(
        bench.ops.attention_inputs,
        bench.activation(rows, both, head_width),
        (even, even, EPSILON),
        *(angles.cos(), angles.sin()),
        kv_heads,
    )
    return Probe(call=call, sample=partial(_sample, "rotate", rows, both * head_width))


def _sample(what: str, rows: int, width: int, seconds: float) -> PassSample:
    return PassSample(what=what, rows=rows, width=width, seconds=seconds)
