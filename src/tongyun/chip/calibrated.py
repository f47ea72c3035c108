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
    passes    operators without products over [rows, width]; a `choice` of experts comes with
              each router, a `sum` with each layer of experts
    overhead  seconds that one of `what` adds: a step, a step shared by threads, an
              operator, a sparse layer, a sequence, a further token of a sequence, a byte
              written, a byte of logits; `host_…` and `replayed_…`: see below

What serving adds around steps (`served`, a `prompt_token`, a `coming_request`) is no part of their
price, and not read here.

Times of products are interpolated straight in logarithms: below the smallest sample a time
stays, above the largest it grows in proportion. Attention and passes are sums of parts, fitted
to their samples, times how far off the samples near by are. What does not fit the caches
depends on the footprint of the whole step: a byte of weights waits longer the more of them
there are than in its sample, and less the more rows a product has to hide it behind; a byte
of keys and values waits on top of its arithmetic.

A GPU works off a queue that the host fills. Its samples are seconds of the GPU, taken with
weights that no cache holds, and `host_…` are seconds that the host takes to queue one call of
a kind. Neither waits for the other before a step's last operators: see `roofline.laid_s`. A
decoding step that the engine has captured takes the host's time no more: it has a
`replayed_step`, a `replayed_operator` for each operator and a `replayed_sparse_layer` for each
router in place of all that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from tongyun.chip.curves import TINY, Linear, Products, Ratios, Stall, Surface, Waiting
from tongyun.model.graph import Kind, Operator, Precision
from tongyun.specs import Calibration, Chip
from tongyun.specs.samples import (
    AttentionSample,
    GroupedMatmulSample,
    MatmulSample,
    PassSample,
)
from tongyun.units import DType, Number

SHARED_MULTIPLY_ADDS = 1e5
"""From how many multiply-adds the engine's kernels share a product among threads."""
HOST = "host_"
"""What names of the host's seconds for a kind of operator begin with."""
ROUTER, EXPERTS_DOWN = "router", "experts_down"
EXPERTS_REST = ("experts_activation", EXPERTS_DOWN)
CACHED_BYTES = 2e6
"""Keys and values that any outer cache holds: samples within tell arithmetic, not memory."""


@dataclass(frozen=True, kw_only=True)
class Passing:
    """An operator without products: a sum of parts, and what samples say of it by width and rows."""

    parts: Linear
    ratios: Ratios

    @classmethod
    def through(cls, samples: list[PassSample]) -> Passing:
        counts = [(1.0, float(s.rows), float(s.rows * s.width)) for s in samples]
        parts = Linear.fit(counts, [s.seconds for s in samples])
        pairs = zip(samples, counts, strict=True)
        return cls(
            parts=parts,
            ratios=Ratios.through((s.width, s.rows, s.seconds / float(parts(*n))) for s, n in pairs),
        )

    def __call__(self, rows: Number, width: float) -> Number:
        return self.parts(1.0, rows, rows * width) * self.ratios(width, rows)


