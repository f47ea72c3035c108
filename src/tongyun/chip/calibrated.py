"""What a calibrated machine does with an operator, read off its measured samples.

What each kind of sample means:

    matmul    the same product again and again, so that a matrix that fits a cache is
              read from it; `dtype` is the type of the stored weights, and the one that
              `Precision.compute` names when a step is priced
    grouped   up-projection, activation and down-projection of `m` rows spread evenly over
              `groups` experts, written as the up-projection (n = 2 × width, k = hidden)
    memory    products of `rows` rows with matrices of `footprint_bytes` together, again and
              again, all threads
    attention `batch` sequences of `queries` new tokens behind `context` cached ones
    passes    operators without products over [rows, width]
    overhead  seconds that one of `what` adds: a step, a step shared by threads, an
              operator, a sparse layer, a sequence, a further token of a sequence, a byte
              written, a byte of logits

Times of products are interpolated straight in logarithms: below the smallest sample a time
stays, above the largest it grows in proportion. Attention and passes are sums of parts,
fitted to their samples. What does not fit the caches depends on the footprint of the whole
step: a byte of weights waits longer the more of them there are, and less the more rows a
product has to hide it behind; a byte of keys and values waits on top of its arithmetic.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tongyun.model.graph import Kind, Operator, Precision
from tongyun.specs import Calibration, Chip
from tongyun.specs.samples import (
    AttentionSample,
    GroupedMatmulSample,
    MatmulSample,
    MemorySample,
    PassSample,
)
from tongyun.units import DType, Number

Array = NDArray[np.float64]
TINY = 1e-12
SHARED_MULTIPLY_ADDS = 1e5
"""From how many multiply-adds the engine's kernels share a product among threads."""
CACHED_BYTES = 2e6
"""Keys and values that any outer cache holds: samples within tell arithmetic, not memory."""


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
    def fit(cls, counts: list[tuple[float, ...]], seconds: list[float]) -> Linear:
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
    """Seconds a byte of weights is waited for, beyond what it takes when the matrix was read just before.

    Over the footprint of the step, at some numbers of rows of a product; straight in
    logarithms of both between samples.
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

    def __call__(self, footprint_bytes: Number, rows: Number) -> Array:
        footprint, m = np.broadcast_arrays(np.asarray(footprint_bytes, float), np.asarray(rows, float))
        extra = np.array([curve(footprint) - np.exp(curve.log_y[0]) for curve in self.curves])
        place = np.interp(np.log(np.maximum(m, 1.0)), np.log(self.rows), np.arange(len(self.rows)))
        low = np.minimum(place.astype(np.intp), len(self.rows) - 1)
        high, part = np.minimum(low + 1, len(self.rows) - 1), place - low
        near, far = (np.take_along_axis(extra, i[None], axis=0)[0] for i in (low, high))
        return np.asarray((1 - part) * near + part * far)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One machine's samples, ready to be asked."""

    matmul: Mapping[DType, Products]
    grouped: Mapping[DType, tuple[float, Surface]]
    """Seconds of a call, and seconds of a group by elements of its up-projection and rows."""
    waiting: Waiting
    decode: Linear | None
    prefill: Linear | None
    stall: Stall
    passes: Mapping[str, Linear]
    overhead: Mapping[str, float]

    def launch_s(self, op: Operator, usual_s: float) -> float:
        """What an operator costs however small it is; a router brings its sparse layer's share."""
        return usual_s + (self.overhead.get("sparse_layer", 0.0) if op.name == "router" else 0.0)

    def work_s(self, op: Operator, dtype: DType, footprint_bytes: Number) -> Number | None:
        """Seconds of one execution without its launch; None for what this machine has no sample of.

        Samples write the same memory again and again; a step writes fresh memory, which costs a
        little more for every byte.
        """
        known = self._known_s(op, dtype, footprint_bytes)
        if known is None:
            return None
        return known + self.overhead.get("written_byte", 0.0) * op.write_bytes

    def _known_s(self, op: Operator, dtype: DType, footprint_bytes: Number) -> Number | None:
        if op.kind is Kind.MATMUL and dtype in self.matmul:
            return self.matmul[dtype](op.m, op.n, op.k) + op.weight_bytes * self.waiting(
                footprint_bytes, op.m
            )
        if op.kind is Kind.GROUPED_MATMUL and dtype in self.grouped:
            return self._experts_s(op, dtype, footprint_bytes)
        if op.kind is Kind.ATTENTION:
            return self._attention_s(op, footprint_bytes)
        if op.kind is Kind.SAMPLE and "logit_byte" in self.overhead:
            return self.overhead["logit_byte"] * op.moved_bytes
        if op.name == "experts_activation" and self.grouped:
            # Measured as part of the experts.
            return 0.0 * op.m
        found = self.passes.get(_pass_name(op))
        return None if found is None else found(1.0, op.m, op.m * op.n)

    def _experts_s(self, op: Operator, dtype: DType, footprint_bytes: Number) -> Number:
        """Up-projection pays for the arithmetic of all three parts, as they were measured together."""
        groups = np.asarray(op.groups, dtype=np.float64)
        rows = op.m / np.maximum(groups, TINY)
        waited = op.weight_bytes * self.waiting(footprint_bytes, rows)
        if op.name == "experts_down":
            return waited
        call_s, surface = self.grouped[dtype]
        return call_s + groups * surface(op.n * op.k, rows) + waited

    def _attention_s(self, op: Operator, footprint_bytes: Number) -> Number | None:
        kv_bytes = op.read_bytes - op.write_bytes
        counts = (1.0, op.m, kv_bytes, op.flops)
        one = None if self.decode is None else self.decode(*counts)
        many = None if self.prefill is None else self.prefill(*counts)
        if one is None or many is None:
            return one if many is None else many
        queries = op.m / np.maximum(op.n * np.asarray(op.groups, dtype=np.float64), TINY)
        return np.where(queries > 1, many, one) + kv_bytes * self.stall(footprint_bytes)


