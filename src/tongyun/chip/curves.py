"""Times read off measured samples: straight in logarithms between them, or a sum of parts fitted to them
times how far off that sum is at the samples near by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tongyun.specs.samples import MatmulSample, MemorySample
from tongyun.units import Number

Array = NDArray[np.float64]
TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A time over a size: straight in log-log, flat before its first point.

    After its last it goes on in proportion, or stays where `grows` is false.
    """

    log_x: Array
    log_y: Array
    grows: bool = True

    @classmethod
    def through(cls, points: Iterable[tuple[float, float]], *, grows: bool = True) -> Curve:
        """Through (x, y) points in any order; several y at one x give their median.

        More never takes less: a dip, which only noise makes, is filled from the left.
        """
        at: dict[float, list[float]] = defaultdict(list)
        for x, y in points:
            at[x].append(y)
        xs = sorted(at)
        ys = np.maximum.accumulate([float(np.median(at[x])) for x in xs])
        return cls(log_x=np.log(xs), log_y=np.log(ys), grows=grows)

    def __call__(self, x: Number) -> Array:
        log_x = np.log(np.maximum(np.asarray(x, dtype=np.float64), TINY))
        beyond = np.maximum(log_x - self.log_x[-1], 0.0) if self.grows else 0.0
        return np.asarray(np.exp(np.interp(log_x, self.log_x, self.log_y) + beyond))


@dataclass(frozen=True, kw_only=True)
class Surface:
    """Curves over rows at several sizes of the weight matrix, straight in log-log between two sizes."""

    sizes: tuple[float, ...]
    curves: tuple[Curve, ...]

    @classmethod
    def through(cls, points: Iterable[tuple[float, float, float]]) -> Surface:
        """Through (size, x, y) points."""
        at: dict[float, list[tuple[float, float]]] = defaultdict(list)
        for size, x, y in points:
            at[size].append((x, y))
        sizes = sorted(at)
        return cls(sizes=tuple(sizes), curves=tuple(Curve.through(at[size]) for size in sizes))

    def __call__(self, size: float, x: Number) -> Array:
        logs = np.log(self.sizes)
        log_size = float(np.log(size))
        place = float(np.interp(log_size, logs, np.arange(len(logs))))
        low = int(place)
        high, part = min(low + 1, len(logs) - 1), place - low
        mixed = (1 - part) * np.log(self.curves[low](x)) + part * np.log(self.curves[high](x))
        return np.asarray(np.exp(mixed + max(log_size - logs[-1], 0.0)))