@dataclass(frozen=True, kw_only=True)
class Attending:
    """Attention, decoding or of prompts: a sum of parts, a wait for keys and values, and what samples
    say of that sum.

    They say it of the shape of heads that is nearest: by the sequences that decode or the new tokens of a
    prompt, and the keys that each attends to.
    """

    parts: Linear
    stall: Stall
    widths: tuple[tuple[int, int], ...]
    """Of each shape: elements of a token's queries, and of its keys."""
    ratios: tuple[Ratios, ...]

    @classmethod
    def through(cls, samples: list[AttentionSample], cached_bytes: float) -> Attending | None:
        """Samples of up to `cached_bytes` of keys and values tell arithmetic, the others the wait."""
        if not samples:
            return None
        within = [s for s in samples if _kv_bytes(s) <= cached_bytes] or samples
        parts = Linear.fit([_counts(s) for s in within], [s.seconds for s in within])
        stall = _stall([s for s in samples if _kv_bytes(s) > cached_bytes], parts)
        points: dict[tuple[int, int], list[tuple[float, float, float]]] = defaultdict(list)
        for s in samples:
            summed_s = float(parts(*_counts(s))) + _kv_bytes(s) * float(stall(_kv_bytes(s)))
            level = s.batch if s.queries == 1 else s.queries
            shape = s.heads * s.head_dim, s.kv_heads * s.head_dim
            points[shape].append((level, s.context + s.queries, s.seconds / summed_s))
        widths = tuple(sorted(points))
        return cls(
            parts=parts,
            stall=stall,
            widths=widths,
            ratios=tuple(Ratios.through(points[shape]) for shape in widths),
        )

    def __call__(self, op: Operator, level: Number, footprint_bytes: Number) -> Number:
        """Seconds of an operator; `level` as above, the footprint that of the step."""
        kv_bytes = op.read_bytes - op.write_bytes
        summed = self.parts(1.0, op.m, kv_bytes, op.flops) + kv_bytes * self.stall(footprint_bytes)
        assert op.attends is not None
        kept = op.attends
        each_bytes = kept.key_heads * kept.cached_width * kept.cache.bytes
        keys = kv_bytes / np.maximum(each_bytes * np.asarray(op.groups, dtype=np.float64), TINY)
        return summed * self._nearest(op.n * op.k, kept.key_heads * op.k)(level, keys)

    def _nearest(self, queries: int, keys: int) -> Ratios:
        """The ratios of the shape that differs by the smallest factors."""
        logs = np.log(np.array(self.widths) / (queries, keys))
        return self.ratios[int(np.argmin(np.abs(logs).sum(axis=1)))]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One machine's samples, ready to be asked."""

    matmul: Mapping[DType, Products]
    grouped: Mapping[DType, tuple[float, Surface, int]]
    """Seconds of a call, seconds of a group by elements of its up-projection and rows, and the most groups
    of a sample."""
    waiting: Waiting
    decode: Attending | None
    prefill: Attending | None
    passes: Mapping[str, Passing]
    overhead: Mapping[str, float]
    replays: bool = False
    """Whether the engine captures decoding steps."""

    @property
    def queued(self) -> bool:
        """Whether the device works off a queue that the host fills."""
        return any(what.startswith(HOST) for what in self.overhead)

    def replayed(self, operators: Iterable[Operator]) -> bool:
        """Whether these are of a captured step: nothing but decoding."""
        attending = [op for op in operators if op.kind is Kind.ATTENTION]
        decoding = [bool(np.all(np.asarray(_queries(op)) <= 1)) for op in attending]
        return self.replays and bool(decoding) and all(decoding)

    def gap_s(self, op: Operator) -> float:
        """What a captured step has beside an operator's work; a router brings its sparse layer's share."""
        each, sparse = (self.overhead.get(f"replayed_{what}", 0.0) for what in ("operator", "sparse_layer"))
        return each + sparse * (op.name == ROUTER)

    def one_call(self, operators: Iterable[Operator]) -> tuple[Operator, ...]:
        """Operators whose host's part is in another's: decoding, where its kernel has prompts beside it."""
        attending = [op for op in operators if op.kind is Kind.ATTENTION]
        single = [op for op in attending if np.all(np.asarray(_queries(op)) <= 1)]
        return tuple(single) if self.replays and len(single) < len(attending) else ()

    def launch_s(self, op: Operator, usual_s: float) -> Number:
        """What an operator costs however small it is; a router brings its sparse layer's share."""
        sparse_s = self.overhead.get("sparse_layer", 0.0) if op.name == ROUTER else 0.0
        return usual_s + sparse_s + self._host_s(op)

    def _host_s(self, op: Operator) -> Number:
        """The host's seconds to queue an operator."""
        if op.kind is Kind.ATTENTION:
            one, each = (self.overhead.get(HOST + kind, 0.0) for kind in ("decode", "prompt"))
            # An engine that captures steps has one kernel for all prompts, others queue them one by one.
            calls = 1.0 if self.replays else np.asarray(op.groups, dtype=np.float64)
            return np.where(_queries(op) > 1, each * calls, one)
        # One call does all that experts do.
        if op.name in EXPERTS_REST:
            return 0.0
        kinds = {Kind.MATMUL: "matmul", Kind.GROUPED_MATMUL: "experts"}
        kind = kinds.get(op.kind) or _pass_name(op)
        return self.overhead.get(HOST + kind, 0.0)

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
            products = self.matmul[dtype]
            sampled_bytes = op.weight_bytes * products.sampled(op.n, op.k)
            waited = op.weight_bytes * self.waiting(footprint_bytes, op.m, sampled_bytes)
            chosen = self._pass_s("choice", op.m, op.n) if op.name == ROUTER else 0.0
            return products(op.m, op.n, op.k) + waited + chosen
        if op.kind is Kind.GROUPED_MATMUL and dtype in self.grouped:
            return self._experts_s(op, dtype, footprint_bytes)
        if op.kind is Kind.ATTENTION:
            return self._attention_s(op, footprint_bytes)
        if op.kind is Kind.SAMPLE and "logit_byte" in self.overhead:
            return self.overhead["logit_byte"] * op.moved_bytes
        if op.name == "experts_activation" and self.grouped:
            # Measured as part of the experts.
            return 0.0 * op.m
        name = _pass_name(op)
        return self._pass_s(name, op.m, op.n) if name in self.passes else None

    def _pass_s(self, name: str, rows: Number, width: int) -> Number:
        """Seconds of a pass; none where it was not measured."""
        found = self.passes.get(name)
        return 0.0 if found is None else found(rows, width)

    def _experts_s(self, op: Operator, dtype: DType, footprint_bytes: Number) -> Number:
        """Up-projection pays for the arithmetic of all three parts, as they were measured together."""
        groups = np.asarray(op.groups, dtype=np.float64)
        rows = op.m / np.maximum(groups, TINY)
        call_s, surface, most = self.grouped[dtype]
        sampled_bytes = op.weight_bytes * np.minimum(most / np.maximum(groups, TINY), 1.0)
        waited = op.weight_bytes * self.waiting(footprint_bytes, rows, sampled_bytes)
        if op.name == EXPERTS_DOWN:
            # The residual is added to the sum of a token's experts.
            each = 1 if op.routed is None else op.routed.per_token
            return waited + self._pass_s("sum", op.m / each, op.n)
        return call_s + groups * surface(op.n * op.k, rows) + waited

    def _attention_s(self, op: Operator, footprint_bytes: Number) -> Number | None:
        queries = _queries(op)
        one = None if self.decode is None else self.decode(op, op.groups, footprint_bytes)
        many = None if self.prefill is None else self.prefill(op, queries, footprint_bytes)
        if one is None or many is None:
            return one if many is None else many
        return np.where(queries > 1, many, one)


