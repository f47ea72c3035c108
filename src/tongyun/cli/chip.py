"""`tongyun chip`: compile a model's step for a PPU, look at the program, profile it on the simulated chip."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tongyun.cli import chip_check, chip_run
from tongyun.cli.chip_check import balanced

if TYPE_CHECKING:
    from tongyun.chip.ppu.breakdown import Share
    from tongyun.chip.ppu.energy import Energy
    from tongyun.chip.ppu.program import Program
    from tongyun.chip.ppu.timing import Timing
    from tongyun.specs import PpuSpec

app = typer.Typer(help="Compile for a PPU and run on the simulated chip.", no_args_is_help=True)

run = app.command()(chip_run.run)
check = app.command()(chip_check.check)
Model = Annotated[str, typer.Argument(help="A Qwen3 model of the catalogue, or the path of a config.json.")]
Chip = Annotated[str, typer.Option(help="A PPU of the catalogue, or a TOML file.")]
Tokens = Annotated[int, typer.Option(help="New tokens of the step.", min=1)]
Context = Annotated[int, typer.Option(help="Tokens in the cache before the step.", min=0)]
Layers = Annotated[int | None, typer.Option(help="Take only so many layers.", min=1)]
Chips = Annotated[int, typer.Option(help="Cut the model over so many chips of one ICN domain.", min=1)]
Few = Annotated[str, typer.Option(help="What the products of the layers take: bf16, fp8, fp8_block, int8.")]
Without = Annotated[
    list[str] | None, typer.Option(help="Leave a fusion out: norm, rotate, swiglu, residual, all.")
]

Idle = Annotated[
    bool,
    typer.Option("--idle", help="Leave cores idle where that is faster; compiles for every number of cores."),
]


@app.command("compile")
def compile_(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the program goes.")],
    chip: Chip = "zhenwu-810e",
    tokens: Tokens = 1,
    context: Context = 0,
    layers: Layers = None,
    chips: Chips = 1,
    dtype: Few = "bf16",
    without: Without = None,
    idle: Idle = False,
) -> None:
    """Compile one step of a model into a program."""
    symbols = balanced(model, tokens, context) if idle else None
    program, spec = _program(model, chip, (tokens, context, layers, chips), dtype, without, symbols)
    program.save(output)
    words, on = len(program.words), spec.name if chips == 1 else f"each of {chips} {spec.name}"
    typer.echo(
        f"{output}: {len(program.kernels)} kernels, {words:,} instructions, "
        f"{program.hbm_bytes:,} bytes of HBM on {on}"
    )


@app.command()
def disasm(
    program: Annotated[Path, typer.Argument(help="A program written by `tongyun chip compile`.")],
) -> None:
    """Print a program as text, kernel by kernel."""
    from tongyun.chip.ppu import asm
    from tongyun.chip.ppu.program import Program

    loaded = Program.load(program)
    for instruction in asm.disassemble(loaded.words):
        if instruction.op == "BARRIER":
            typer.echo(f"\n; {loaded.kernels[instruction.plain('kernel')].name}")
        typer.echo(asm.line(instruction))


@app.command()
def profile(
    model: Model,
    chip: Chip = "zhenwu-810e",
    tokens: Tokens = 1,
    context: Context = 0,
    layers: Layers = None,
    chips: Chips = 1,
    dtype: Few = "bf16",
    without: Without = None,
    idle: Idle = False,
    every: Annotated[bool, typer.Option("--every", help="Run every layer instead of repeating one.")] = False,
    by: Annotated[
        str, typer.Option(help="Rows of the table: kind, layer, operator; the last two run every layer.")
    ] = "kind",
    trace: Annotated[
        Path | None, typer.Option(help="Write kernels and engines over time for Perfetto or Chrome.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Where the time, bytes and joules of one step go on the simulated chip."""
    from tongyun.chip.ppu import timing
    from tongyun.chip.ppu.energy import energy

    symbols = balanced(model, tokens, context)
    read = symbols if idle else None
    program, spec = _program(model, chip, (tokens, context, layers, chips), dtype, without, read)
    from tongyun.chip.ppu.breakdown import names_by, shares

    names = names_by(by, program)
    simulate = timing.simulate if every or by != "kind" else timing.simulate_repeated
    result = simulate(program, spec.at(), symbols)
    if trace is not None:
        from tongyun.chip.ppu.trace import save_trace

        events = save_trace(result, trace)
        typer.echo(f"{trace}: {events} events, a slice a kernel and engine (simulated)", err=True)
    parts = shares(result, spec, names if by != "kind" else list(result.kinds))
    if json:
        _print_json(result, energy(result, spec), by, parts)
    else:
        _print_table(f"{model} on {spec.title}", spec, result, energy(result, spec), (by, parts))


