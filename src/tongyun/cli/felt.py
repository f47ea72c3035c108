"""How percentiles under a demand look: a table for people, JSON for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tongyun.units import MS

if TYPE_CHECKING:
    from tongyun.codesign.tails import Tails, Trial


def as_json(felt: Tails) -> dict[str, Any]:
    """In SI; all that was played, and what was not counted."""
    return {
        "name": felt.demand.name,
        "rate_per_s": felt.demand.rate_per_s,
        "requests": len(felt.demand.arrivals),
        "best": None if felt.best is None else _trial(felt.best),
        "trials": [_trial(trial) for trial in felt.trials],
        "not_played": felt.not_played,
        "too_small": felt.too_small,
        "staged": felt.staged,
    }


def _trial(trial: Trial) -> dict[str, Any]:
    from tongyun.units import Source

    shard = trial.plan.shard
    return {
        "tp": shard.tp,
        "ep": shard.ep,
        "dp": shard.dp,
        "batch": trial.plan.batch,
        "step_tokens": trial.plan.step_tokens,
        "replicas": trial.plan.replicas,
        "pools": [dict(pool) for pool in trial.plan.pools],
        "chips": trial.chips,
        "free_chips": trial.plan.idle_chips,
        "ttft_s": asdict(trial.ttft_s),
        "tpot_s": asdict(trial.tpot_s),
        "attainment": trial.attainment,
        "prefix_hits": trial.prefix_hits,
        "usd_per_mtoken": trial.usd_per_mtoken,
        "meets": trial.meets,
        "source": Source.mix(trial.sources),
    }


def show(felt: Tails) -> None:
    """Every play, and a line for what was not played and for chips that stay free."""
    from tongyun.report import column, number, source_tag, table
    from tongyun.report import show as put

    rows = []
    for trial in felt.trials:
        times = (trial.ttft_s.p50, trial.ttft_s.p99, trial.tpot_s.p50, trial.tpot_s.p99)
        place = [str(trial.plan), str(trial.plan.batch), str(trial.chips)]
        money = number(trial.usd_per_mtoken)
        rows.append([*place, *(number(t / MS) for t in times), f"{trial.attainment:.1%}", money])
    heads = ("batch", "chips", "TTFT p50 ms", "p99", "TPOT p50 ms", "p99", "within", "$/Mtok")
    if rows:
        sources = source_tag(felt.trials[-1].sources)
        put(
            table(felt.demand.name, [column("played", left=True), *map(column, heads)], rows, caption=sources)
        )
    put(
        f"{len(felt.demand.arrivals)} requests a play; {felt.not_played} candidates not played, "
        f"{felt.staged} with pipeline stages, {felt.too_small} that the chips cannot hold often enough"
    )
    if felt.best is not None and felt.best.plan.idle_chips:
        put(f"{felt.best.plan.idle_chips} chips stay free: the demand needs {felt.best.chips}")