def _queries(op: Operator) -> Number:
    """New tokens of a sequence, as attention has them."""
    return op.m / np.maximum(op.n * np.asarray(op.groups, dtype=np.float64), TINY)


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
    overhead = {s.what: s.seconds / s.count for s in samples.overhead}
    # A GPU's memory is what all of its samples wait for, and there is no cache to tell apart.
    queued = any(what.startswith(HOST) for what in overhead)
    most = np.inf if queued else CACHED_BYTES
    return Measured(
        matmul={dtype: Products.through(rows) for dtype, rows in products.items()},
        grouped=_grouped(samples.grouped_matmul, queued),
        waiting=Waiting.through(samples.memory),
        decode=Attending.through([s for s in samples.attention if s.queries == 1], most),
        prefill=Attending.through([s for s in samples.attention if s.queries > 1], np.inf),
        passes=_passes(samples.passes),
        overhead=overhead,
        replays=bool(samples.machine.get("replays", False)),
    )


def _grouped(samples: Iterable[GroupedMatmulSample], queued: bool) -> dict[DType, tuple[float, Surface, int]]:
    at: dict[DType, list[GroupedMatmulSample]] = defaultdict(list)
    for s in samples:
        at[s.dtype].append(s)
    found = {}
    for dtype, rows in at.items():
        call_s = _call_s(rows, 0.95 if queued else 0.5)
        points = [(s.n * s.k, s.m / s.groups, max(s.seconds - call_s, TINY) / s.groups) for s in rows]
        found[dtype] = call_s, Surface.through(points), max(s.groups for s in rows)
    return found


def _call_s(samples: list[GroupedMatmulSample], most: float) -> float:
    """What a call costs apart from its groups: (g₂·t₁ − g₁·t₂)/(g₂ − g₁) of the smallest, at one row each.

    At most this part of the quickest call: on a GPU nearly all of it may be, as groups run side by side.
    """
    size = min(s.n * s.k for s in samples)
    ones = sorted((s for s in samples if s.n * s.k == size), key=lambda s: (s.m / s.groups, s.groups))
    pairs = [(a, b) for a, b in pairwise(ones) if a.m * b.groups == b.m * a.groups]
    fixed = [
        (b.groups * a.seconds - a.groups * b.seconds) / (b.groups - a.groups)
        for a, b in pairs
        if b.groups > a.groups
    ]
    least = min(s.seconds for s in samples)
    return min(max(fixed[0], 0.0), most * least) if fixed else 0.0


def _stall(samples: Iterable[AttentionSample], parts: Linear) -> Stall:
    """What attention takes beyond its parts, for each byte of keys and values, by how many there are."""
    points = [(0.5 * CACHED_BYTES, 0.0), (CACHED_BYTES, 0.0)]
    for s in samples:
        rest_s = s.seconds - float(parts(*_counts(s)))
        points.append((_kv_bytes(s), max(rest_s, 0.0) / _kv_bytes(s)))
    return Stall.through(points)


def _passes(samples: Iterable[PassSample]) -> dict[str, Passing]:
    at: dict[str, list[PassSample]] = defaultdict(list)
    for s in samples:
        at[s.what].append(s)
    return {what: Passing.through(rows) for what, rows in at.items()}


def _counts(s: AttentionSample) -> tuple[float, ...]:
    """A call, query rows over all heads, bytes of keys and values, FLOPs: as the operator counts them."""
    pairs = s.queries * s.context + s.queries * (s.queries + 1) / 2
    flops = 4.0 * s.batch * s.heads * s.head_dim * pairs
    return 1.0, float(s.batch * s.queries * s.heads), _kv_bytes(s), flops


def _kv_bytes(s: AttentionSample) -> float:
    return 2 * s.batch * (s.context + s.queries) * s.kv_heads * s.head_dim * s.dtype.bytes
