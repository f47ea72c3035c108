"""What failures and autoscaling did to a simulated fleet, as lines of its table and as JSON."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from tongyun.errors import Infeasible

if TYPE_CHECKING:
    from tongyun.cloud.latency import LatencyReport
    from tongyun.codesign.upkeep import Kept, Upkeep


def lines(upkeep: Upkeep, kept: Kept) -> list[list[str]]:
    """Name and value of each figure that the fleet's tables are about."""
    from tongyun.report import number
    from tongyun.units import HOUR_S

    rows = []
    if upkeep.failures is not None:
        rows += [
            ["failures", f"{kept.failures:,}"],
            ["requests retried", f"{kept.retried:,} ({kept.retries:,} times)"],
            ["requests lost", f"{kept.lost:,}"],
            ["chip-hours down", number(kept.down_chip_s / HOUR_S)],
            ["availability", f"{kept.availability:.2%}"],
        ]
    if upkeep.autoscale:
        held, there = (number(chip_s / HOUR_S) for chip_s in (kept.held_chip_s, kept.there_chip_s))
        rows.append(["chip-hours held", f"{held} of {there}"])
        cold = kept.cold_starts_s
        mean = f", {number(sum(cold) / len(cold))} s each" if cold else ""
        rows.append(["cold starts", f"{len(cold):,}{mean}"])
        figures = {rule.engine_start for rule in upkeep.autoscale}
        for figure in figures:
            # Of every start, whatever else it waits for.
            span = f"{number(figure.low)} … {number(figure.high)} s"
            rows.append(
                ["  of which the engine's own", f"{number(figure.value)} s ({span}, {figure.source})"]
            )
    return rows


def refuse_failed(report: LatencyReport) -> None:
    """Infeasible where requests could not run: what is lost by a failure is an outcome, what no engine takes
    is a question that had no answer."""
    from tongyun.cloud.retries import LOST

    refused = [(why, count) for why, count in report.errors if not why.startswith(LOST)]
    if refused:
        raise Infeasible(f"{sum(count for _, count in refused)} requests could not run: {refused[0][0]}")


def kept_json(kept: Kept) -> dict[str, Any]:
    """Everything in SI."""
    return {f.name: getattr(kept, f.name) for f in fields(kept)} | {"availability": kept.availability}
