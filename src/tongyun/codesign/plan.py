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
from tongyun.codesign.offers import Found, Pair, Place, offers
from tongyun.codesign.places import Room, domain_of
from tongyun.codesign.space import Question, cuts, grid
from tongyun.codesign.split import Pairs, Split
from tongyun.codesign.steady import USABLE_MEMORY, Pricing
from tongyun.codesign.unmet import unmet
from tongyun.model.shard import Shard

__all__ = ["REASONS", "Answer", "Figures", "Offer", "Plan", "pareto_front", "plan"]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
REASONS = ("legality", "depth", "memory", "prefill", "ttft", "tpot", "beaten")
"""Why a candidate is cut, in the order in which it is asked. The first two count cuts, the others
points; the last counts combinations of two pools and a division of the chips that others stand for."""


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
        self.pricing = Pricing(question, self.chip, *grid())

    def answer(self) -> Answer:
        found, best = self._pareto(), self._best_of_both()
        priced = offers(self.question, found if best is None else [*found, best])
        pooled = 0 if self.split is None else self.split.tried
        return Answer(
            question=self.question,
            best=None if best is None else priced[-1],
            pareto=tuple(priced[: len(found)]),
            evaluated=len(self.points.batch) + pooled,
            cut=self._count(),
            limit=None if best is not None else self._limit(),
        )

    @cached_property
    def split(self) -> Split | None:
        """The search over two pools, where it is asked for and there is a link to hand over on."""
        if self.question.pools == "mixed" or not Split.is_possible(self.question, self.chip):
            return None
        return Split(self.pricing, self.cuts.legal, self.room_bytes)

    def _pareto(self) -> list[Found | Pair]:
        """Of both kinds of deployment, those that no other of either beats."""
        p, pairs = self.points, self._pairs
        tpot_s, rate, among = p.tpot_s, self.rate, self._fits
        if pairs is not None:
            tpot_s = np.concatenate([tpot_s, pairs.splits.tpot_s])
            rate = np.concatenate([rate, pairs.rates(pairs.splits.tpot_s)])
            among = np.concatenate([among, np.ones(len(pairs.splits.tpot_s), dtype=bool)])
        found: list[Found | Pair] = []
        for point in pareto_front(1 / tpot_s, rate, among):
            at = point - len(p.tpot_s)
            if at < 0:
                found.append(self._found(point, p.tpot_s[point]))
            elif pairs is not None:
                found.append(self._pair(pairs, at, float(pairs.splits.tpot_s[at])))
        return found

    @cached_property
    def _pairs(self) -> Pairs | None:
        """Deployments of two pools, what they leave over filled."""
        found = None if self.split is None else self.split.found
        if self.split is None or found is None:
            return None
        left = [self.split.left(found, at) for at in range(len(found.x))]
        return Pairs(splits=found, left=left, filling=self._filling, chips=self.question.chips)

    def _pair(self, pairs: Pairs, at: int, tpot_s: float | None) -> Pair:
        assert self.split is not None
        picked = self._picked(pairs.left[at], tpot_s)
        return self.split.pair(pairs.splits, at, picked, self._beside(tpot_s))

    def _beside(self, tpot_s: float | None) -> str:
        """Why no more replicas that do both stand beside two pools."""
        if self.question.pools == "split":
            return ""
        least = self._least(tpot_s)
        if least is None:
            return ", nor does a replica that does both keep up"
        return f"; the smallest replica that does both as quick takes {least}"

    def _best_of_both(self) -> Found | Pair | None:
        """The faster per chip; among equals replicas that do both."""
        best, pairs, limit = self._best(), self._pairs, self.question.tpot_s
        if pairs is not None:
            slowest = np.inf if limit is None else limit
            rates = np.where(pairs.splits.tpot_s <= slowest, pairs.rates(slowest), 0.0)
            # By rising time between tokens, so that of equals the quickest comes first.
            top = int(np.argmax(rates)) if len(rates) else 0
            if len(rates) and rates[top] > (0.0 if best is None else best[1]):
                return self._pair(pairs, top, limit)
        return None if best is None else self._found(best[0], limit)

    # ── what there is ────────────────────────────────────────────────────────────────

    @cached_property
    def points(self) -> _Points:
        shape = np.broadcast_shapes(*(axis.shape for axis in grid()))
        columns: dict[str, list[Array]] = {field: [] for field in _POINT_FIELDS}
        pricing = self.pricing
        legal = self.cuts.legal if self.question.pools != "split" else ()
        for shard in legal:
            for field, value in self._grid_of(pricing, shard).items():
                columns[field].append(np.broadcast_to(value, shape).ravel())
        flat = {field: np.concatenate([np.zeros(0), *parts]) for field, parts in columns.items()}
        return _Points(cut=np.repeat(np.arange(len(legal)), math.prod(shape)), **flat)

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
        if self.split is not None:
            first, second = self.split.prefill, self.split.decode
            counts["memory"] += first.too_large + second.too_large
            counts["ttft"] += first.too_slow
            counts["tpot"] += second.too_slow
            counts["beaten"] = self.split.beaten
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
        p, ok = self.points, np.flatnonzero(self._fits)
        whole = self.split is None and all(left.chips < smallest for left in self._left)
        if not len(ok) or whole:
            return None
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

    def _best(self) -> tuple[int, float] | None:
        """Of replicas that do both, the point fastest per chip, and its rate; among equals the quicker
        for its users, then the smaller cut."""
        p, filling = self.points, self._filling
        found = np.flatnonzero(self._fits & ~self._broken["tpot"])
        if not len(found):
            return None
        top = -1 if filling is None else len(filling.times) - 1
        limit = self.question.tpot_s
        rung = top if filling is None or limit is None else int(filling.at(np.array(limit)))
        rate = self._rates(np.full(len(p.cut), max(rung, 0), dtype=np.intp))[found]
        order = np.lexsort((p.budget[found], p.cut[found], p.ttft_s[found], p.tpot_s[found], -rate))
        return int(found[order[0]]), float(rate[order[0]])

    def _found(self, point: int, tpot_s: float | None) -> Found:
        """The deployment of one point, what its replicas leave over filled."""
        cut = int(self.points.cut[point])
        kinds = [(self._place(point), int(self._replicas[cut])), *self._picked(self._left[cut], tpot_s)]
        used = sum(count * place.shard.ranks for place, count in kinds)
        idle = self.question.chips - used
        return Found(
            kinds=tuple(kinds),
            idle_chips=idle,
            idle_reason=self._idle(idle, tpot_s) if idle else "",
            meets=not any(broken[point] for broken in self._broken.values()),
        )

    def _picked(self, left: Room, tpot_s: float | None) -> tuple[tuple[Place, int], ...]:
        """Replicas that do both and fill what is left, no slower than a time between tokens."""
        filling = self._filling
        if filling is None or not left.chips:
            return ()
        slowest = filling.times[-1] if tpot_s is None else tpot_s
        rung = int(filling.at(np.array(slowest)))
        picks = filling.picks(left, rung) if rung >= 0 else {}
        ok = np.flatnonzero(self._fits)
        return tuple((self._place(int(ok[pick])), count) for pick, count in picks.items())

    def _place(self, point: int) -> Place:
        p = self.points
        return Place(
            shard=self.cuts.legal[int(p.cut[point])],
            batch=float(p.batch[point]),
            budget=float(p.budget[point]),
        )

    def _idle(self, idle: int, tpot_s: float | None) -> str:
        """Why chips are left: the smallest replica that could stand on them needs more."""
        least = self._least(tpot_s)
        chips = "chip stays" if idle == 1 else "chips stay"
        apart = ", and they lie in different domains" if least is not None and idle >= least else ""
        return f"{idle} {chips} idle: the smallest replica as quick takes {least}{apart}"

    def _least(self, tpot_s: float | None) -> int | None:
        """Chips of the smallest replica that does both, no slower than a time between tokens."""
        p = self.points
        able = self._fits if tpot_s is None else self._fits & (p.tpot_s <= tpot_s * (1 + 1e-12))
        return min((self.cuts.legal[cut].ranks for cut in np.unique(p.cut[able])), default=None)

    def _limit(self) -> str:
        if self.question.pools == "split":
            no_link = f"pools: {self.question.chips} × {self.chip.name} cannot hand keys and values over"
            return no_link if self.split is None else self.split.unmet()
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
