"""`tongyun chip check`: the planner's price of a step beside the lowered program's and its simulation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tongyun.chip.ppu.beside import Fact, Work
    from tongyun.model.graph import Operator
    from tongyun.specs import ChipSpec


def check(
    model: Annotated[str, typer.Argument(help="A Qwen3 model of the catalogue, or a directory.")],
    chip: Annotated[str, typer.Option(help="A chip that the planner prices.")] = "zhenwu-810e",
    inside: Annotated[
        str | None, typer.Option(help="The PPU it is made of, or a TOML file; default the same name.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="New tokens of the step.", min=1)] = 1,
    context: Annotated[int, typer.Option(help="Tokens in the cache before the step.", min=0)] = 0,
    chips: Annotated[int, typer.Option(help="Cut the model over so many chips.", min=1)] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """One step as the planner prices it, as the lowered program's price says, and as it is simulated."""
    from tongyun.chip.ppu.beside import beside, reached, stated
    from tongyun.chip.ppu.cached import cached_step
    from tongyun.chip.ppu.fusions import Fusions
    from tongyun.errors import Infeasible, InputError
    from tongyun.specs import find_chip, find_model, find_ppu

    spec, ppu = find_chip(chip), find_ppu(inside or chip).at()
    config, name = find_model(model)
    operators = _operators(config, name, (tokens, context, chips))
    try:
        program = cached_step(
            config, ppu, tokens=tokens, context=context, layers=None, fusions=Fusions(), chips=chips,
            dtype="bf16", symbols=None,
        )  # fmt: skip
    except Infeasible as short:
        raise InputError(f"{model} with --chips {chips}: {short}") from None
    works = beside(operators, spec.at(), program, ppu, balanced(model, tokens, context))
    facts = [fact for fact in (*stated(spec.at(), ppu), *reached(spec.at(), ppu)) if not fact.is_same]
    if json:
        _print_json(spec, operators, works, facts)
    else:
        _print_table(f"{name} on {spec.title}", _source(spec, operators), works, facts)


def balanced(model: str, tokens: int, context: int) -> dict[str, list[int]]:
    """The numbers that a step reads from memory, experts' rows as balanced."""
    from tongyun.specs import find_model

    config, _ = find_model(model)
    symbols = {"position": [context]}
    if "num_experts" in config:
        experts, pairs = int(config["num_experts"]), tokens * int(config["num_experts_per_tok"])
        symbols["expert_offset"] = [number * pairs // experts for number in range(experts + 1)]
    return symbols


def _operators(config: dict[str, object], name: str, step_of: tuple[int, int, int]) -> tuple[Operator, ...]:
    """The planner's operators of a step of (tokens, context, chips), every row sampled as in the program."""
    from tongyun.model.config import ModelConfig
    from tongyun.model.graph import Sequences, StepShape
    from tongyun.model.shard import Shard
    from tongyun.model.steps import step

    tokens, context, chips = step_of
    rows = Sequences(new=tokens, context=context)
    shape = StepShape(prefill=rows, sampled=tokens)
    if tokens == 1:
        shape = StepShape(decode=rows, sampled=1)
    return step(ModelConfig.from_hf(config, name=name), shape, Shard(tp=chips))


def _source(spec: ChipSpec, operators: Sequence[Operator]) -> str:
    from tongyun.cost import sources_of
    from tongyun.units import Source

    return Source.mix(sources_of(tuple(operators), spec.at()))


def _print_json(
    spec: ChipSpec, operators: Sequence[Operator], works: Sequence[Work], facts: Sequence[Fact]
) -> None:
    from dataclasses import asdict
    from json import dumps

    from tongyun.chip.ppu.beside import whole

    answer = {
        "chip": spec.name,
        "sources": {
            "planner_s": _source(spec, operators),
            "analytic_s": "analytic",
            "simulated_s": "simulated",
        },
        "works": [{**asdict(work), "planner_over_analytic": work.ratio} for work in works],
        "lowered": {**asdict(whole(works)), "planner_over_analytic": whole(works).ratio},
        "unlike": [asdict(fact) for fact in facts],
    }
    typer.echo(dumps(answer, indent=2))


def _print_table(title: str, source: str, works: Sequence[Work], facts: Sequence[Fact]) -> None:
    from rich.console import Console

    from tongyun.chip.ppu.beside import whole
    from tongyun.report import column, quantity, table

    heads = ("planner ms", "program ms", "simulated ms", "planner / program", "program / simulated")
    columns = [column("work", left=True), *map(column, (*heads, "GFLOP", "weights MB"))]
    rows = [_row(work) for work in works if work.is_lowered]
    rows.append(_row(whole(works)))
    rows += [_row(work) for work in works if not work.is_lowered]
    caption = f"planner: {source}; program: analytic; simulated"
    for fact in facts:
        sides = (quantity(side, fact.unit) for side in (fact.planner, fact.inside))
        caption += "; {}: {} for the planner, {} inside".format(fact.name, *sides)
    Console().print(table(title, columns, rows, caption=caption))


def _row(work: Work) -> list[str]:
    """Counts of both sides where they are unlike."""
    sides = {
        "GFLOP": (work.planner_flops / 1e9, work.program_flops / 1e9),
        "MB": (work.planner_weight_bytes / 1e6, work.program_weight_bytes / 1e6),
    }
    counts = []
    for ours, theirs in sides.values():
        same = ours == theirs or not work.is_lowered
        counts.append(f"{ours:,.1f}" if same else f"{ours:,.1f} / {theirs:,.1f}")
    return [
        work.name,
        f"{work.planner_s * 1e3:.3f}",
        *(f"{side * 1e3:.3f}" if work.is_lowered else "" for side in (work.analytic_s, work.simulated_s)),
        "" if work.ratio is None else f"{work.ratio:.2f}",
        f"{work.analytic_s / work.simulated_s:.3f}" if work.is_lowered else "",
        *counts,
    ]


__all__ = ["balanced", "check"]
