"""The serving plan: price every candidate, drop what breaks a limit, keep best and Pareto.

Best is the most output tokens per second of the chips asked for, which for one kind of
chip is also the least money per token. Idle chips are paid for like busy ones. Decides
nothing about how an engine schedules; that is `steady`'s assumption.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tongyun.codesign.space import Question, cuts, grid
from tongyun.codesign.steady import USABLE_MEMORY, Pricing, Steady
from tongyun.cost import usd_per_mtoken
from tongyun.model.shard import Shard
from tongyun.specs import Corner
from tongyun.units import GB, MS, Source

Array = NDArray[np.float64]
REASONS = ("legality", "memory", "prefill", "ttft", "tpot")
"""Why a candidate is cut, in the order in which it is asked."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A deployment of equal replicas."""

    shard: Shard
    batch: int
    """Sequences decoding at once on one replica."""
    step_tokens: int
    """Token budget of an engine's step, for one attention group."""
    replicas: int
    idle_chips: int

    @property
    def pools(self) -> tuple[Mapping[str, object], ...]:
        """Groups of equal workers; here one that prefills and decodes."""
        ranks = self.shard.ranks
        return ({"role": "mixed", "replicas": self.replicas, "chips": self.replicas * ranks},)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a plan gives at one corner of the chip's ranges."""

    ttft_s: float
    tpot_s: float
    tok_s_per_chip: float
    joules_per_token: float
    usd_per_mtoken: float | None
    usd_per_mtoken_total: float | None
    """Per million tokens, input and output together."""

    @property
    def tok_s_per_user(self) -> float:
        return 1 / self.tpot_s


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A plan with what it gives: nominal, and at the slow and fast corner where the spec has ranges."""

    plan: Plan
    figures: Figures
    slow: Figures | None
    fast: Figures | None
    meets: bool
    sources: frozenset[Source]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Best and Pareto of a question, what was evaluated, and what was cut for which reason."""

    question: Question
    best: Offer | None
    pareto: tuple[Offer, ...]
    evaluated: int
    cut: Mapping[str, int]
    limit: str | None
    """Which limit binds when there is no best, in words."""


def plan(question: Question) -> Answer:
    """Search every candidate. Pareto holds plans within memory and TTFT that no other beats in
    both tokens per second per user and per chip; `best` also keeps TPOT."""
    return _Search(question).answer()


@dataclass(frozen=True, kw_only=True)
class _Points:
    """All candidates of all cuts, flattened into one axis."""

    cut: NDArray[np.intp]
    batch: Array
    budget: Array
    ttft_s: Array
    tpot_s: Array
    rate: Array
    """Output tokens per second per chip asked for."""
    memory_bytes: Array
    prefill_use: Array


