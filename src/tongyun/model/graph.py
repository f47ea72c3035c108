"""The operators of one step of a model, as data.

A graph is a tuple of `Operator`s: what is computed and moved, with no notion of the
chip that does it. Shapes and counts may be NumPy arrays, so that one pass prices a
whole grid of batch sizes and context lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tongyun.units import DType, Number


class Kind(StrEnum):
    """What an operator does, which decides how a chip prices it."""

    EMBED = "embed"
    MATMUL = "matmul"
    GROUPED_MATMUL = "grouped_matmul"
    ATTENTION = "attention"
    NORM = "norm"
    ELEMENTWISE = "elementwise"
    SAMPLE = "sample"
    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    SEND = "send"


COLLECTIVES = frozenset({Kind.ALL_REDUCE, Kind.ALL_GATHER, Kind.REDUCE_SCATTER, Kind.ALL_TO_ALL, Kind.SEND})


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator of one rank, executed `repeat` times in a step (once a layer, usually).

    All counts are for one execution on one rank. `m`, `n`, `k` are the matmul's rows,
    columns and inner size (for a grouped matmul `m` is the rows over all groups).
    """

    name: str
    kind: Kind
    repeat: int = 1
    m: Number = 0
    n: int = 0
    k: int = 0
    groups: Number = 1
    """Weight matrices touched: experts that receive at least one token, as an expectation."""
    compute: DType = DType.BF16
    """The type in which products are taken; it selects the peak rate."""
    flops: Number = 0
    read_bytes: Number = 0
    """Activations and KV read; weights are counted apart."""
    weight_bytes: Number = 0
    """Weights read in this execution; for experts only those touched."""
    write_bytes: Number = 0
    resident_bytes: Number = 0
    """Weights this operator keeps on the rank, over all `repeat`s."""
    axis: str = ""
    """Collectives only: the parallel axis (tp, ep, dp, pp)."""
    ranks: int = 1
    payload_bytes: Number = 0
    """Collectives only: bytes each rank puts in."""

    @property
    def moved_bytes(self) -> Number:
        return self.read_bytes + self.weight_bytes + self.write_bytes
