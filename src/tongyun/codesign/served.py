"""The plan for a demand: fewest chips that serve so many requests a second within the limits.

For each cut and step budget the demand is spread over r replicas. What a group of
sequences then holds follows from Little's law on `steady`'s grid: the batch D at which the
group ends as many requests as come. With λ the arrivals of a group, T_d and T the time
of a step without and with prefill, f the share of the latter, S the prefill of the mean
prompt, ρ the use of the prefill budget and c the variations of gaps and prompts:

    residual   R = ((1 − f)·T_d² + f·T²) / 2((1 − f)·T_d + f·T)      the running step
    wait       W = S · ρ / (1 − ρ) · (c_gap² + c_prompt²) / 2         other prompts (Allen–Cunneen)
    together   K = λ · 2R · (T − T_d)                                 prompts in the same step
    TTFT       R + W + K + S, as a gamma distribution of its mean and variance
    TPOT       p99 from Poisson swings of D, averaged over a request's own life

A group holds `batch` sequences at most, D and three standard deviations. All this
is checked by play (`played`), whose figures replace these where they are far off.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tongyun.codesign.demand import Demand
from tongyun.codesign.plan import REASONS, Answer, Figures, Offer, Plan, Tails, pareto_front
from tongyun.codesign.played import play
from tongyun.codesign.space import Question, cuts, grid
from tongyun.codesign.steady import USABLE_MEMORY, Pricing, Steady
from tongyun.cost import usd_per_mtoken
from tongyun.model.shard import Shard
from tongyun.specs import Corner
from tongyun.units import MS, Source

Array = NDArray[np.float64]
NORMAL = {"p50": 0.0, "p90": 1.2815515655446004, "p99": 2.3263478740408408}
SWING = 2 / 3
"""Variance left of a Poisson number of companions, averaged over a life as long as theirs."""
TRUSTED = 0.15
"""Relative error against play up to which the formulas are kept."""
MOST_PLAYED = 4
"""Candidates played, best first, until one keeps the limits."""


@dataclass(frozen=True, kw_only=True)
class _Points:
    """Candidates (cut, budget, replicas) that carry the demand, flattened into one axis."""

    cut: NDArray[np.intp]
    budget: Array
    replicas: Array
    decoding: Array
    """D: sequences of a group that decode at once, on average."""
    batch: Array
    """Most sequences of a group."""
    memory_bytes: Array
    ttft_mean: Array
    ttft_p50: Array
    ttft_p90: Array
    ttft_p99: Array
    tpot_mean: Array
    tpot_p99: Array
    joules_per_token: Array
    chips: Array


def serve(question: Question) -> Answer:
    """Fewest chips for the question's demand; Pareto over speed for a user and chips."""
    assert question.demand is not None, "only asked where there is a demand"
    return _Serving(question, question.demand).answer()