def _pass_name(op: Operator) -> str:
    """The kind of pass an operator is, as samples name it."""
    if op.kind is Kind.NORM:
        return "norm"
    return "rotate" if op.name == "rotate" else op.name.rpartition("_")[2]


def shared(operators: Iterable[Operator]) -> Number:
    """1 for a step in which some product is large enough for threads to share it, else 0.

    Threads sleep between steps, and waking them, often through a hypervisor, costs a step
    more than the products that they then help with tell.
    """
    most: Number = 0.0
    for op in operators:
        if op.kind in (Kind.MATMUL, Kind.GROUPED_MATMUL):
            most = np.maximum(most, op.flops)
    return np.where(np.asarray(most) >= 2 * SHARED_MULTIPLY_ADDS, 1.0, 0.0)


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
    """The samples of a chip's calibration, or None where it has none."""
    samples = chip.calibration
    if samples is None or not samples.memory:
        return None
    products: dict[DType, list[MatmulSample]] = defaultdict(list)
    for s in samples.matmul:
        products[s.dtype].append(s)
    decode = _attention([s for s in samples.attention if s.queries == 1 and _kv_bytes(s) <= CACHED_BYTES])
    return Measured(
        matmul={dtype: Products.through(rows) for dtype, rows in products.items()},
        grouped=_grouped(samples.grouped_matmul),
        waiting=Waiting.through(samples.memory),
        decode=decode,
        prefill=_attention([s for s in samples.attention if s.queries > 1]),
        stall=_stall([s for s in samples.attention if s.queries == 1], decode),
        passes=_passes(samples.passes),
        overhead={s.what: s.seconds / s.count for s in samples.overhead},
    )


def _grouped(samples: Iterable[GroupedMatmulSample]) -> dict[DType, tuple[float, Surface]]:
    at: dict[DType, list[GroupedMatmulSample]] = defaultdict(list)
    for s in samples:
        at[s.dtype].append(s)
    found = {}
    for dtype, rows in at.items():
        call_s = _call_s(rows)
        points = [(s.n * s.k, s.m / s.groups, max(s.seconds - call_s, TINY) / s.groups) for s in rows]
        found[dtype] = call_s, Surface.through(points)
    return found


def _call_s(samples: list[GroupedMatmulSample]) -> float:
    """What a call costs apart from its groups: (g₂·t₁ − g₁·t₂)/(g₂ − g₁) of the smallest, at one row each."""
    size = min(s.n * s.k for s in samples)
    ones = sorted((s for s in samples if s.n * s.k == size), key=lambda s: (s.m / s.groups, s.groups))
    pairs = [(a, b) for a, b in pairwise(ones) if a.m * b.groups == b.m * a.groups]
    fixed = [
        (b.groups * a.seconds - a.groups * b.seconds) / (b.groups - a.groups)
        for a, b in pairs
        if b.groups > a.groups
    ]
    least = min(s.seconds for s in samples)
    return min(max(fixed[0], 0.0), least / 2) if fixed else 0.0


def _stall(samples: Iterable[AttentionSample], decode: Linear | None) -> Stall:
    """What decoding takes beyond its arithmetic, for each byte of keys and values, by how many there are."""
    points = [(0.5 * CACHED_BYTES, 0.0), (CACHED_BYTES, 0.0)]
    for s in samples:
        if decode is not None and _kv_bytes(s) > CACHED_BYTES:
            rest_s = s.seconds - float(decode(*_counts(s)))
            points.append((_kv_bytes(s), max(rest_s, 0.0) / _kv_bytes(s)))
    return Stall.through(points)


def _passes(samples: Iterable[PassSample]) -> dict[str, Linear]:
    at: dict[str, list[PassSample]] = defaultdict(list)
    for s in samples:
        at[s.what].append(s)
    return {
        what: Linear.fit([(1.0, s.rows, s.rows * s.width) for s in rows], [s.seconds for s in rows])
        for what, rows in at.items()
    }


def _attention(samples: list[AttentionSample]) -> Linear | None:
    if not samples:
        return None
    return Linear.fit([_counts(s) for s in samples], [s.seconds for s in samples])


def _counts(s: AttentionSample) -> tuple[float, ...]:
    """A call, query rows over all heads, bytes of keys and values, FLOPs: as the operator counts them."""
    pairs = s.queries * s.context + s.queries * (s.queries + 1) / 2
    flops = 4.0 * s.batch * s.heads * s.head_dim * pairs
    return 1.0, float(s.batch * s.queries * s.heads), _kv_bytes(s), flops


def _kv_bytes(s: AttentionSample) -> float:
    return 2 * s.batch * (s.context + s.queries) * s.kv_heads * s.head_dim * s.dtype.bytes
