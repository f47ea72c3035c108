"""`tongyun plan`: which deployment of a model on these chips, and what it gives.

Reads the flags, asks `codesign.plan`, and writes the answer for people or programs.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from tongyun.codesign.plan import Answer, Offer
    from tongyun.codesign.space import Question
    from tongyun.model.config import ModelConfig
    from tongyun.model.graph import Precision
    from tongyun.specs import ChipSpec, PriceSpec

SHOWN = 12
"""Rows of the Pareto table; the plot and --json have them all."""

TERMS = (
    "TTFT: prefill of a prompt beside the decoding batch, with the mean wait behind other prompts. "
    "TPOT: mean time between tokens, interleaved prefill included. "
    "tok/s/chip and $/Mtok: output tokens over all chips asked for, idle ones too. "
    "batch: sequences decoding at once on a replica. tokens/step: the engine's token budget of a step."
)


def plan(
    model: Annotated[str, typer.Option(help="Hugging Face id in the catalogue, or a directory.")],
    chip: Annotated[str, typer.Option(help="Catalogue name, `local` (calibrated), or a TOML file.")],
    isl: Annotated[int, typer.Option(help="Input tokens of a request.")],
    osl: Annotated[int, typer.Option(help="Output tokens of a request.")],
    chips: Annotated[int, typer.Option(help="Chips there are.")] = 1,
    ttft_ms: Annotated[float | None, typer.Option(help="Most time to first token.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="Most mean time between tokens.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Weights and arithmetic; default as released: bf16, fp8, mxfp4.")
    ] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Keys and values; default bf16.")] = None,
    usd_per_chip_hour: Annotated[
        float | None, typer.Option(help="Your price, in place of the catalogue's.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs: SI units, all of the Pareto.")] = False,
) -> None:
    """Plan a deployment: best and Pareto under limits on TTFT and TPOT."""
    from tongyun.codesign.plan import plan as search
    from tongyun.errors import Infeasible
    from tongyun.units import MS

    begin = time.perf_counter()
    question = ask(
        {"model": model, "chip": chip, "chips": chips, "isl": isl, "osl": osl},
        ttft_s=None if ttft_ms is None else ttft_ms * MS,
        tpot_s=None if tpot_ms is None else tpot_ms * MS,
        dtypes=(dtype, kv_dtype),
        usd_per_chip_hour=usd_per_chip_hour,
    )
    answer = search(question)
    seconds = time.perf_counter() - begin
    if json:
        from tongyun.report import to_json

        typer.echo(to_json(as_json(answer, seconds)))
    else:
        show(answer, seconds)
    if answer.best is None:
        raise Infeasible(
            f"no plan for {question.model.name} on {chips} × {question.chip.name}: {answer.limit}"
        )


def ask(
    given: dict[str, Any],
    *,
    ttft_s: float | None,
    tpot_s: float | None,
    dtypes: tuple[str | None, str | None],
    usd_per_chip_hour: float | None,
) -> Question:
    """The question behind the flags; wrong names raise `InputError` with near ones."""
    from tongyun.codesign.space import Question
    from tongyun.model.config import ModelConfig
    from tongyun.specs import find_chip, find_model

    raw, name = find_model(given["model"])
    config = ModelConfig.from_hf(raw, name=name, file=given["model"])
    spec = find_chip(given["chip"])
    dtype, kv_dtype = dtypes
    return Question(
        model=config,
        chip=spec,
        chips=given["chips"],
        isl=given["isl"],
        osl=given["osl"],
        precision=_precision(config, spec, dtype, kv_dtype),
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        price=_price(spec.name, usd_per_chip_hour),
    )


def _precision(config: ModelConfig, spec: ChipSpec, dtype: str | None, kv_dtype: str | None) -> Precision:
    """As asked for; a calibrated machine runs our engine, which keeps the types it was measured with."""
    from tongyun.chip.calibrated import engine_precision
    from tongyun.codesign.space import default_dtype
    from tongyun.model.graph import Precision

    if spec.calibration is not None and dtype is None and kv_dtype is None:
        return engine_precision(spec.calibration)
    return Precision.of(dtype or default_dtype(config, spec), kv_dtype)


def _price(chip: str, usd_per_chip_hour: float | None) -> PriceSpec | None:
    """The user's price, else the catalogue's, else none."""
    from tongyun.errors import InputError
    from tongyun.specs import Figure, PriceSpec, find_price, names
    from tongyun.units import Source

    if usd_per_chip_hour is None:
        return find_price(chip) if chip in names("prices") else None
    if not 0 < usd_per_chip_hour < float("inf"):
        raise InputError(f"--usd-per-chip-hour must be a positive number, got {usd_per_chip_hour}")
    figure = Figure.of(usd_per_chip_hour, Source.ASSUMED, "--usd-per-chip-hour")
    return PriceSpec(name=chip, chip=chip, basis="assumed", chip_hour=figure)


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
        "best": None if answer.best is None else _offer_json(answer.best),
        "pareto": [_offer_json(offer) for offer in answer.pareto],
        "limit": answer.limit,
        "cut": dict(answer.cut),
        "evaluated": answer.evaluated,
        "seconds": seconds,
    }


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
    load = f"{question.isl} tokens in, {question.osl} out"
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
    cut = ", ".join(f"{count} by {reason}" for reason, count in answer.cut.items() if count)
    put(f"{answer.evaluated} candidates in {seconds:.2f} s; cut: {cut or 'none'}")


def _best_table(best: Offer) -> Table:
    from tongyun.report import column, quantity, source_tag, table

    plan, figures = best.plan, best.figures
    idle = f", {plan.idle_chips} chips idle" if plan.idle_chips else ""
    rows = [
        ["plan", f"{plan.replicas} × ({plan.shard}){idle}"],
        ["batch of a replica", f"{plan.batch} sequences, {plan.step_tokens} tokens a step"],
    ]
    for key, name, unit in _FIGURES:
        low, high = _range(best, key) or (None, None)
        rows.append([name, quantity(getattr(figures, key), unit, low=low, high=high)])
    rows.append(["source", source_tag(best.sources)])
    columns = [column("best", left=True), column("", left=True, wrap=True)]
    return table("", columns, rows, caption=None if best.slow is None else "(slow–fast corner of the spec)")


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
        places = (str(plan.shard), str(plan.replicas), str(plan.batch), str(plan.step_tokens))
        rows.append([*places, *(number(cell) for cell in cells), meets])
    heads = ("replicas", "batch", "tokens/step", "TTFT ms", "TPOT ms", "tok/s/user", "tok/s/chip", "$/Mtok")
    columns = [column("Pareto", left=True), *(column(head) for head in (*heads, "J/tok", "in limits"))]
    return table("", columns, rows, caption=TERMS)


def _spread(offers: tuple[Offer, ...]) -> list[Offer]:
    """At most `SHOWN` of them, evenly, both ends kept."""
    if len(offers) <= SHOWN:
        return list(offers)
    return [offers[round(i * (len(offers) - 1) / (SHOWN - 1))] for i in range(SHOWN)]