@dataclass(frozen=True, kw_only=True)
class Products:
    """Seconds of [m, k] × [k, n]: curves over rows at some inner widths k, and at some n for each.

    Straight in logarithms between samples. In proportion beyond the largest n and k, and
    to fewer columns too, but never less than the quickest call; flat below the smallest k.
    """

    widths: tuple[int, ...]
    columns: tuple[tuple[int, ...], ...]
    curves: tuple[tuple[Curve, ...], ...]
    least_s: float

    @classmethod
    def through(cls, samples: Iterable[MatmulSample]) -> Products:
        at: dict[int, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
        least = np.inf
        for s in samples:
            at[s.k][s.n].append((s.m, s.seconds))
            least = min(least, s.seconds)
        widths = tuple(sorted(at))
        return cls(
            widths=widths,
            columns=tuple(tuple(sorted(at[k])) for k in widths),
            curves=tuple(tuple(Curve.through(at[k][n]) for n in sorted(at[k])) for k in widths),
            least_s=float(least),
        )

    def __call__(self, m: Number, n: float, k: float) -> Array:
        low, part, beyond = _place(self.widths, k)
        logs = (1 - part) * np.log(self._at(low, m, n))
        if part:
            logs = logs + part * np.log(self._at(low + 1, m, n))
        return np.asarray(np.maximum(np.exp(logs) * max(beyond, 1.0), self.least_s))

    def sampled(self, n: float, k: float) -> float:
        """The part of a [k, n] matrix that the sample it is priced by has, at most."""
        most_k, most_n = self.widths[-1], max(columns[-1] for columns in self.columns)
        return min(1.0, most_n / n) * min(1.0, most_k / k)

    def _at(self, width: int, m: Number, n: float) -> Array:
        """At one of the sampled inner widths."""
        low, part, beyond = _place(self.columns[width], n)
        logs = (1 - part) * np.log(self.curves[width][low](m))
        if part:
            logs = logs + part * np.log(self.curves[width][low + 1](m))
        return np.asarray(np.exp(logs) * beyond)


def _place(levels: Sequence[int], value: float) -> tuple[int, float, float]:
    """The level below a value, the way to the next in logarithms, and the factor by which it is outside."""
    inside = min(max(value, levels[0]), levels[-1])
    logs = np.log(levels)
    place = float(np.interp(np.log(inside), logs, np.arange(len(levels))))
    low = min(int(place), len(levels) - 1)
    return low, place - low, value / inside


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Seconds as a sum of parts, each a coefficient times something counted."""

    coefficients: tuple[float, ...]

    @classmethod
    def fit(cls, counts: Sequence[tuple[float, ...]], seconds: Sequence[float]) -> Linear:
        """Least squares of relative errors, no part negative; with too few rows, the last part alone."""
        if len(counts) < len(counts[0]):
            counts = [(*(0.0 for _ in row[:-1]), row[-1]) for row in counts]
        weight = 1 / np.asarray(seconds)
        rows = np.asarray(counts, dtype=np.float64) * weight[:, None]
        return cls(coefficients=tuple(nonnegative(rows, np.ones(len(seconds))).tolist()))

    def __call__(self, *counts: Number) -> Number:
        total: Number = 0.0
        for coefficient, count in zip(self.coefficients, counts, strict=True):
            total = total + coefficient * count
        return total


def nonnegative(matrix: Array, target: Array) -> Array:
    """Least squares with no negative coefficient: drop the most negative, solve again."""
    scale = np.maximum(np.abs(matrix).max(axis=0), TINY)
    active = [i for i in range(matrix.shape[1]) if scale[i] > TINY]
    solution = np.zeros(matrix.shape[1])
    while active:
        part, *_ = np.linalg.lstsq(matrix[:, active] / scale[active], target, rcond=None)
        if part.min() >= 0:
            solution[active] = part / scale[active]
            break
        active.pop(int(part.argmin()))
    return solution


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """What was measured over what a fit says, at some levels of one size over another.

    Straight in the logarithms of all three between samples, flat beyond them: a cache that ends or
    threads that join in are nothing a sum of parts can tell.
    """

    levels: Array
    curves: tuple[tuple[Array, Array], ...]
    """Logarithms of the other size and of the ratio, for each level."""

    @classmethod
    def through(cls, points: Iterable[tuple[float, float, float]]) -> Ratios:
        """Through (level, size, ratio); several at one place give their mean in logarithms."""
        at: dict[float, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        for level, size, ratio in points:
            at[level][size].append(float(np.log(max(ratio, TINY))))
        curves = []
        for level in sorted(at):
            sizes = sorted(at[level])
            curves.append((np.log(sizes), np.array([np.mean(at[level][size]) for size in sizes])))
        return cls(levels=np.log(sorted(at)), curves=tuple(curves))

    def __call__(self, level: Number, size: Number) -> Array:
        logs = (np.log(np.maximum(np.asarray(each, dtype=np.float64), TINY)) for each in (level, size))
        log_level, log_size = np.broadcast_arrays(*logs)
        found = np.array([np.interp(log_size, *curve) for curve in self.curves])
        return np.asarray(np.exp(_between(self.levels, found, log_level)))


@dataclass(frozen=True, kw_only=True)
class Stall:
    """Seconds a byte waits, over the logarithm of a footprint in bytes: straight, flat at both ends."""

    log_x: Array
    y: Array

    @classmethod
    def through(cls, points: Iterable[tuple[float, float]]) -> Stall:
        """Through (bytes, seconds a byte); several at one footprint give their median, none is a dip."""
        at: dict[float, list[float]] = defaultdict(list)
        for x, y in points:
            at[x].append(y)
        xs = sorted(at)
        return cls(log_x=np.log(xs), y=np.maximum.accumulate([float(np.median(at[x])) for x in xs]))

    def __call__(self, x: Number) -> Array:
        log_x = np.log(np.maximum(np.asarray(x, dtype=np.float64), 1.0))
        return np.asarray(np.interp(log_x, self.log_x, self.y))


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Seconds a byte of weights is waited for, beyond what it takes where it was sampled again and again.

    Over the footprint of the step and that of the sample, at some numbers of rows of a product; straight
    in logarithms of both between samples.
    """

    rows: tuple[int, ...]
    curves: tuple[Curve, ...]
    """Seconds to read a byte, over the footprint."""

    @classmethod
    def through(cls, samples: Iterable[MemorySample]) -> Waiting:
        at: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for s in samples:
            at[s.rows].append((s.footprint_bytes, 1 / s.bytes_per_s))
        rows = tuple(sorted(at))
        return cls(rows=rows, curves=tuple(Curve.through(at[m], grows=False) for m in rows))

    def __call__(self, footprint_bytes: Number, rows: Number, sampled_bytes: Number = 0.0) -> Array:
        given = (np.asarray(each, float) for each in (footprint_bytes, rows, sampled_bytes))
        footprint, m, sampled = np.broadcast_arrays(*given)
        extra = np.array([curve(np.maximum(footprint, sampled)) - curve(sampled) for curve in self.curves])
        return _between(np.log(self.rows), extra, np.log(np.maximum(m, 1.0)))


def _between(levels: Array, found: Array, at: Array) -> Array:
    """Of values at each level, [levels, …], those at `at`, […]: straight in between, flat beyond."""
    place = np.interp(at, levels, np.arange(len(levels)))
    low = np.minimum(place.astype(np.intp), len(levels) - 1)
    high, part = np.minimum(low + 1, len(levels) - 1), place - low
    near, far = (np.take_along_axis(found, i[None], axis=0)[0] for i in (low, high))
    return np.asarray((1 - part) * near + part * far)