class _Search:
    """One pass over a question; every property is computed once."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.chip = question.at(Corner.NOMINAL)
        self.cuts = cuts(question.model, self.chip, question.chips)
        self.room_bytes = USABLE_MEMORY * self.chip.memory_bytes

    def answer(self) -> Answer:
        fits = ~self._broken["memory"] & ~self._broken["prefill"] & ~self._broken["ttft"]
        meets = fits & ~self._broken["tpot"]
        front = pareto_front(1 / self.points.tpot_s, self.points.rate, fits)
        best = self._best(meets)
        return Answer(
            question=self.question,
            best=None if best is None else self._offers([best])[0],
            pareto=tuple(self._offers(front)),
            evaluated=len(self.points.batch),
            cut=self._count(),
            limit=None if best is not None else self._limit(),
        )

    @cached_property
    def points(self) -> _Points:
        shape = np.broadcast_shapes(*(axis.shape for axis in grid()))
        columns: dict[str, list[Array]] = {field: [] for field in _POINT_FIELDS}
        pricing = Pricing(self.question, self.chip, *grid())
        for shard in self.cuts.legal:
            for field, value in self._grid_of(pricing, shard).items():
                columns[field].append(np.broadcast_to(value, shape).ravel())
        flat = {field: np.concatenate(parts) for field, parts in columns.items()}
        return _Points(cut=np.repeat(np.arange(len(self.cuts.legal)), math.prod(shape)), **flat)

    def _grid_of(self, pricing: Pricing, shard: Shard) -> dict[str, Array]:
        """Every point of one cut. A cut that fits memory nowhere is not priced."""
        batch, budget = pricing.batch, pricing.budget
        needed = pricing.memory_bytes(shard)
        columns = {"batch": batch, "budget": budget, "memory_bytes": needed}
        if (needed > self.room_bytes).all():
            never = np.full((1, 1), np.inf)
            return columns | {"ttft_s": never, "tpot_s": never, "rate": 1 / never, "prefill_use": never}
        state = pricing.steady(shard)
        return columns | {
            "ttft_s": state.ttft_s,
            "tpot_s": state.tpot_s,
            "rate": self._rate(shard, state),
            "prefill_use": state.prefill_use,
        }

    def _rate(self, shard: Shard, state: Steady) -> Array:
        return state.tokens_per_s * (self.question.chips // shard.ranks) / self.question.chips

    @cached_property
    def _broken(self) -> dict[str, NDArray[np.bool_]]:
        """Which limit each point breaks; a point may break several."""
        p, q = self.points, self.question
        never = np.zeros(len(p.batch), dtype=bool)
        return {
            "memory": p.memory_bytes > self.room_bytes,
            "prefill": p.prefill_use >= 1,
            "ttft": never if q.ttft_s is None else p.ttft_s > q.ttft_s,
            "tpot": never if q.tpot_s is None else p.tpot_s > q.tpot_s,
        }

    def _count(self) -> dict[str, int]:
        """Candidates by the first reason that cuts them; legality counts cuts, the others points."""
        counts = Counter(legality=self.cuts.refused)
        left = np.ones(len(self.points.batch), dtype=bool)
        for reason, broken in self._broken.items():
            counts[reason] = int(np.count_nonzero(left & broken))
            left &= ~broken
        return {reason: counts[reason] for reason in REASONS}

    def _best(self, meets: NDArray[np.bool_]) -> int | None:
        """Fastest per chip; among equals the quicker for its users, then the smaller cut."""
        found = np.flatnonzero(meets)
        if not len(found):
            return None
        p = self.points
        order = np.lexsort((p.budget[found], p.cut[found], p.ttft_s[found], p.tpot_s[found], -p.rate[found]))
        return int(found[order[0]])

    def _offers(self, points: Sequence[int]) -> list[Offer]:
        """Figures at all corners, priced once for each cut."""
        offers: dict[int, Offer] = {}
        by_cut: dict[int, list[int]] = {}
        for point in points:
            by_cut.setdefault(int(self.points.cut[point]), []).append(point)
        ranged = self.question.chip.has_range or _price_has_range(self.question)
        corners = (Corner.NOMINAL, Corner.SLOW, Corner.FAST) if ranged else (Corner.NOMINAL,)
        index = np.asarray(points, dtype=np.intp)
        where = {point: place for place, point in enumerate(points)}
        # All points at once, so that cuts share what layers cost.
        pricings = [
            Pricing(
                self.question, self.question.at(corner), self.points.batch[index], self.points.budget[index]
            )
            for corner in corners
        ]
        for cut, members in by_cut.items():
            shard = self.cuts.legal[cut]
            places = [where[point] for point in members]
            states = [
                self._at(corner, pricing.steady(shard), shard, places)
                for corner, pricing in zip(corners, pricings, strict=True)
            ]
            for i, point in enumerate(members):
                rows = [figures[i] for figures, _ in states]
                offers[point] = Offer(
                    plan=self._plan(shard, point),
                    figures=rows[0],
                    slow=rows[1] if ranged else None,
                    fast=rows[2] if ranged else None,
                    meets=not any(broken[point] for broken in self._broken.values()),
                    sources=states[0][1],
                )
        return [offers[point] for point in points]

    def _plan(self, shard: Shard, point: int) -> Plan:
        replicas = self.question.chips // shard.ranks
        return Plan(
            shard=shard,
            batch=int(self.points.batch[point]) * shard.dp * shard.pp,
            step_tokens=int(self.points.budget[point]),
            replicas=replicas,
            idle_chips=self.question.chips - replicas * shard.ranks,
        )

    def _at(
        self, corner: Corner, state: Steady, shard: Shard, places: Sequence[int]
    ) -> tuple[list[Figures], frozenset[Source]]:
        rates = self._rate(shard, state)
        rows = [
            Figures(
                ttft_s=float(state.ttft_s[i]),
                tpot_s=float(state.tpot_s[i]),
                tok_s_per_chip=float(rates[i]),
                joules_per_token=float(state.joules_per_token[i]),
                usd_per_mtoken=self._usd(float(rates[i]), corner, total=False),
                usd_per_mtoken_total=self._usd(float(rates[i]), corner, total=True),
            )
            for i in places
        ]
        price = self.question.price
        paid = frozenset() if price is None else frozenset({price.chip_hour.source})
        return rows, state.sources | paid

    def _usd(self, rate: float, corner: Corner, *, total: bool) -> float | None:
        q = self.question
        if q.price is None:
            return None
        tokens_per_s = rate * (q.isl + q.osl) / q.osl if total else rate
        return float(usd_per_mtoken(tokens_per_s, 1, q.price.chip_hour.at(corner, more_is_better=False)))

    def _limit(self) -> str:
        """The limit that no candidate keeps, with the nearest candidate and by how much it misses."""
        p, broken = self.points, self._broken
        if broken["memory"].all():
            least = int(np.argmin(p.memory_bytes))
            over = p.memory_bytes[least] - self.room_bytes
            return (
                f"memory: {self._named(least)} needs {p.memory_bytes[least] / GB:.2f} GB on each chip, "
                f"{over / GB:.2f} GB ({over:.0f} bytes) more than the {self.room_bytes / GB:.2f} GB usable"
            )
        fits = ~broken["memory"] & ~broken["prefill"]
        if not fits.any():
            return "prefill: no candidate that fits memory keeps up with the prompts; more chips are needed"
        return self._latency_limit(fits)

    def _latency_limit(self, fits: NDArray[np.bool_]) -> str:
        p, q, broken = self.points, self.question, self._broken
        ttft = p.ttft_s / q.ttft_s if q.ttft_s else np.zeros_like(p.ttft_s)
        tpot = p.tpot_s / q.tpot_s if q.tpot_s else np.zeros_like(p.tpot_s)
        if (broken["ttft"] | ~fits).all():
            near = _least(ttft, fits)
            return self._missed("ttft", near, p.ttft_s[near], q.ttft_s)
        if (broken["tpot"] | ~fits).all():
            near = _least(tpot, fits)
            return self._missed("tpot", near, p.tpot_s[near], q.tpot_s)
        near = _least(np.maximum(ttft, tpot), fits)
        return (
            "ttft and tpot: each can be kept, but not both; nearest is "
            f"{self._named(near)} with TTFT {p.ttft_s[near] / MS:.4g} ms "
            f"and TPOT {p.tpot_s[near] / MS:.4g} ms"
        )

    def _missed(self, name: str, near: int, value: float, limit: float | None) -> str:
        over = value - (limit or 0.0)
        return (
            f"{name}: nearest is {self._named(near)} with {name.upper()} {value / MS:.4g} ms, "
            f"{over / MS:.4g} ms over the limit"
        )

    def _named(self, point: int) -> str:
        plan = self._plan(self.cuts.legal[int(self.points.cut[point])], point)
        return f"{plan.shard} at batch {plan.batch}"


_POINT_FIELDS = ("batch", "budget", "ttft_s", "tpot_s", "rate", "memory_bytes", "prefill_use")


def _least(values: Array, among: NDArray[np.bool_]) -> int:
    return int(np.argmin(np.where(among, values, np.inf)))


def _price_has_range(question: Question) -> bool:
    return question.price is not None and question.price.chip_hour.has_range


def pareto_front(x: Array, y: Array, among: NDArray[np.bool_]) -> list[int]:
    """Indices of points that no other point matches in one and beats in the other, by falling x.

    Of equal points the first is kept.
    """
    found = np.flatnonzero(among)
    order = found[np.lexsort((found, -y[found], -x[found]))]
    front, highest = [], -np.inf
    for point in order:
        if y[point] > highest:
            front.append(int(point))
            highest = float(y[point])
    return front