def _program(
    model: str,
    chip: str,
    step: tuple[int, int, int | None, int],
    dtype: str,
    without: list[str] | None,
    symbols: dict[str, list[int]] | None,
) -> tuple[Program, PpuSpec]:
    """The program of a step of (tokens, context, layers, chips)."""
    from tongyun.chip.ppu.cached import cached_step
    from tongyun.chip.ppu.fusions import Fusions
    from tongyun.errors import Infeasible, InputError
    from tongyun.specs import find_model, find_ppu

    tokens, context, layers, chips = step
    spec = find_ppu(chip)
    config, _ = find_model(model)
    fusions = Fusions.without(*(without or ()))
    try:
        return cached_step(
            config, spec.at(), tokens=tokens, context=context, layers=layers, fusions=fusions, chips=chips,
            dtype=dtype, symbols=symbols,
        ), spec  # fmt: skip
    except Infeasible as short:
        raise InputError(f"{model} with --chips {chips}: {short}") from None


def _print_json(result: Timing, joules: Energy, by: str, parts: dict[str, Share]) -> None:
    from dataclasses import asdict
    from json import dumps

    totals = {name: result.total(name) for name in ("flops", "hbm_bytes", "l2_bytes", "vector_elements")}
    answer = {
        "source": "simulated",
        "chip": result.ppu.name,
        "seconds": result.seconds,
        "seconds_within_envelope": joules.seconds,
        "cycles": result.total_cycles,
        "instructions": result.instructions,
        **totals,
        "joules": {name: list(values) for name, values in joules.joules.items()},
        f"{by}s": {name: asdict(share) for name, share in parts.items()},
    }
    typer.echo(dumps(answer, indent=2))


def _print_table(
    title: str, spec: PpuSpec, result: Timing, joules: Energy, cut: tuple[str, dict[str, Share]]
) -> None:
    from rich.console import Console

    from tongyun.report import column, table
    from tongyun.units import Source

    by, parts = cut
    # Layers and operators in the order in which they run; kinds by their time.
    order = sorted(parts.items(), key=lambda item: -item[1].seconds) if by == "kind" else parts.items()
    rows = []
    for name, share in order:
        rows.append(
            [
                name,
                str(share.kernels),
                f"{share.seconds * 1e3:.3f}",
                f"{100 * share.seconds / result.seconds:.1f}",
                f"{share.flops / 1e9:,.1f}",
                f"{share.hbm_bytes / 1e6:,.1f}",
                f"{share.joules * 1e3:,.1f}",
                f"{100 * share.roofline_s / share.seconds:.0f}",
            ]
        )
    heads = ("kernels", "ms", "%", "GFLOP", "HBM MB", "mJ", "% of roofline")
    columns = [column(by, left=True), *map(column, heads)]
    low, nominal, high = joules.total
    within = f"{joules.seconds * 1e3:.3f} ms within {spec.at().limit_w:.0f} W"
    power = f"{nominal:.3g} J ({low:.3g} to {high:.3g}), {nominal / joules.seconds:.0f} W"
    caption = f"simulated; {result.seconds * 1e3:.3f} ms, {within}; {power}"
    assumed = sum(figure.source is Source.ASSUMED for _, figure in spec.figures())
    caption += f"; {assumed} of the chip's figures are assumed"
    Console().print(table(title, columns, rows, caption=caption))


__all__ = ["app"]
