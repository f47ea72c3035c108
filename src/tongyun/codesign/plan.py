"""The serving plan: price every candidate, drop what breaks a limit, keep best and Pareto.

Best is the most output tokens per second of the chips asked for, which for one kind of
chip is also the least money per token. Idle chips are paid for like busy ones. Decides
nothing about how an engine schedules; that is `steady`'s assumption.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tongyun.codesign.answer import Answer, Figures, Offer, Plan
from tongyun.codesign.leftover import Kinds, Leftover
from tongyun.codesign.offers import Found, Place, offers
from tongyun.codesign.places import Room, domain_of
from tongyun.codesign.space import Question, cuts, grid
from tongyun.codesign.steady import USABLE_MEMORY, Pricing
from tongyun.codesign.unmet import unmet
from tongyun.model.shard import Shard

__all__ = ["REASONS", "Answer", "Figures", "Offer", "Plan", "pareto_front", "plan"]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
REASONS = ("legality", "depth", "memory", "prefill", "ttft", "tpot")
"""Why a candidate is cut, in the order in which it is asked; the first two count cuts, the others points."""


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
    tokens_per_s: Array
    """Of one replica."""
    memory_bytes: Array
    prefill_use: Array


class _Search:
    """One pass over a question; every property is computed once."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.chip = question.at()
        self.cuts = cuts(question.model, self.chip, question.chips)
        self.room = Room.of(question.chips, domain_of(self.chip))
        self.room_bytes = USABLE_MEMORY * self.chip.memory_bytes

    def answer(self) -> Answer:
        front = pareto_front(1 / self.points.tpot_s, self.rate, self._fits)
        best = self._best()
        found = [self._found(point, self.points.tpot_s[point]) for point in front]
        if best is not None:
            found.append(self._found(best, self.question.tpot_s))
        priced = offers(self.question, found)
        return Answer(
            question=self.question,
            best=None if best is None else priced[-1],
            pareto=tuple(priced[: len(front)]),
            evaluated=len(self.points.batch),
            cut=self._count(),
            limit=None if best is not None else self._limit(),
        )

    # ── what there is ────────────────────────────────────────────────────────────────

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
            return columns | {
                "ttft_s": never,
                "tpot_s": never,
                "tokens_per_s": 1 / never,
                "prefill_use": never,
            }
        state = pricing.steady(shard)
        return columns | {
            "ttft_s": state.ttft_s,
            "tpot_s": state.tpot_s,
            "tokens_per_s": state.tokens_per_s,
            "prefill_use": state.prefill_use,
        }

    @cached_property
    def _broken(self) -> dict[str, Mask]:
        """Which limit each point breaks; a point may break several."""
        p, q = self.points, self.question
        never = np.zeros(len(p.batch), dtype=bool)
        return {
            "memory": p.memory_bytes > self.room_bytes,
            "prefill": p.prefill_use >= 1,
            "ttft": never if q.ttft_s is None else p.ttft_s > q.ttft_s,
            "tpot": never if q.tpot_s is None else p.tpot_s > q.tpot_s,
        }

    @cached_property
    def _fits(self) -> Mask:
        """Points within memory and TTFT."""
        return ~self._broken["memory"] & ~self._broken["prefill"] & ~self._broken["ttft"]

    def _count(self) -> dict[str, int]:
        """Candidates by the first reason that cuts them."""
        counts = Counter(legality=self.cuts.refused, depth=self.cuts.untried)
        left = np.ones(len(self.points.batch), dtype=bool)
        for reason, broken in self._broken.items():
            counts[reason] = int(np.count_nonzero(left & broken))
            left &= ~broken
        return {reason: counts[reason] for reason in REASONS}

    # ── how it is put on the chips ───────────────────────────────────────────────────

    @cached_property
    def _replicas(self) -> NDArray[np.intp]:
        """Replicas of each cut that find a place, as many as there can be."""
        known: dict[tuple[int, int], int] = {}
        for shard in self.cuts.legal:
            place = self.room.place(shard)
            if place not in known:
                known[place] = self.room.fits(shard)
        return np.array([known[self.room.place(shard)] for shard in self.cuts.legal], dtype=np.intp)

    @cached_property
    def _left(self) -> list[Room]:
        """What replicas of each cut leave over."""
        pairs = zip(self.cuts.legal, self._replicas, strict=True)
        return [self.room.without(shard, int(count)) for shard, count in pairs]

    @cached_property
    def _filling(self) -> Leftover | None:
        """None where no cut leaves anything over that another could use."""
        smallest = self.cuts.legal[0].ranks if self.cuts.legal else math.inf
        if all(left.chips < smallest for left in self._left):
            return None
        p, ok = self.points, np.flatnonzero(self._fits)
        kinds = Kinds(
            cut=p.cut[ok], tpot_s=p.tpot_s[ok], tokens_per_s=p.tokens_per_s[ok], shards=self.cuts.legal
        )
        return Leftover(kinds, self.room, self.question.tpot_s)

    @cached_property
    def _gains(self) -> Array:
        """Tokens per second that fill what each cut leaves over, by cut and rung of the filling's ladder."""
        filling = self._filling
        if filling is None:
            return np.zeros((len(self.cuts.legal), 1))
        known: dict[tuple[tuple[int, int], ...], Array] = {}
        keys = [tuple(left.gaps.items()) for left in self._left]
        for key, left in zip(keys, self._left, strict=True):
            if key not in known:
                known[key] = filling.gain(left)
        return np.stack([known[key] for key in keys])

    def _rates(self, rung: NDArray[np.intp]) -> Array:
        """Output tokens per second per chip asked for; the rest filled at the rung of each point."""
        p = self.points
        own = p.tokens_per_s * self._replicas[p.cut]
        filled = np.where(rung >= 0, self._gains[p.cut, np.maximum(rung, 0)], 0.0)
        return np.asarray((own + filled) / self.question.chips)

    @cached_property
    def rate(self) -> Array:
        """With fillings no slower than the point itself."""
        filling, p = self._filling, self.points
        rung = np.zeros(len(p.cut), dtype=np.intp) if filling is None else filling.at(p.tpot_s)
        return self._rates(rung)

    def _best(self) -> int | None:
        """Fastest per chip; among equals the quicker for its users, then the smaller cut."""
        p, filling = self.points, self._filling
        found = np.flatnonzero(self._fits & ~self._broken["tpot"])
        if not len(found):
            return None
        top = -1 if filling is None else len(filling.times) - 1
        limit = self.question.tpot_s
        rung = top if filling is None or limit is None else int(filling.at(np.array(limit)))
        rate = self._rates(np.full(len(p.cut), max(rung, 0), dtype=np.intp))[found]
        order = np.lexsort((p.budget[found], p.cut[found], p.ttft_s[found], p.tpot_s[found], -rate))
        return int(found[order[0]])

    def _found(self, point: int, tpot_s: float | None) -> Found:
        """The deployment of one point, what its replicas leave over filled."""
        cut = int(self.points.cut[point])
        left, filling = self._left[cut], self._filling
        kinds = [(self._place(point), int(self._replicas[cut]))]
        if filling is not None and left.chips:
            ok = np.flatnonzero(self._fits)
            slowest = filling.times[-1] if tpot_s is None else tpot_s
            rung = int(filling.at(np.array(slowest)))
            for pick, count in (filling.picks(left, rung) if rung >= 0 else {}).items():
                kinds.append((self._place(int(ok[pick])), count))
        used = sum(count * place.shard.ranks for place, count in kinds)
        idle = self.question.chips - used
        return Found(
            kinds=tuple(kinds),
            idle_chips=idle,
            idle_reason=self._idle(idle, tpot_s) if idle else "",
            meets=not any(broken[point] for broken in self._broken.values()),
        )

    def _place(self, point: int) -> Place:
        p = self.points
        return Place(
            shard=self.cuts.legal[int(p.cut[point])],
            batch=float(p.batch[point]),
            budget=float(p.budget[point]),
        )

    def _idle(self, idle: int, tpot_s: float | None) -> str:
        """Why chips are left: the smallest replica that could stand on them needs more."""
        p = self.points
        able = self._fits if tpot_s is None else self._fits & (p.tpot_s <= tpot_s * (1 + 1e-12))
        least = min(self.cuts.legal[cut].ranks for cut in np.unique(p.cut[able]))
        chips = "chip stays" if idle == 1 else "chips stay"
        apart = ", and they lie in different domains" if idle >= least else ""
        return f"{idle} {chips} idle: the smallest replica as quick takes {least}{apart}"

    def _limit(self) -> str:
        p = self.points
        values = {"ttft_s": p.ttft_s, "tpot_s": p.tpot_s, "memory_bytes": p.memory_bytes}
        return unmet(self.question, self._broken, values, self._named, self.room_bytes)

    def _named(self, point: int) -> str:
        place = self._place(point)
        return f"{place.shard} at batch {int(place.batch) * place.shard.dp * place.shard.pp}"


_POINT_FIELDS = ("batch", "budget", "ttft_s", "tpot_s", "tokens_per_s", "memory_bytes", "prefill_use")


def pareto_front(x: Array, y: Array, among: Mask) -> list[int]:
    """Indices of points that no other point matches in one and beats in the other, by falling x.

    Of equal points the first is kept.
    """
    found = np.flatnonzero(among)
    order = found[np.lexsort((found, -y[found], -x[found]))]
    highest = np.maximum.accumulate(y[order])
    rises = np.ones(len(order), dtype=bool)
    rises[1:] = highest[1:] > highest[:-1]
    return [int(point) for point in order[rises]]
