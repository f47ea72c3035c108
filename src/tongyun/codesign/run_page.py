"""A simulated run's report as one HTML file: figures, distributions, what happened over time, sources.

Composes what `Fleet.play` gave with a recorder; computes nothing but means of neighbouring parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from tongyun.cloud.latency import Group, LatencyReport, Percentiles, RequestRecord, Slo
from tongyun.cloud.record import Recording, Series
from tongyun.codesign.drawing import Line, Rule, curves
from tongyun.codesign.fleet import Fleet, Played
from tongyun.codesign.over_time import over_time, waits
from tongyun.codesign.sheet import card, chip_facts, document, figure, table, tags
from tongyun.codesign.steady import USABLE_MEMORY
from tongyun.report import NOTHING, number, quantity
from tongyun.units import MS, Source

SPLIT = 5
"""Classes or models that are drawn apart; where there are more, only all of them together."""
SIMULATED = (
    "Everything on this page is simulated: the production scheduler ran on virtual time, and no chip did. "
    "Steps take what the price of their operators says."
)


def page(fleet: Fleet, played: Played, *, router: str, command: str) -> str:
    """The report of a run that was recorded."""
    question, taken = fleet.question, played.recording
    if taken is None:
        raise ValueError("the run was not recorded")
    title = f"{question.model.name} on {question.chips} × {question.chip.title}"
    return document(
        f"{title}, simulated",
        [
            f"<h1>{escape(title)}</h1>",
            f"<p>{escape(_load(played.report))} {SIMULATED}</p>",
            f"<pre>{escape(command)}</pre>",
            _fleet(fleet, router),
            _cards(fleet, played),
            _latencies(played, taken),
            _groups("class", played.classes, played),
            _groups("model", played.models, played),
            over_time(taken),
            _engines(played, taken),
            _sources(fleet, played),
        ],
    )


def _load(report: LatencyReport) -> str:
    done = max(report.succeeded, 1)
    failed = f", {report.failed:,} of them failed" if report.failed else ""
    return (
        f"{report.requests:,} requests in {number(report.duration_s)} s{failed}; on average "
        f"{report.prompt_tokens / done:,.0f} tokens in and {report.output_tokens / done:,.0f} out."
    )


def _fleet(fleet: Fleet, router: str) -> str:
    pools = "; ".join(map(str, fleet.pools))
    idle = f"; {fleet.idle_chips} chips idle" if fleet.idle_chips else ""
    return f"<p><b>{escape(pools)}{idle}</b>, router {escape(router)}.</p>"


# ── figures ──────────────────────────────────────────────────────────────────────────


def _cards(fleet: Fleet, played: Played) -> str:
    done, taken = played.report, played.recording
    assert taken is not None
    chips = fleet.question.chips
    energy = played.joules / max(done.output_tokens, 1)
    money = None if played.usd_per_mtoken is None else quantity(played.usd_per_mtoken, "$")
    cells = [
        (*_felt(done.ttft_s), "TTFT, p50", "time to first token"),
        (*_felt(done.tpot_s), "TPOT, p50", "mean time between tokens"),
        (*_felt(done.latency_s), "end to end, p50", "from arrival to the last token"),
        (
            number(done.output_tokens_per_s),
            f"{number(done.output_tokens_per_s / chips)} a chip",
            "output tokens/s",
            "over the whole run",
        ),
        (f"{played.use:.1%}", "", "engines in a step", "mean over engines and time"),
        *(
            (
                f"{one.mean:.1%}",
                f"p99 {one.p99:.1%}, max {one.most:.1%}",
                f"KV held{_of(series, taken)}",
                "share of blocks",
            )
            for series, one in zip(taken.series, taken.occupancy, strict=True)
        ),
        (f"{played.prefix_hits:.1%}", "", "prompt tokens from cache", "not computed again"),
        (money or "no price", "", "per million output tokens", "all chips, idle ones too"),
        (quantity(energy, "J"), "", "energy per output token", "all chips, idle ones too"),
    ]
    if done.slo != Slo():
        within = (
            f"{done.attainment:.1%}",
            f"{number(done.goodput_tokens_per_s)} tokens/s",
            "within the limits",
            _limits(done.slo),
        )
        cells.insert(3, within)
    return f'<h2>Figures</h2><div class="cards">{"".join(card(*cell) for cell in cells)}</div>'


def _felt(one: Percentiles | None) -> tuple[str, str]:
    return (NOTHING, "") if one is None else (quantity(one.p50, "s"), f"p99 {quantity(one.p99, 's')}")


def _of(series: Series, taken: Recording) -> str:
    return "" if len(taken.series) == 1 else f", {series.role}"


def _limits(slo: Slo) -> str:
    named = (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s), ("end to end", slo.latency_s))
    return ", ".join(f"{name} ≤ {quantity(value, 's')}" for name, value in named if value is not None)


_MOMENTS = (
    ("mean", "mean"),
    ("p50", "p50"),
    ("p90", "p90"),
    ("p99", "p99"),
    ("p99.9", "p99_9"),
    ("max", "most"),
)


def _latencies(played: Played, taken: Recording) -> str:
    done = played.report
    felt = (
        ("TTFT", done.ttft_s, "ttft_s", done.slo.ttft_s),
        ("TPOT", done.tpot_s, "tpot_s", done.slo.tpot_s),
        ("end to end", done.latency_s, "latency_s", done.slo.latency_s),
    )
    rows = [
        [name, *(NOTHING if one is None else quantity(getattr(one, field), "s") for _, field in _MOMENTS)]
        for name, one, _, _ in felt
    ]
    parts = _parts(taken.records)
    drawn = "".join(
        _distribution(name, field, limit, parts) for name, one, field, limit in felt if one is not None
    )
    return (
        "<h2>Latencies</h2><p>Of requests that came to their end. The curves say which share took at most so "
        f"long.</p>{table(['', *(name for name, _ in _MOMENTS)], rows)}"
        f'<div class="panels">{drawn}{waits(taken)}</div>'
    )


def _parts(records: Sequence[RequestRecord]) -> dict[str, list[RequestRecord]]:
    """All successful requests, and those of each class, else model, where there are few."""
    good = [one for one in records if one.ok]
    for label in ("priority_class", "model"):
        names = sorted({getattr(one, label) or "" for one in good})
        if 1 < len(names) <= SPLIT:
            split = {
                name or "(none)": [one for one in good if (getattr(one, label) or "") == name]
                for name in names
            }
            return {"all": good, **split}
    return {"all": good}


def _distribution(
    name: str, field: str, limit_s: float | None, parts: Mapping[str, Sequence[RequestRecord]]
) -> str:
    shares = np.unique(np.concatenate((np.linspace(0, 1, 101), 1 - np.geomspace(0.1, 0.001, 41))))
    lines = []
    for i, (part, records) in enumerate(parts.items()):
        values = [value for value in (getattr(one, field) for one in records) if value is not None]
        if values:
            spread = np.maximum(np.quantile(np.array(values) / MS, shares), 1e-6)
            lines.append(Line(name=part, x=spread.tolist(), y=(100 * shares).tolist(), style=f"c{i}"))
    rules = [] if limit_s is None else [Rule(x=limit_s / MS, name="limit")]
    drawn = curves(lines, x="ms", y="% of requests", log=True, rules=rules)
    return figure(name, [(line.style, line.name) for line in lines] if len(lines) > 1 else [], drawn)


def _groups(head: str, groups: Mapping[str, Group], played: Played) -> str:
    if not groups:
        return ""
    heads = [
        head,
        "requests",
        "TTFT p50",
        "TTFT p99",
        "TPOT p50",
        "TPOT p99",
        "goodput tokens/s",
        "within limits",
    ]
    rows = []
    for name, group in groups.items():
        done = group.report
        felt = [
            NOTHING if one is None else quantity(getattr(one, field), "s")
            for one in (done.ttft_s, done.tpot_s)
            for field in ("p50", "p99")
        ]
        spent = (number(played.usd_per_mtoken_of(group)), number(played.joules_per_token(group)))
        count = f"{done.succeeded:,} of {done.requests:,}"
        rates = (number(done.goodput_tokens_per_s), f"{done.attainment:.1%}")
        rows.append([name or "(none)", count, *felt, *rates, *spent])
    return (
        f"<h2>By {head}</h2><p>Over the whole run's time; money and energy by the share of tokens "
        "computed.</p>" + table([*heads, "$/Mtoken", "J/token"], rows)
    )


def _engines(played: Played, taken: Recording) -> str:
    duration_s = played.report.duration_s
    rows = [
        [
            str(i),
            f"{one.steps:,}",
            f"{one.busy_s / duration_s:.1%}",
            f"{one.computed_tokens - one.output_tokens:,}"
            if one.computed_tokens > one.output_tokens
            else "0",
            f"{one.output_tokens:,}",
            f"{one.prefix_hit_tokens / max(one.prompt_tokens, 1):.1%}",
            f"{one.kv_blocks_total:,}",
            f"{one.preemptions:,}",
        ]
        for i, one in enumerate(played.engines)
    ]
    heads = [
        "engine",
        "steps",
        "in a step",
        "prompt tokens computed",
        "output tokens",
        "from cache",
        "KV blocks",
        "preemptions",
    ]
    return f"<details><summary>Each of {len(rows)} engines</summary>{table(heads, rows)}</details>"


def _sources(fleet: Fleet, played: Played) -> str:
    question = fleet.question
    steps = tags(played.sources)
    simulated = tags(frozenset({Source.SIMULATED}))
    rows = [
        (
            "latencies, tokens, rates, goodput",
            "moments of the simulated run; steps as priced",
            played.sources,
        ),
        (
            "engines in a step, KV held, cache hits, preemptions",
            "counted in the simulated run",
            played.sources,
        ),
        ("energy", "joules of priced steps, and the chip's idle power between them", played.sources),
        (
            "money",
            "chips asked for, over the run's time, at the price of a chip-hour",
            _priced(fleet, played),
        ),
    ]
    told = table(
        ["figure", "how it comes about", "source"],
        [[name, how, _mixed(sources)] for name, how, sources in rows],
    )
    return (
        f"<h2>Sources and assumptions</h2><p>Figures: {simulated}, from steps whose price is {steps}. "
        f"{1 - USABLE_MEMORY:.0%} of a chip's memory is left to the runtime; an attention group is an engine "
        "of its own; tokens are made up and no request stops before its length.</p>"
        f"{told}<p>Below, every figure of {escape(question.chip.title)} that the prices rest on.</p>"
        + chip_facts(question.chip, question.price)
    )


def _mixed(sources: frozenset[Source]) -> str:
    """Apart, so that a narrow column can break it."""
    return Source.mix(frozenset({Source.SIMULATED}) | sources).replace("+", " + ")


def _priced(fleet: Fleet, played: Played) -> frozenset[Source]:
    price = fleet.question.price
    return played.sources if price is None else played.sources | {price.chip_hour.source}
