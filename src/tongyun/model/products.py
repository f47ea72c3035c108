"""The kinds of operator that layers are written from: a product with a weight matrix, a pass over memory.

It knows their FLOPs and bytes, and not which layer they belong to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tongyun.model.graph import Kind, Operator, Sequences
from tongyun.units import DType, Number


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How a weight matrix is kept and multiplied."""

    weights: DType
    compute: DType
    activations: DType
    block_scales: bool = False


def matmul(name: str, size: tuple[Number, int, int], store: Storage, *, repeat: int, bias: bool) -> Operator:
    """`size` = (rows m, inner k, columns n): 2·m·k·n FLOPs, weights read once."""
    m, k, n = size
    act = store.activations.bytes
    weight_bytes = k * n * store.weights.bytes + (n * act if bias else 0)
    return Operator(
        name=name,
        kind=Kind.MATMUL,
        repeat=repeat,
        m=m,
        n=n,
        k=k,
        compute=store.compute,
        stored=store.weights,
        block_scales=store.block_scales,
        flops=2 * m * k * n,
        read_bytes=m * k * act,
        weight_bytes=weight_bytes,
        write_bytes=m * n * act,
        resident_bytes=weight_bytes * repeat,
    )


def elementwise(name: str, kind: Kind, read: Number, write: Number, *, repeat: int) -> Operator:
    """A pass over memory: bytes read and written, no products."""
    return Operator(name=name, kind=kind, repeat=repeat, read_bytes=read, write_bytes=write)


def together(group: Sequences) -> tuple[int, Sequences]:
    """Decoding sequences with several new tokens each, as kernels take them: every position's heads
    are further rows beside those of the first, over one pass of the cache."""
    if group.ragged or np.ndim(group.new) or int(group.new) == 1:
        return 1, group
    new = int(group.new)
    return new, replace(group, new=1, context=group.context + (new - 1))