class _Serving:
    """One pass over a question with a demand."""

    def __init__(self, question: Question, demand: Demand) -> None:
        self.question, self.demand = question, demand
        self.chip = question.at()
        self.cuts = cuts(question.model, self.chip, question.chips)
        self.room_bytes = USABLE_MEMORY * self.chip.memory_bytes
        self.evaluated = 0
        self.sources: list[frozenset[Source]] = []
        self.points = self._points()

    def answer(self) -> Answer:
        broken = self._broken()
        counts, left = Counter(legality=self.cuts.refused), np.ones(len(self.points.batch), dtype=bool)
        for reason, mask in broken.items():
            counts[reason] = int(np.count_nonzero(left & mask))
            left &= ~mask
        fits = ~broken["memory"] & ~broken["prefill"]
        front = pareto_front(1 / self.points.tpot_mean, 1 / self.points.chips, fits & ~broken["ttft"])
        best = self._best(left)
        return Answer(
            question=self.question,
            best=best,
            pareto=tuple(self._offer(point, meets=bool(left[point])) for point in front),
            evaluated=self.evaluated,
            cut={reason: counts[reason] for reason in REASONS},
            limit=None if best is not None else self._limit(left),
        )

    # ── candidates ───────────────────────────────────────────────────────────────────

    def _points(self) -> _Points:
        pricing = Pricing(self.question, self.chip, *grid())
        columns: dict[str, list[Array]] = {}
        for index, shard in enumerate(self.cuts.legal):
            found = self._of_cut(pricing, shard)
            found["cut"] = np.full(found["budget"].shape, index, dtype=np.float64)
            for name, values in found.items():
                columns.setdefault(name, []).append(values.ravel())
        flat = {name: np.concatenate(parts) for name, parts in columns.items()}
        return _Points(cut=flat.pop("cut").astype(np.intp), **flat)

    def _of_cut(self, pricing: Pricing, shard: Shard) -> dict[str, Array]:
        """Budgets along the first axis, replicas along the second."""
        state = pricing.steady(shard)
        self.evaluated += state.tpot_s.size
        self.sources.append(state.sources)
        most = self.question.chips // shard.ranks
        replicas = np.arange(1.0, most + 1)
        asked = self.demand.rate_per_s / (replicas * shard.dp * shard.pp)
        # What a group ends at each batch; where prefill falls behind, nothing.
        groups = self.question.osl * shard.dp * shard.pp
        ends = np.where(state.prefill_use < 1, state.tokens_per_s / groups, 0.0)
        rows = [
            self._at_budget(pricing, state, shard, column, (ends[:, column], asked))
            for column in range(ends.shape[1])
        ]
        found = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        found["replicas"] = np.broadcast_to(replicas, found["budget"].shape)
        found["chips"] = found["replicas"] * shard.ranks
        return found

    def _at_budget(
        self, pricing: Pricing, state: Steady, shard: Shard, column: int, flows: tuple[Array, Array]
    ) -> dict[str, Array]:
        """Figures for each number of replicas: the grid of batches read at the batch each one holds."""
        ends, asked = flows
        batches, load = pricing.batch[:, 0], pricing.load
        top = int(np.argmax(ends)) + 1
        held = np.interp(asked, np.maximum.accumulate(ends[:top]), batches[:top], left=np.nan, right=np.inf)
        held = np.where(np.isnan(held), asked / max(ends[0], 1e-30), held)
        carried = asked < ends[top - 1]
        at = np.where(carried, held, batches[top - 1])

        def read(values: Array) -> Array:
            grid_values = np.broadcast_to(values, state.tpot_s.shape)[:, column]
            return np.interp(at, batches[:top], grid_values[:top])

        seen = _Seen(
            held=at,
            asked=asked,
            decode_s=read(state.decode_s),
            mixed_s=read(state.mixed_s),
            share=np.minimum(read(load.share), 1.0),
            chunks=read(load.chunks),
            use=read(load.use),
            tpot_s=read(state.tpot_s),
        )
        most = np.ceil(at + 3 * np.sqrt(at))
        slope = np.gradient(state.tpot_s[:top, column], batches[:top]) if top > 1 else np.zeros(1)
        needed = np.broadcast_to(pricing.memory_bytes(shard), state.tpot_s.shape)[:, column]
        budget = np.broadcast_to(pricing.budget, state.tpot_s.shape)[0, column]
        return {
            "budget": np.full_like(at, budget),
            "decoding": held,
            "batch": most,
            "memory_bytes": np.interp(most, batches, needed),
            "joules_per_token": read(state.joules_per_token),
            **{name: np.where(carried, value, np.inf) for name, value in self._ttft(seen).items()},
            "tpot_mean": np.where(carried, seen.tpot_s, np.inf),
            "tpot_p99": np.where(carried, self._tpot_p99(seen, np.interp(at, batches[:top], slope)), np.inf),
        }

    def _ttft(self, seen: _Seen) -> dict[str, Array]:
        """Mean and percentiles of the time to the first token; see the module's head for the symbols."""
        plain, mixed, share = seen.decode_s, seen.mixed_s, seen.share
        lasting = (1 - share) * plain + share * mixed
        residual = ((1 - share) * plain**2 + share * mixed**2) / (2 * lasting)
        spread = (self.demand.gap_variation**2 + self.demand.isl_variation**2) / 2
        service = seen.chunks * mixed
        wait = service * seen.use / np.maximum(1 - seen.use, 1e-9) * spread
        together = seen.asked * 2 * residual * np.maximum(mixed - plain, 0.0)
        mean = residual + wait + together + service
        own = (service - seen.chunks * plain) * self.demand.isl_variation
        # A wait is nothing or exponential; companions are Poisson; the rest of a step is even.
        waits = wait**2 * (2 / np.maximum(seen.use, 1e-3) - 1)
        variance = residual**2 / 3 + waits + together * np.maximum(mixed - plain, 0.0) + own**2
        shape = np.maximum(mean**2 / np.maximum(variance, 1e-30), 0.05)
        quantiles = {f"ttft_{name}": mean * _gamma_quantile(shape, z) for name, z in NORMAL.items()}
        return {"ttft_mean": mean, **quantiles}

    def _tpot_p99(self, seen: _Seen, slope: Array) -> Array:
        """Companions swing as a Poisson number does, and steps with prefill fall unevenly."""
        steps = max(self.question.osl - 1, 1)
        swings = np.maximum(slope, 0.0) ** 2 * seen.held * SWING
        steps_apart = seen.share * (1 - seen.share) * (seen.mixed_s - seen.decode_s) ** 2 / steps
        return np.asarray(seen.tpot_s + NORMAL["p99"] * np.sqrt(swings + steps_apart))

    # ── limits and choice ────────────────────────────────────────────────────────────

    def _broken(self) -> dict[str, NDArray[np.bool_]]:
        p, q = self.points, self.question
        never = np.zeros(len(p.batch), dtype=bool)
        return {
            "memory": p.memory_bytes > self.room_bytes,
            "prefill": ~np.isfinite(p.tpot_mean),
            "ttft": never if q.ttft_s is None else p.ttft_p99 > q.ttft_s,
            "tpot": never if q.tpot_s is None else p.tpot_p99 > q.tpot_s,
        }

    def _best(self, meets: NDArray[np.bool_]) -> Offer | None:
        """Fewest chips, then quickest for its users; played, so that what is offered was seen to hold."""
        found = np.flatnonzero(meets)
        p = self.points
        order = found[np.lexsort((p.ttft_p99[found], p.tpot_mean[found], p.chips[found]))]
        first: Offer | None = None
        for point in _different(order, p)[:MOST_PLAYED]:
            offer = self._checked(int(point))
            first = first or offer
            if offer.meets:
                return offer
        return first

    def _checked(self, point: int) -> Offer:
        """The offer with play's figures where the formulas are further off than `TRUSTED`."""
        offer = self._offer(point, meets=True)
        assert offer.figures.tails is not None
        played = play(self.question, self.demand, offer.plan)
        error = max(abs(ours / theirs - 1) for ours, theirs in played.beside(offer.figures.tails))
        if error <= TRUSTED:
            return replace(offer, play_error=error)
        q, tails = self.question, played.tails
        meets = (q.ttft_s is None or tails.ttft_p99_s <= q.ttft_s) and (
            q.tpot_s is None or tails.tpot_p99_s <= q.tpot_s
        )
        figures = replace(offer.figures, ttft_s=played.ttft_s, tpot_s=played.tpot_s, tails=tails)
        sources = offer.sources | {Source.SIMULATED}
        return replace(offer, figures=figures, sources=sources, meets=meets, play_error=error)

    def _offer(self, point: int, *, meets: bool) -> Offer:
        p, shard = self.points, self.cuts.legal[int(self.points.cut[point])]
        replicas = int(p.replicas[point])
        used = replicas * shard.ranks
        plan = Plan(
            shard=shard,
            batch=int(p.batch[point]) * shard.dp * shard.pp,
            step_tokens=int(p.budget[point]),
            replicas=replicas,
            idle_chips=self.question.chips - used,
        )
        rate = self.demand.rate_per_s * self.question.osl / used
        figures = Figures(
            ttft_s=float(p.ttft_mean[point]),
            tpot_s=float(p.tpot_mean[point]),
            tok_s_per_chip=rate,
            joules_per_token=float(p.joules_per_token[point]),
            usd_per_mtoken=self._usd(rate),
            usd_per_mtoken_total=self._usd(rate * (1 + self.question.isl / self.question.osl)),
            tails=Tails(
                ttft_p50_s=float(p.ttft_p50[point]),
                ttft_p90_s=float(p.ttft_p90[point]),
                ttft_p99_s=float(p.ttft_p99[point]),
                tpot_p99_s=float(p.tpot_p99[point]),
            ),
        )
        sources = self.sources[int(p.cut[point])]
        if self.question.price is not None:
            sources = sources | {self.question.price.chip_hour.source}
        return Offer(plan=plan, figures=figures, slow=None, fast=None, meets=meets, sources=sources)

    def _usd(self, rate: float) -> float | None:
        price = self.question.price
        if price is None:
            return None
        return float(usd_per_mtoken(rate, 1, price.chip_hour.at(Corner.NOMINAL, more_is_better=False)))

    def _limit(self, left: NDArray[np.bool_]) -> str:
        """Which limit nothing keeps, with the nearest figure."""
        p, q, broken = self.points, self.question, self._broken()
        if broken["memory"].all():
            least = p.memory_bytes.min()
            return (
                f"memory: the smallest need is {least / 1e9:.2f} GB of {self.room_bytes / 1e9:.2f} GB usable"
            )
        fits = ~broken["memory"] & ~broken["prefill"]
        if not fits.any():
            return f"rate: no candidate carries {self.demand.rate_per_s:g} requests/s on {q.chips} chips"
        ttft, tpot = p.ttft_p99[fits].min(), p.tpot_p99[fits].min()
        return (
            f"ttft and tpot at p99: the nearest are {ttft / MS:.4g} ms and {tpot / MS:.4g} ms, "
            "not always of one plan"
        )


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A group at its operating point; arrays over numbers of replicas."""

    held: Array
    asked: Array
    decode_s: Array
    mixed_s: Array
    share: Array
    chunks: Array
    use: Array
    tpot_s: Array


def _different(order: NDArray[np.intp], points: _Points) -> list[int]:
    """The first candidate of each (cut, replicas): budgets alone differ too little to play each."""
    seen: dict[tuple[int, int], int] = {}
    for point in order:
        seen.setdefault((int(points.cut[point]), int(points.replicas[point])), int(point))
    return list(seen.values())


def _gamma_quantile(shape: Array, normal: float) -> Array:
    """Quantile over mean of a gamma distribution (Wilson and Hilferty, 1931)."""
    return np.maximum(1 - 1 / (9 * shape) + normal / (3 * np.sqrt(shape)), 0.0) ** 3
