"""How the answer of `tongyun plan` looks: tables and plot for people, JSON for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from tongyun.codesign.plan import Answer, Offer
    from tongyun.codesign.space import Question

SHOWN = 12
"""Rows of the Pareto table; the plot and --json have them all."""

TERMS = (
    "TTFT: prefill of a prompt beside the decoding batch, with the mean wait behind other prompts. "
    "TPOT: mean time between tokens, interleaved prefill included. "
    "tok/s/chip and $/Mtok: output tokens over all chips asked for, idle ones too. "
    "idle: chips that no replica as quick finds room on. "
    "batch: sequences decoding at once on a replica, the main kind's. "
    "tokens/step: the engine's token budget of a step. "
    "prefill, decode: pools of their own; keys and values are handed over."
)


# ── for programs ─────────────────────────────────────────────────────────────────────

_RANGED = (
    "ttft_s",
    "tpot_s",
    "tok_s_per_chip",
    "usd_per_mtoken",
    "usd_per_mtoken_total",
    "joules_per_token",
)


def as_json(answer: Answer, seconds: float) -> dict[str, Any]:
    """The answer in SI; the same question gives the same object but for `seconds`."""
    question = answer.question
    return {
        "model": question.model.name,
        "chip": question.chip.name,
        "chips": question.chips,
        "isl": question.isl,
        "osl": question.osl,
        "precision": question.precision,
        "usd_per_chip_hour": None if question.price is None else question.price.chip_hour.value,
        "prefix_hit": question.prefix_hit,
        "draft_tokens": question.draft_tokens,
        "acceptance": question.acceptance,
        "tokens_per_step": question.step_tokens,
        "pools": question.pools,
        "kernels": {"priced": question.kernels, "modelled": modelled(question)},
        "best": None if answer.best is None else _offer_json(answer.best),
        "pareto": [_offer_json(offer) for offer in answer.pareto],
        "limit": answer.limit,
        "cut": dict(answer.cut),
        "evaluated": answer.evaluated,
        "seconds": seconds,
    }


def modelled(question: Question) -> list[str] | None:
    """Operators that have no lowered program and are priced by a model; None where all are."""
    from tongyun.chip.kernels import kernels

    priced = kernels(question.at()) if question.kernels == "lowered" else None
    return None if priced is None else sorted(priced.modelled)


def _offer_json(offer: Offer) -> dict[str, Any]:
    from tongyun.units import Source

    plan, shard = offer.plan, offer.plan.shard
    return {
        "plan": {
            "tp": shard.tp,
            "pp": shard.pp,
            "ep": shard.ep,
            "dp": shard.dp,
            "batch": plan.batch,
            "step_tokens": plan.step_tokens,
            "replicas": plan.replicas,
            "idle_chips": plan.idle_chips,
            "idle_reason": plan.idle_reason or None,
            "pools": [dict(pool) for pool in plan.pools],
        },
        **{key: getattr(offer.figures, key) for key in _RANGED},
        "tok_s_per_user": offer.figures.tok_s_per_user,
        "range": {key: _range(offer, key) for key in _RANGED} if offer.slow else None,
        "meets": offer.meets,
        "source": Source.mix(offer.sources),
    }


def _range(offer: Offer, key: str) -> list[float] | None:
    """Least and most over the corners, the nominal one among them."""
    corners = [figures for figures in (offer.figures, offer.slow, offer.fast) if figures is not None]
    values = [getattr(figures, key) for figures in corners]
    return None if None in values else [min(values), max(values)]


# ── for people ───────────────────────────────────────────────────────────────────────


def show(answer: Answer, seconds: float) -> None:
    """Best with its ranges, Pareto, plot, and what was cut."""
    from tongyun.report import scatter
    from tongyun.report import show as put

    question, best = answer.question, answer.best
    load = said(question)
    put(f"[bold]{question.model.name} on {question.chips} × {question.chip.title}, {load}[/]")
    if best is not None:
        put(_best_table(best))
    if answer.pareto:
        put(_pareto_table(answer.pareto))
    front = [(offer.figures.tok_s_per_user, offer.figures.tok_s_per_chip) for offer in answer.pareto]
    if len(front) > 1:
        series = {"Pareto": front}
        if best is not None:
            series["best"] = [(best.figures.tok_s_per_user, best.figures.tok_s_per_chip)]
        put(scatter(series, x="tok/s/user", y="tok/s/chip"))
    rest = modelled(question)
    if rest is not None:
        models = f"; by kernel models: {', '.join(rest)}" if rest else ""
        put(f"operators: analytic price of the programs that the compiler makes of them{models}")
    cut = ", ".join(f"{count} by {reason}" for reason, count in answer.cut.items() if count)
    put(f"{answer.evaluated} candidates in {seconds:.2f} s; cut: {cut or 'none'}")


def said(question: Question) -> str:
    """The load of equal requests, in words."""
    load = f"{question.isl} tokens in, {question.osl} out"
    if question.prefix_hit:
        load += f", {question.prefix_hit:.0%} of the input cached"
    if question.draft_tokens:
        load += (
            f", {question.draft_tokens} drafted of which each holds with {question.acceptance:.0%}: "
            f"{question.step_tokens:.2f} a step"
        )
    return load


def _best_table(best: Offer) -> Table:
    from tongyun.report import column, quantity, source_tag, table

    plan, figures = best.plan, best.figures
    rows = [
        ["plan", str(plan)],
        *(
            [_BATCH[role], f"{kind.batch} sequences, {kind.step_tokens} tokens a step"]
            for role, kind in plan.kinds
        ),
    ]
    if plan.idle_chips:
        rows.append(["idle", plan.idle_reason])
    for key, name, unit in _FIGURES:
        low, high = _range(best, key) or (None, None)
        rows.append([name, quantity(getattr(figures, key), unit, low=low, high=high)])
    rows.append(["source", source_tag(best.sources)])
    columns = [column("best", left=True), column("", left=True, wrap=True)]
    return table("", columns, rows, caption=None if best.slow is None else "(slow–fast corner of the spec)")


_BATCH = {
    "mixed": "batch of a replica",
    "prefill": "batch of a prefill replica",
    "decode": "batch of a decode replica",
}
_FIGURES = (
    ("ttft_s", "TTFT", "s"),
    ("tpot_s", "TPOT", "s"),
    ("tok_s_per_chip", "output per chip", "tokens/s"),
    ("usd_per_mtoken", "per million output tokens", "$"),
    ("usd_per_mtoken_total", "per million tokens, input counted", "$"),
    ("joules_per_token", "energy per output token", "J"),
)


def _pareto_table(offers: tuple[Offer, ...]) -> Table:
    from tongyun.report import column, number, table

    rows = []
    for offer in _spread(offers):
        plan, figures = offer.plan, offer.figures
        cells = (
            figures.ttft_s * 1e3,
            figures.tpot_s * 1e3,
            figures.tok_s_per_user,
            figures.tok_s_per_chip,
            figures.usd_per_mtoken,
            figures.joules_per_token,
        )
        meets = "yes" if offer.meets else "[dim]no[/]"
        places = (str(plan), str(plan.idle_chips), str(plan.batch), str(plan.step_tokens))
        rows.append([*places, *(number(cell) for cell in cells), meets])
    heads = ("idle", "batch", "tokens/step", "TTFT ms", "TPOT ms", "tok/s/user", "tok/s/chip", "$/Mtok")
    columns = [column("Pareto", left=True), *(column(head) for head in (*heads, "J/tok", "in limits"))]
    return table("", columns, rows, caption=TERMS)


def _spread(offers: tuple[Offer, ...]) -> list[Offer]:
    """At most `SHOWN` of them, evenly, both ends kept."""
    if len(offers) <= SHOWN:
        return list(offers)
    return [offers[round(i * (len(offers) - 1) / (SHOWN - 1))] for i in range(SHOWN)]
