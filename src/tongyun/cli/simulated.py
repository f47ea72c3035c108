"""How a run of `tongyun simulate` looks: tables for people, JSON for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from tongyun.cli.kept import kept_json, lines

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rich.table import Table

    from tongyun.cloud.latency import Group, LatencyReport
    from tongyun.cloud.record import Recording
    from tongyun.cloud.schedule import Schedule
    from tongyun.codesign.fleet import Fleet, Played

PARTS = 240
"""Of the run, at most, that --json tells of."""


# ── for programs ─────────────────────────────────────────────────────────────────────


def as_json(fleet: Fleet, played: Played, router: str) -> dict[str, Any]:
    """Everything in SI."""
    done, question = played.report, fleet.question
    rates = ("requests_per_s", "output_tokens_per_s", "goodput_requests_per_s", "goodput_tokens_per_s")
    return {
        "model": question.model.name,
        "chip": question.chip.name,
        "chips": question.chips,
        "pools": fleet.pools,
        "router": router,
        "report": done,
        **{name: getattr(done, name) for name in (*rates, "attainment")},
        "use": played.use,
        "prefix_hits": played.prefix_hits,
        "draft_tokens": question.draft_tokens,
        "acceptance": question.acceptance,
        "accepted_per_step": played.accepted,
        "tokens_per_step": None if played.accepted is None else 1 + played.accepted,
        "tier_hits": _tier_hits(fleet, played),
        "expert_crowding": _crowding(fleet),
        "kv_occupancy": None if played.recording is None else _occupancy_json(played.recording),
        "joules": played.joules,
        "usd_per_mtoken": played.usd_per_mtoken,
        "classes": _groups_json(played.classes, played),
        "models": _groups_json(played.models, played),
        "moves": played.moves,
        "rebalanced": played.rebalanced,
        "engines": played.engines,
        "kept": None if played.kept is None else kept_json(played.kept),
        "series": [] if played.recording is None else _series_json(played.recording),
        "source": sorted({"simulated"} | {source.value for source in played.sources}),
    }


def _series_json(recording: Recording) -> list[dict[str, Any]]:
    """What each pool did in equal parts of the run, from its beginning."""
    from tongyun.cloud.record import LEVELS_AND_RATES

    thin = [one.coarse(PARTS) for one in recording.series]
    return [
        {
            "pool": one.role,
            "part_s": one.width_s,
            "until_s": one.until_s,
            **{name: getattr(one, name).tolist() for name in LEVELS_AND_RATES},
        }
        for one in thin
    ]


def _occupancy_json(recording: Recording) -> list[dict[str, Any]]:
    return [
        {"pool": one.role, "mean": part.mean, "p99": part.p99, "most": part.most}
        for one, part in zip(recording.series, recording.occupancy, strict=True)
    ]


def _groups_json(groups: Mapping[str, Group], played: Played) -> dict[str, Any]:
    rates = ("requests_per_s", "output_tokens_per_s", "goodput_requests_per_s", "goodput_tokens_per_s")
    return {
        name: {
            "report": group.report,
            **{key: getattr(group.report, key) for key in (*rates, "attainment")},
            "share": group.share,
            "joules": group.share * played.joules,
            "usd_per_mtoken": played.usd_per_mtoken_of(group),
        }
        for name, group in groups.items()
    }


# ── for people ───────────────────────────────────────────────────────────────────────


def show(fleet: Fleet, played: Played, router: str) -> None:
    from tongyun import report

    parts = [latencies(_title(fleet, router), played.report), _figures(fleet, played)]
    for head, groups in (("class", played.classes), ("model", played.models)):
        if groups:
            parts.append(_groups(head, groups, played))
    report.show(*parts)


def _title(fleet: Fleet, router: str) -> str:
    question, pools = fleet.question, " + ".join(map(str, fleet.pools))
    return f"{question.model.name} on {question.chips} × {question.chip.title}: {pools}, {router}"


def latencies(title: str, done: LatencyReport) -> Table:
    """Mean and percentiles of what requests felt."""
    from tongyun.report import NOTHING, column, number, table
    from tongyun.units import MS

    rows = []
    for name, one in (("TTFT ms", done.ttft_s), ("TPOT ms", done.tpot_s), ("end to end ms", done.latency_s)):
        values = () if one is None else (one.mean, one.p50, one.p90, one.p99, one.p99_9, one.most)
        rows.append([name, *([number(value / MS) for value in values] or [NOTHING] * 6)])
    names = ("mean", "p50", "p90", "p99", "p99.9", "max")
    return table(title, [column("", left=True), *map(column, names)], rows)


def _figures(fleet: Fleet, played: Played) -> Table:
    from tongyun.report import NOTHING, column, number, source_tag, table
    from tongyun.units import Source

    done, question = played.report, fleet.question
    money = NOTHING if played.usd_per_mtoken is None else f"${number(played.usd_per_mtoken)}"
    rows = [
        ["requests ended", f"{done.succeeded:,} of {done.requests:,} in {number(done.duration_s)} s"],
        ["output tokens/s", number(done.output_tokens_per_s)],
        ["per chip", number(done.output_tokens_per_s / question.chips)],
        ["engines in a step", f"{played.use:.1%}"],
        ["prompt tokens from cache", f"{played.prefix_hits:.1%}"],
        *([f"  of these from {name}", f"{share:.1%}"] for name, share in _tier_hits(fleet, played).items()),
        *(
            [f"busiest expert rank, ep{ep}", f"{times:.2f} × the mean"]
            for ep, times in _crowding(fleet).items()
        ),
        *_drafts(fleet, played),
        *([name, cell] for name, cell in _occupied(played)),
        ["preemptions", f"{sum(one.preemptions for one in played.engines):,}"],
        *moves(played),
        *_rebalanced(played),
        ["per million output tokens", money],
        ["energy per output token", f"{number(played.joules / max(done.output_tokens, 1))} J"],
    ]
    if played.kept is not None and fleet.upkeep is not None:
        rows += lines(fleet.upkeep, played.kept)
    if done.slo.ttft_s is not None or done.slo.tpot_s is not None or done.slo.classes:
        rows.insert(2, ["goodput tokens/s", number(done.goodput_tokens_per_s)])
        rows.insert(3, ["requests within limits", f"{done.attainment:.1%}"])
    tag = source_tag(frozenset({Source.SIMULATED}) | played.sources)
    return table("", [column("", left=True), column("value")], rows, caption=tag)


def _drafts(fleet: Fleet, played: Played) -> list[list[str]]:
    """What came of drafts, where any are verified."""
    from tongyun.report import number

    if played.accepted is None:
        return []
    drafted = fleet.question.draft_tokens
    return [
        ["drafts right in a step", f"{number(played.accepted)} of {drafted}"],
        ["tokens of a request's step", number(1 + played.accepted)],
    ]


def _occupied(played: Played) -> list[tuple[str, str]]:
    """Of each pool, the share of its KV blocks that requests hold: mean, p99 and most."""
    if played.recording is None:
        return []
    pairs = list(zip(played.recording.series, played.recording.occupancy, strict=True))
    return [
        (
            "KV occupied: mean, p99, max" if len(pairs) == 1 else f"KV occupied, {one.role}",
            f"{part.mean:.1%}, {part.p99:.1%}, {part.most:.1%}",
        )
        for one, part in pairs
    ]


def moves(played: Played) -> list[list[str]]:
    """What became of requests that were moved between engines, where the fleet moves any."""
    from tongyun.report import NOTHING, number
    from tongyun.units import GB, MS

    done = played.moves
    if done is None:
        return []
    pause = done.downtime_s
    told = NOTHING if pause is None else f"{number(pause.p50 / MS)} and {number(pause.p99 / MS)}"
    return [
        ["requests moved while decoding", f"{done.migrated:,}"],
        ["  while they waited", f"{done.rescheduled:,}"],
        *([["  waiting prompts", f"{done.prompts:,}"]] if done.prompts else []),
        ["  called off; computed again", f"{done.called_off:,}; {done.recomputed:,}"],
        *([["  torn by a failure", f"{done.torn:,}"]] if done.torn else []),
        ["  keys and values copied", f"{number(done.moved_bytes / GB)} GB"],
        ["  pause ms, p50 and p99", told],
    ]


def _rebalanced(played: Played) -> list[list[str]]:
    """What placing experts anew during the run did, where the fleet does that."""
    from tongyun.report import number
    from tongyun.units import GB, MS

    log = played.rebalanced
    if log is None:
        return []
    rows = [["experts placed anew", f"{len(log):,} times"]]
    if log:
        spans, before, after = (
            [getattr(one, name) for one in log] for name in ("seconds", "crowding_before", "crowding_after")
        )
        how = "steps stood still" if log[0].standing else "beside steps"
        rows += [
            ["  weights moved", f"{number(sum(one.moved_bytes for one in log) / GB)} GB"],
            ["  ms each time, mean", f"{number(sum(spans) / len(log) / MS)}, {how}"],
            [
                "  busiest rank, mean",
                f"from {sum(before) / len(log):.2f} to {sum(after) / len(log):.2f} × the mean",
            ],
        ]
    return rows


def _groups(head: str, groups: Mapping[str, Group], played: Played) -> Table:
    """A line for each class or model, over the whole run's time."""
    from tongyun.report import column, number, table
    from tongyun.units import MS

    rows = []
    for name, group in groups.items():
        done = group.report
        spans = [
            number(None if one is None else getattr(one, key) / MS)
            for one in (done.ttft_s, done.tpot_s)
            for key in ("p50", "p99")
        ]
        rows.append(
            [
                name or "(none)",
                f"{done.succeeded:,} of {done.requests:,}",
                *spans,
                number(done.goodput_tokens_per_s),
                f"{done.attainment:.1%}",
                number(played.usd_per_mtoken_of(group)),
                number(played.joules_per_token(group)),
            ]
        )
    felt = ("TTFT ms p50", "TTFT ms p99", "TPOT ms p50", "TPOT ms p99", "goodput tokens/s", "within limits")
    heads = ("requests ended", *felt, "$/Mtoken", "J/token")
    caption = "simulated; money and energy by the share of tokens computed"
    return table("", [column(head, left=True), *map(column, heads)], rows, caption=caption)


def _tier_hits(fleet: Fleet, played: Played) -> dict[str, float]:
    """Share of the prompt tokens that came back from each memory behind the cache, by its name."""
    return {} if fleet.tiers is None else dict(zip(fleet.tiers.names, played.tier_hits, strict=True))


def _crowding(fleet: Fleet) -> dict[int, float]:
    """Tokens of the busiest expert rank over those of the mean one, by the ranks experts are spread over."""
    spread = {pool.plan.shard.ep for pool in fleet.pools}
    return {} if fleet.experts is None else {ep: fleet.experts.crowding(ep) for ep in sorted(spread)}


# ── for a file ───────────────────────────────────────────────────────────────────────


def write_trace(schedule: Schedule, place: Path, whole_s: float) -> None:
    """And say which part of the run, which ended at `whole_s`, it holds."""
    from tongyun.cloud.perfetto import save
    from tongyun.report import number

    count = save(schedule, place)
    part = f"{number(schedule.begin_s)}–{number(min(schedule.end_s, whole_s))} s of {number(whole_s)} s"
    more = (
        "; it ends where it would have grown too large: --window shows another part" if schedule.cut else ""
    )
    typer.echo(f"wrote {place}: {count:,} events, {part}{more}", err=True)
