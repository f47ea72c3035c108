"""How crowded the busiest rank of experts is, where experts are not picked alike.

A fleet's `[experts]` table says how often each is picked, in a formula or as recorded; the
placement is the policy's of `cloud/sched/experts`. All ranks wait for the busiest one, so that a
step is priced as that rank's. Where each layer has picks of its own the busiest ranks of all
layers stand for each: their most crowded experts are averaged, and so on down.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tongyun.cloud.sched.experts import Placement, balanced, in_order
from tongyun.errors import InputError, SpecError
from tongyun.model.config import Experts, ModelConfig
from tongyun.specs import ExpertsSpec
from tongyun.units import Source

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ExpertLoads:
    """An `[experts]` table of the fleet file `file`, for a model that has experts."""

    spec: ExpertsSpec
    model: ModelConfig
    file: Path

    def __post_init__(self) -> None:
        if self.model.experts is None:
            raise SpecError(self.file, "experts", f"{self.model.name} has no experts; leave the table out")

    def picks(self, ep: int) -> tuple[float, ...]:
        """For each expert of the busiest of `ep` ranks, the chance that a token is computed there."""
        experts, spec = self._experts, self.spec
        redundant = spec.redundant or 0
        if experts.count % ep or redundant % ep:
            raise SpecError(
                self.file,
                "experts",
                f"{experts.count} experts and {redundant} copies on {ep} ranks; accepted: multiples of ep",
            )
        if ep == 1 and redundant:
            raise SpecError(self.file, "experts.redundant", "one rank has all experts; it needs no copies")
        if ep == 1 and spec.window_s is not None:
            raise SpecError(self.file, "experts.window_s", "one rank has all experts; none can move")
        return busiest(self.placed(ep), self.first())

    def placed(self, ep: int) -> list[Placement]:
        """Where the experts of each layer are when a run begins."""
        if not self.spec.rebalance:
            return [in_order(self._experts.count, ep)] * len(self.chances)
        return [balanced(layer.tolist(), ep, self.spec.redundant or 0) for layer in self.chances]

    def first(self) -> Array:
        """Picks when a run begins, [layers, experts]."""
        return np.stack([self._drifted(placed, layer) for layer, placed in enumerate(self.chances)])

    def drifted(self, now: Array, moment: int) -> Array:
        """Picks after they have drifted once more during a run, the `moment`-th time.

        A share of the experts, others in each layer, trade their places among themselves, so that
        picks stay as uneven as they were.
        """
        assert self.spec.drift is not None
        after, count = now.copy(), self._experts.count
        for layer in range(len(now)):
            rng = np.random.default_rng([layer, moment, 2])
            chosen = rng.permutation(count)[: round(self.spec.drift.value * count)]
            after[layer, chosen] = now[layer, np.roll(chosen, 1)]
        return after

    def crowding(self, ep: int) -> float:
        """Tokens of the busiest of `ep` ranks over those of the mean one."""
        return sum(self.picks(ep)) * ep / self._experts.per_token

    @property
    def sources(self) -> frozenset[Source]:
        """Of the picks; what was recorded is measured."""
        spec = self.spec
        figures = (spec.skew, spec.drift, spec.move_share)
        given = [figure.source for figure in figures if figure is not None]
        return frozenset(given if self.spec.counts is None else [*given, Source.MEASURED])

    @property
    def per_token(self) -> int:
        """Experts that a token picks."""
        return self._experts.per_token

    @property
    def _experts(self) -> Experts:
        assert self.model.experts is not None
        return self.model.experts

    @cached_property
    def chances(self) -> Array:
        """[layers, experts]: how many of a token's picks fall on each expert; at most one."""
        loads = self._recorded() if self.spec.counts is not None else self._skewed()
        return np.stack([_chances(each, self._experts.per_token) for each in loads])

    def _skewed(self) -> Array:
        """r^-s, with the order of experts another in each layer."""
        count, spec = self._experts.count, self.spec
        assert spec.skew is not None
        law = np.arange(1, count + 1, dtype=np.float64) ** -spec.skew.value
        layers = self.model.layers - self._experts.first_layer
        return np.stack([np.random.default_rng(layer).permutation(law) for layer in range(layers)])

    def _drifted(self, placed: Array, layer: int) -> Array:
        """Picks after a share of them has gone to other experts."""
        if self.spec.drift is None or self.spec.drift_s is not None:
            return placed
        moved, share = np.random.default_rng([layer, 1]).permutation(placed), self.spec.drift.value
        return np.asarray((1 - share) * placed + share * moved)

    def _recorded(self) -> Array:
        assert self.spec.counts is not None
        path = self.file.parent / Path(self.spec.counts).expanduser()
        count = self._experts.count
        try:
            lines = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(self.file, "experts.counts", f"{path}: cannot be read: {error}") from None
        if not lines:
            raise SpecError(path, "", f"empty; a line for each layer, {count} counts in each")
        return np.stack([_counts(path, number, line, count) for number, line in enumerate(lines, 1)])


def busiest(placed: Sequence[Placement], now: Array) -> tuple[float, ...]:
    """The picks of the busiest rank's experts, the mean of all layers."""
    each = [where.busiest(picks.tolist()) for where, picks in zip(placed, now, strict=True)]
    return tuple(np.mean(each, axis=0).tolist())


def _counts(path: Path, number: int, line: list[str], count: int) -> Array:
    try:
        values = np.array([float(cell) for cell in line])
    except ValueError:
        values = np.array([np.nan])
    if len(values) != count or not np.isfinite(values).all() or (values < 0).any() or not values.any():
        raise InputError(f"{path}:{number}: expected {count} counts ≥ 0, one for each expert, not all 0")
    return values


def _chances(loads: Array, per_token: int) -> Array:
    """Chances in proportion to loads that add up to `per_token`, none above 1.

    What an expert picked by every token cannot take goes to the others in proportion.
    """
    chances = np.zeros_like(loads)
    free = loads > 0
    while True:
        left = per_token - np.count_nonzero(chances == 1)
        scaled = np.where(free, loads / loads[free].sum() * left, chances)
        over = free & (scaled > 1)
        if not over.any():
            return scaled
        chances[over] = 1.0
        free &= ~over
        if not free.any():
            return chances
