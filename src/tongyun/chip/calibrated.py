"""What a calibrated chip does with an operator, read off its measured samples.

Curves are interpolated in logarithms and never extended beyond their ends. What each
kind of sample has to mean:

    matmul    the same product again and again, so that a matrix that fits a cache is
              read from it; `dtype` is the type of the stored weights, and the one that
              `Precision.compute` names when a step is priced
    grouped   `m` rows over `groups` matrices, likewise
    memory    streaming through `footprint_bytes` again and again, all threads
    attention `batch` sequences of `queries` new tokens behind `context` cached ones
    overhead  `sequence`: seconds a sequence adds to a step beyond its operators

Reading weights that do not fit a cache is priced by the memory curve at the footprint
of the whole step, beside these rates; the slower of the two holds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tongyun.model.graph import Precision
from tongyun.specs import Calibration, Chip
from tongyun.specs.samples import AttentionSample
from tongyun.units import DType, Number

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A positive quantity over a positive variable, straight in log-log, flat beyond its ends."""

    log_x: Array
    log_y: Array

    @classmethod
    def through(cls, points: Iterable[tuple[float, float]]) -> Curve:
        """Through (x, y) points in any order; several y at one x give their median."""
        at: dict[float, list[float]] = defaultdict(list)
        for x, y in points:
            at[x].append(y)
        xs = sorted(at)
        return cls(log_x=np.log(xs), log_y=np.log([float(np.median(at[x])) for x in xs]))

    @classmethod
    def rates(cls, points: Iterable[tuple[float, float]]) -> Curve:
        """Work per second over work, through (x, y): noise may not make more work take less time."""
        raw = cls.through(points)
        longest = np.maximum.accumulate(raw.log_x - raw.log_y)
        return cls(log_x=raw.log_x, log_y=raw.log_x - longest)

    def __call__(self, x: Number) -> Array:
        positive = np.maximum(np.asarray(x, dtype=np.float64), 1e-12)
        return np.asarray(np.exp(np.interp(np.log(positive), self.log_x, self.log_y)))


@dataclass(frozen=True, kw_only=True)
class Surface:
    """Curves over rows at several sizes of the weight matrix, straight between two sizes."""

    sizes: tuple[float, ...]
    curves: tuple[Curve, ...]

    @classmethod
    def through(cls, points: Iterable[tuple[float, float, float]]) -> Surface:
        """Through (size, x, y) points."""
        at: dict[float, list[tuple[float, float]]] = defaultdict(list)
        for size, x, y in points:
            at[size].append((x, y))
        sizes = sorted(at)
        return cls(sizes=tuple(sizes), curves=tuple(Curve.rates(at[size]) for size in sizes))

    def __call__(self, size: float, x: Number) -> Array:
        logs = np.log(self.sizes)
        place = float(np.interp(np.log(max(size, 1e-12)), logs, np.arange(len(logs))))
        low = int(place)
        high = min(low + 1, len(self.sizes) - 1)
        part = place - low
        mixed = (1 - part) * np.log(self.curves[low](x)) + part * np.log(self.curves[high](x))
        return np.asarray(np.exp(mixed))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Curves of one machine; an absent one is None and the spec's figures stand in for it."""

    matmul: dict[DType, Surface]
    """FLOPs per second by elements of the weight matrix and rows."""
    grouped: dict[DType, Surface]
    """FLOPs per second by elements of one expert's matrix and rows per expert."""
    memory: Curve | None
    """Bytes per second by footprint in bytes."""
    decode: Curve | None
    """Attention FLOPs per second with one query, by keys."""
    prefill: Curve | None
    """Attention FLOPs per second by queries, where there are more than one."""
    sequence_s: float

    def attention_flops_per_s(self, queries: Number, keys: Number) -> Array | None:
        """Rate of attention, one query or many; None where nothing was sampled."""
        one = self.decode(keys) if self.decode else None
        many = self.prefill(queries) if self.prefill else None
        if one is None or many is None:
            return one if many is None else many
        return np.where(np.asarray(queries) > 1, many, one)


def engine_precision(calibration: Calibration) -> Precision:
    """The types in which the calibrated engine keeps weights and KV; products are named by their weights."""
    machine = calibration.machine
    weights = DType(str(machine["weights"]))
    return Precision(
        weights=weights,
        experts=weights,
        exact=weights,
        compute=weights,
        expert_compute=weights,
        activations=DType(str(machine["activations"])),
        kv=DType(str(machine["kv"])),
    )


@lru_cache(maxsize=64)
def measured(chip: Chip) -> Measured | None:
    """The curves of a chip's calibration, or None where it has none."""
    samples = chip.calibration
    if samples is None:
        return None
    memory = [(s.footprint_bytes, s.bytes_per_s) for s in samples.memory]
    overhead = [s.seconds / s.count for s in samples.overhead if s.what == "sequence"]
    return Measured(
        matmul=_surfaces(
            (s.dtype, s.n * s.k, s.m, 2.0 * s.m * s.n * s.k / s.seconds) for s in samples.matmul
        ),
        grouped=_surfaces(
            (s.dtype, s.n * s.k, s.m / s.groups, 2.0 * s.m * s.n * s.k / s.seconds)
            for s in samples.grouped_matmul
        ),
        memory=Curve.through(memory) if memory else None,
        decode=_rates([(s.context + 1, _rate(s)) for s in samples.attention if s.queries == 1]),
        prefill=_rates([(s.queries, _rate(s)) for s in samples.attention if s.queries > 1]),
        sequence_s=float(np.median(overhead)) if overhead else 0.0,
    )


def _surfaces(rows: Iterable[tuple[DType, float, float, float]]) -> dict[DType, Surface]:
    at: dict[DType, list[tuple[float, float, float]]] = defaultdict(list)
    for dtype, size, x, rate in rows:
        at[dtype].append((size, x, rate))
    return {dtype: Surface.through(points) for dtype, points in at.items()}


def _rates(points: Sequence[tuple[float, float]]) -> Curve | None:
    return Curve.rates(points) if points else None


def _rate(sample: AttentionSample) -> float:
    """FLOPs per second of causal attention: 4·heads·width for each query-key pair."""
    pairs = sample.queries * sample.context + sample.queries * (sample.queries + 1) / 2
    return 4 * sample.heads * sample.head_dim * sample.batch * pairs / sample.seconds
