"""Fit the times of engines to measured deployments, and predict each with what was fitted without its family.

The rule, set down before any of its results was seen: a family is one model on one tensor-parallel degree
under one engine, whatever its version, precision and expert parallelism; every family is left out once,
with all its rows, and predicted with what was fitted to the others. It is the widest family that leaves
every engine something to fit to: SGLang was measured with one model only, vLLM without asynchronous
scheduling too. Where other models remain a whole model can be left out of all engines (`whole_model`).

Fitted are five times an engine, and for all engines together how unlike experts are picked: routers
are not even, fewer experts are read in a step than even picks would touch, and the busiest rank has
more than its share. The r-th most picked expert is picked as r^-s, as in a fleet's `[experts]` table; s is
one number for all models. What a fit minimises, inside as for all rows, is the mean error over its bar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from plan_h100_rows import Row
from tongyun.codesign.engines import Engine, engine
from tongyun.codesign.experts import ExpertLoads
from tongyun.codesign.users import Table, Users, play_users
from tongyun.model.shard import Shard
from tongyun.specs import ExpertsSpec
from tongyun.specs.figure import Figure
from tongyun.units import Source

BARS = {"TTFT": 25.0, "TPOT": 12.0}
GRID = {
    "step_s": (0.0, 2.5e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3),
    "sequence_s": (0.0, 1e-5, 2e-5, 3e-5, 4e-5, 6e-5),
    "prompt_layer_s": (0.0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1.2e-3),
    "request_s": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.2e-2),
    "token_s": (0.0, 2e-5, 4e-5, 6e-5, 8e-5, 1e-4),
}
"""Values tried for each time, one after the other, until none helps."""
SKEWS = (0.0, 0.5, 1.0, 1.5)
"""Values of s tried."""
HIDDEN = {"vllm-async": ("step_s", "sequence_s")}
"""Times of a habit that are zero by its nature and not fitted (engines.toml says why)."""

Times = tuple[float, ...]
"""One value of each of `GRID`, in its order."""
Chosen = NDArray[np.bool_]
Grouping = Callable[[Row], str]


def family(row: Row) -> str:
    return f"{row.raw['backend']} {whole_model(row)}, tp {row.shard.tp}"


def whole_model(row: Row) -> str:
    return row.question.model.name.split("/")[-1]


def table(row: Row, skew: float, users: Users | None = None) -> Table:
    """The row's deployment priced under its load, or another."""
    return Table(row.question, _skewed(row, skew), users or row.users, row.step_tokens, row.room)


def _skewed(row: Row, skew: float) -> Shard:
    if row.question.model.experts is None or not skew:
        return row.shard
    spec = ExpertsSpec(skew=Figure.of(skew, Source.ASSUMED, "tried"))
    loads = ExpertLoads(spec=spec, model=row.question.model, file=Path(__file__))
    return replace(row.shard, expert_picks=loads.picks(row.shard.ep))


class Tables:
    """Tables of rows at every skew, each priced once; those of dense models know none."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, float], Table] = {}

    def at(self, row: Row, skew: float) -> Table:
        key = row.raw["id"], skew if row.question.model.experts is not None else 0.0
        if key not in self._known:
            self._known[key] = table(row, skew)
        return self._known[key]


def predict(priced: Table, habits: Engine) -> dict[str, float]:
    felt = play_users(priced, habits)
    return {"TTFT": float(felt.ttft_s.mean()), "TPOT": float(felt.tpot_s.mean())}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What was fitted to some rows."""

    skew: float
    times: dict[str, Times]
    """By engine; those without a row are missing."""

    def knows(self, row: Row) -> bool:
        return row.raw["backend"] in self.times

    def habits(self, row: Row) -> Engine:
        return habits(row.engine, self.times[row.raw["backend"]])


def habits(name: str, times: Times) -> Engine:
    """An engine's habits with these times."""
    given = dict(zip(GRID, times, strict=True)) | dict.fromkeys(HIDDEN.get(name, ()), 0.0)
    return replace(engine(name), **given)


