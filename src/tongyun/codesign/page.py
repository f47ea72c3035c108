"""A plan's report as one HTML file that needs nothing else: no script, no font, no network.

Composes what `plan`, `explain` and the specs say; computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from tongyun.codesign.drawing import Bar, Point, points, ranges, waterfall
from tongyun.codesign.explain import Explanation, Step
from tongyun.codesign.plan import Answer, Figures, Offer
from tongyun.codesign.sheet import card, chip_facts, document, key, table, tags
from tongyun.codesign.steady import USABLE_MEMORY
from tongyun.report import number, quantity
from tongyun.units import GB, Source

FIGURES = (
    ("TTFT", "ttft_s", "s", "time to first token"),
    ("TPOT", "tpot_s", "s", "mean time between tokens"),
    ("output per chip", "tok_s_per_chip", "tokens/s", "over all chips asked for, idle ones too"),
    ("per million output tokens", "usd_per_mtoken", "$", "at the price of a chip-hour below"),
    ("energy per output token", "joules_per_token", "J", "of the replica's chips"),
)


def page(answers: Sequence[Answer], explanation: Explanation | None, *, command: str) -> str:
    """The report of the first answer, with all of them compared where there are several."""
    main = answers[0]
    question = main.question
    title = f"{question.model.name} on {question.chips} × {question.chip.title}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{question.isl} tokens in, {question.osl} out{_limits(main)}. Predicted, not measured.</p>",
        f"<pre>{escape(command)}</pre>",
        _best(main),
        _pareto(main),
        "" if explanation is None else _explained(explanation),
        _compared(answers) if len(answers) > 1 else "",
        _counted(main),
        _sources(main),
    ]
    return document(title, parts)


def _limits(answer: Answer) -> str:
    question = answer.question
    limits = [
        f"{name} at most {quantity(value, 's')}"
        for name, value in (("TTFT", question.ttft_s), ("TPOT", question.tpot_s))
        if value is not None
    ]
    return "; " + ", ".join(limits) if limits else ""


def _best(answer: Answer) -> str:
    best = answer.best
    if best is None:
        return f"<h2>No plan</h2><p>{escape(answer.limit or '')}</p>"
    cards = "".join(
        card(_value(best, attribute, unit), _span(best, attribute, unit), name, what)
        for name, attribute, unit, what in FIGURES
    )
    plan = best.plan
    loads = ", ".join(f"{kind.batch} sequences on {kind.step_tokens} tokens a step" for _, kind in plan.kinds)
    text = f"{plan}: {loads}" + (f"; {plan.idle_reason}" if plan.idle_chips else "")
    span = " Ranges: slow to fast corner of the chip's spec." if best.slow else ""
    return (
        f"<h2>Best plan</h2><p><b>{escape(text)}</b>. Sources: {tags(best.sources)}.{span}</p>"
        f'<div class="cards">{cards}</div>'
    )


def _corners(offer: Offer) -> list[Figures]:
    return [figures for figures in (offer.figures, offer.slow, offer.fast) if figures is not None]


def _ranged(offer: Offer, key: str, unit: str) -> str:
    values = [getattr(figures, key) for figures in _corners(offer)]
    if None in values:
        return "no price"
    return quantity(values[0], unit, low=min(values), high=max(values))


def _value(offer: Offer, key: str, unit: str) -> str:
    value = getattr(offer.figures, key)
    return "no price" if value is None else quantity(value, unit)


def _span(offer: Offer, key: str, unit: str) -> str:
    """Least to most over the corners; empty where there is one."""
    values = [getattr(figures, key) for figures in _corners(offer)]
    if None in values or min(values) == max(values):
        return ""
    return f"{quantity(min(values), unit)} – {quantity(max(values), unit)}"


def _pareto(answer: Answer) -> str:
    if not answer.pareto:
        return ""
    marks = [_point(offer, "in" if offer.meets else "out") for offer in answer.pareto]
    if answer.best is not None:
        marks.append(_point(answer.best, "best"))
    drawn = points(marks, x="tokens/s per user", y="tokens/s per chip")
    rows = [
        [
            str(offer.plan),
            str(offer.plan.idle_chips),
            str(offer.plan.batch),
            str(offer.plan.step_tokens),
            *(_ranged(offer, key, unit) for _, key, unit, _ in FIGURES),
            "yes" if offer.meets else "no",
        ]
        for offer in answer.pareto
    ]
    heads = ["plan", "idle chips", "batch", "tokens/step", *(name for name, _, _, _ in FIGURES), "in limits"]
    return (
        "<h2>Pareto</h2><p>Plans within memory and TTFT that no other beats in both. "
        f"{key('best', 'best')} {key('in', 'within the limits')} {key('out', 'TPOT too long')}</p>{drawn}"
        f"<details><summary>All {len(rows)} of them</summary>{table(heads, rows)}</details>"
    )


def _point(offer: Offer, style: str) -> Point:
    figures = offer.figures
    title = f"{offer.plan}, batch {offer.plan.batch}: TPOT {quantity(figures.tpot_s, 's')}"
    return Point(x=figures.tok_s_per_user, y=figures.tok_s_per_chip, title=title, style=style)


def _explained(explanation: Explanation) -> str:
    parts = explanation.tpot_s
    memory = explanation.memory
    sizes = (memory.weights, float(memory.kv[0]), float(memory.activations[0]))
    of_pool = "" if explanation.plan.prefill is None else " of the decode pool"
    stage = f" of stage {explanation.stage}" if explanation.plan.shard.pp > 1 else ""
    if explanation.plan.prefill is None:
        rest = (
            f"{quantity(parts['prefill'], 's')} in steps that carry prefill, which are "
            f"{explanation.prefill_share:.1%} of all"
        )
    else:
        rest = f"{quantity(parts['hand_over'], 's')} of the hand-over from the prefill pool"
    bounds = " ".join(key(bound, bound) for bound in _BOUNDS)
    return (
        "<h2>Where each microsecond goes</h2>"
        f"<p>TPOT {quantity(sum(parts.values()), 's')} = {quantity(parts['decode'], 's')} in decode steps + "
        f"{rest}. The fullest chip{of_pool} holds {number(sizes[0] / GB)} GB of "
        f"weights, {number(sizes[1] / GB)} GB of KV and {number(sizes[2] / GB)} GB of activations. "
        f"Below, one rank{stage}, by what its time goes to: {bounds}</p>"
        + _step(explanation.decode)
        + _step(explanation.prefill)
    )


_BOUNDS = ("memory", "compute", "link", "launch", "host")


def _step(step: Step) -> str:
    carried = f" and {step.prefilling:.4g} prompt tokens" if step.prefilling else ""
    head = f"{step.what} step: {quantity(step.seconds, 's')} for {step.decoding:.4g} sequences{carried}"
    bars = [
        Bar(
            name=line.name,
            size=line.seconds,
            label=f"{quantity(line.seconds, 's')}, {line.share:.1%}",
            style=line.bound,
        )
        for line in step.lines
    ]
    rows = [
        [
            line.name,
            str(line.repeat),
            quantity(line.seconds, "s"),
            f"{line.share:.1%}",
            number(line.flops / 1e9) if line.flops else "–",
            *(number(size / 1e6) if size else "–" for size in _sizes(line)),
            "–" if line.of_roofline is None else f"{line.of_roofline:.0%}",
            line.bound,
            Source.mix(line.sources),
        ]
        for line in step.lines
    ]
    beside = "".join(
        f"<p>Beside that the {who} is at work for {quantity(spent, 's')}, {Source.mix(step.sources)}.</p>"
        for who, spent in step.beside_s.items()
    )
    sizes = ("weight MB", "KV MB", "activation MB", "link MB")
    heads = ["operator", "×", "time", "share", "GFLOP", *sizes, "of roofline", "bound", "source"]
    return (
        f"<h3>{escape(head)}</h3>{beside}{waterfall(bars, title=head)}"
        f"<details><summary>Line by line</summary>{table(heads, rows)}</details>"
    )


def _sizes(line: object) -> Iterable[float]:
    return (getattr(line, f"{kind}_bytes") for kind in ("weight", "kv", "activation", "link"))


def _compared(answers: Sequence[Answer]) -> str:
    rows, prices, refused = [], {}, []
    for answer in answers:
        label = f"{answer.question.chips} × {answer.question.chip.name}"
        if answer.best is None:
            rows.append([label, "none", *[""] * len(FIGURES), ""])
            refused.append(f"<p>{escape(label)}: no plan. {escape(answer.limit or '')}.</p>")
            continue
        best = answer.best
        cells = [_ranged(best, key, unit) for _, key, unit, _ in FIGURES]
        rows.append([label, str(best.plan), *cells, Source.mix(best.sources)])
        usd = [figures.usd_per_mtoken for figures in _corners(best) if figures.usd_per_mtoken is not None]
        if usd:
            prices[label] = (usd[0], min(usd), max(usd))
    heads = ["chips", "best plan", *(name for name, _, _, _ in FIGURES), "source"]
    drawn = f"<p>Dollars per million output tokens:</p>{ranges(prices, unit='$')}" if prices else ""
    return f"<h2>Compared under the same limits</h2>{drawn}{table(heads, rows)}{''.join(refused)}"


def _counted(answer: Answer) -> str:
    cut = ", ".join(f"{count} by {reason}" for reason, count in answer.cut.items() if count) or "none"
    return f"<h2>Searched</h2><p>{answer.evaluated} candidates; cut: {escape(cut)}.</p>"


def _sources(answer: Answer) -> str:
    question = answer.question
    return (
        "<h2>Sources and assumptions</h2>"
        "<p>Requests are alike and arrive at random; engines prefill in chunks beside decoding; operators do "
        "not overlap; "
        f"{1 - USABLE_MEMORY:.0%} of a chip's memory is left to the runtime. Everything else "
        f"rests on these figures of {escape(question.chip.title)}:</p>"
        + chip_facts(question.chip, question.price)
    )
