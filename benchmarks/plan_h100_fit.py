"""Fit the times of an engine to measured deployments, and predict each with times fitted without its family.

The rule, set down before any of its results was seen: a family is one model on one tensor-parallel degree
under one engine, whatever its version, precision and expert parallelism; every family is left out once,
with all its rows, and predicted with times fitted to the engine's other families. It is the widest family
that leaves every engine something to fit to: SGLang was measured with one model only, vLLM without
asynchronous scheduling too. Where an engine has several models a whole model can be left out instead
(`whole_model`). What a fit minimises, inside as for all rows, is the mean error over its bar.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from plan_h100_rows import Row
from tongyun.codesign.engines import Engine, engine
from tongyun.codesign.users import Table, play_users

BARS = {"TTFT": 25.0, "TPOT": 12.0}
GRID = {
    "step_s": (0.0, 2.5e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3),
    "sequence_s": (0.0, 1e-5, 2e-5, 3e-5, 4e-5, 6e-5),
    "prompt_layer_s": (0.0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1.2e-3),
    "request_s": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.2e-2),
    "token_s": (0.0, 2e-5, 4e-5, 6e-5, 8e-5, 1e-4),
}
"""Values tried for each time, one after the other, until none helps."""
HIDDEN = {"vllm-async": ("step_s", "sequence_s")}
"""Times of a habit that are zero by its nature and not fitted (engines.toml says why)."""

Times = tuple[float, ...]
"""One value of each of `GRID`, in its order."""


def family(row: Row) -> str:
    return f"{whole_model(row)}, tp {row.shard.tp}"


def whole_model(row: Row) -> str:
    return f"{row.raw['backend']} {row.question.model.name.split('/')[-1]}"


def predict(table: Table, habits: Engine) -> dict[str, float]:
    felt = play_users(table, habits)
    return {"TTFT": float(felt.ttft_s.mean()), "TPOT": float(felt.tpot_s.mean())}


class Fits:
    """Fits to any part of one engine's rows; a time once tried is not played again."""

    def __init__(self, rows: Sequence[Row], tables: dict[str, Table]) -> None:
        self.rows, self._tables = rows, tables
        self._measured = np.array([[row.measured[what] for what in BARS] for row in rows])
        self._played: dict[Times, NDArray[np.float64]] = {}

    def without(self, group: Callable[[Row], str]) -> dict[str, Times]:
        """By group, the times fitted to all others; none where there is but one."""
        groups = np.array([group(row) for row in self.rows])
        names = sorted(set(groups))
        return {name: self.times(groups != name) for name in names} if len(names) > 1 else {}

    def all(self) -> Times:
        return self.times(np.ones(len(self.rows), bool))

    def times(self, chosen: NDArray[np.bool_]) -> Times:
        """Those with the least mean error, each over its bar, on the chosen rows."""
        starts = ([values[at] for values in GRID.values()] for at in (0, len(GRID) // 2, -1))
        return min(
            (self._descend(tuple(start), chosen) for start in starts), key=lambda t: self._miss(t, chosen)
        )

    def _descend(self, best: Times, chosen: NDArray[np.bool_]) -> Times:
        """The nearest values of the grid from which no single change helps."""
        least = self._miss(best, chosen)
        while True:
            before = least
            for at, values in enumerate(GRID.values()):
                for value in values:
                    tried = (*best[:at], value, *best[at + 1 :])
                    if (missed := self._miss(tried, chosen)) < least:
                        best, least = tried, missed
            if least == before:
                return best

    def _miss(self, times: Times, chosen: NDArray[np.bool_]) -> float:
        errors = 100 * np.abs(self._said(times)[chosen] / self._measured[chosen] - 1)
        return float((errors / list(BARS.values())).mean())

    def _said(self, times: Times) -> NDArray[np.float64]:
        if times not in self._played:
            said = (predict(self._tables[row.raw["id"]], habits(row.engine, times)) for row in self.rows)
            self._played[times] = np.array([[one[what] for what in BARS] for one in said])
        return self._played[times]


def habits(name: str, times: Times) -> Engine:
    """An engine's habits with these times."""
    given = dict(zip(GRID, times, strict=True)) | dict.fromkeys(HIDDEN.get(name, ()), 0.0)
    return replace(engine(name), **given)