class Fits:
    """Fits to any part of the rows."""

    def __init__(self, rows: Sequence[Row], tables: Tables) -> None:
        self._rows = rows
        of = np.array([row.raw["backend"] for row in rows])
        self._engines = {
            name: (of == name, _OfEngine([row for row in rows if row.raw["backend"] == name], tables))
            for name in sorted(set(of))
        }

    def all(self) -> Fit:
        return self._to(np.ones(len(self._rows), bool))

    def without(self, group: Grouping) -> dict[str, Fit]:
        """By group, what is fitted to all others."""
        groups = np.array([group(row) for row in self._rows])
        return {name: self._to(groups != name) for name in sorted(set(groups))}

    def _to(self, chosen: Chosen) -> Fit:
        found = [self._at(skew, chosen) for skew in SKEWS]
        return min(found, key=lambda pair: pair[0])[1]

    def _at(self, skew: float, chosen: Chosen) -> tuple[float, Fit]:
        """Summed errors, and the times, with this skew."""
        missed, times = 0.0, {}
        for name, (mine, fits) in self._engines.items():
            if (kept := chosen[mine]).any():
                times[name], least = fits.times(kept, skew)
                missed += least * kept.sum()
        return missed, Fit(skew=skew, times=times)


class _OfEngine:
    """Fits of one engine's times; what was tried once is not played again."""

    def __init__(self, rows: Sequence[Row], tables: Tables) -> None:
        self._rows, self._tables = rows, tables
        self._measured = np.array([[row.measured[what] for what in BARS] for row in rows])
        self._mixed = np.array([row.question.model.experts is not None for row in rows])
        self._played: dict[tuple[Times, float | None], NDArray[np.float64]] = {}
        self._fitted: dict[tuple[bytes, float], tuple[Times, float]] = {}

    def times(self, chosen: Chosen, skew: float) -> tuple[Times, float]:
        """Those with the least mean error, each over its bar, on the chosen rows; and that error."""
        key = chosen.tobytes(), skew
        if key not in self._fitted:
            starts = (tuple(values[at] for values in GRID.values()) for at in (0, len(GRID) // 2, -1))
            found = (self._descend(start, chosen, skew) for start in starts)
            self._fitted[key] = min(found, key=lambda pair: pair[1])
        return self._fitted[key]

    def _descend(self, best: Times, chosen: Chosen, skew: float) -> tuple[Times, float]:
        """The nearest values of the grid from which no single change helps."""
        least = self._miss(best, chosen, skew)
        while True:
            before = least
            for at, values in enumerate(GRID.values()):
                for value in values:
                    tried = (*best[:at], value, *best[at + 1 :])
                    if (missed := self._miss(tried, chosen, skew)) < least:
                        best, least = tried, missed
            if least == before:
                return best, least

    def _miss(self, times: Times, chosen: Chosen, skew: float) -> float:
        errors = 100 * np.abs(self._said(times, skew)[chosen] / self._measured[chosen] - 1)
        return float((errors / list(BARS.values())).mean())

    def _said(self, times: Times, skew: float) -> NDArray[np.float64]:
        """Both figures of every row."""
        said = np.empty_like(self._measured)
        said[~self._mixed] = self._part(times, None)
        said[self._mixed] = self._part(times, skew)
        return said

    def _part(self, times: Times, skew: float | None) -> NDArray[np.float64]:
        """Of the models with experts, or of the dense ones, which know no skew."""
        key = times, skew
        if key not in self._played:
            part = self._mixed if skew is not None else ~self._mixed
            rows: Iterable[Row] = (self._rows[at] for at in np.flatnonzero(part))
            said = [predict(self._tables.at(row, skew or 0.0), habits(row.engine, times)) for row in rows]
            self._played[key] = np.array([[one[what] for what in BARS] for one in said]).reshape(
                -1, len(BARS)
            )
        return self._played[key]
