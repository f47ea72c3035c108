"""Measured rows as spec files hold them: plain SI values, one dataclass a kind.

The field names are the columns in the file.
"""

from __future__ import annotations

from dataclasses import dataclass

from tongyun.units import DType

Cached = int
"""A count that may be 0, unlike every other one in a sample."""


@dataclass(frozen=True, kw_only=True)
class MatmulSample:
    """[m, k] × [k, n] took `seconds`."""

    dtype: DType
    m: int
    n: int
    k: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class GroupedMatmulSample:
    """`m` rows spread over `groups` weight matrices [k, n] took `seconds`."""

    dtype: DType
    m: int
    n: int
    k: int
    groups: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class MemorySample:
    """Products of `rows` rows with `footprint_bytes` of weights, again and again, read `bytes_per_s`."""

    footprint_bytes: int
    rows: int = 1
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class AttentionSample:
    """`batch` sequences, each `queries` new tokens behind `context` cached ones, took `seconds`."""

    dtype: DType
    batch: int
    queries: int
    context: Cached
    heads: int
    kv_heads: int
    head_dim: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PassSample:
    """An operator without products took `seconds` over [rows, width].

    `norm`, `rotate`, `activation`; a router's `choice` of experts, and the `sum` with a residual.
    """

    what: str
    rows: int
    width: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class OverheadSample:
    """Something with a fixed price took `seconds`: `what` happened `count` times in all."""

    what: str
    count: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ServedSample:
    """With the tokens of `streams` sequences being sent, a step took `step_s` longer than its price, which
    is that of a step without a server, and a first token was `way_s` outside the engine."""

    streams: int
    step_s: float
    way_s: float


@dataclass(frozen=True, kw_only=True)
class CollectiveSample:
    """A collective over `ranks` of `payload_bytes` ran at this bus bandwidth (nccl-tests' definition)."""

    collective: str
    ranks: int
    payload_bytes: int
    bus_bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class EfficiencySample:
    """A collective reached `fraction` of the link's peak."""

    collective: str
    nodes: int
    ranks: int
    payload_bytes: int
    fraction: float
