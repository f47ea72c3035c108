"""`tongyun calibrate`: measure this machine and keep what was found as the chip `local`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tongyun.cloud.engine.calibrate.measure import Setting
    from tongyun.specs import ChipSpec

DISTURBED_CORES = 0.15
"""Kept busy by others while a machine is measured; from here on its user is told."""


def calibrate(
    force: Annotated[bool, typer.Option(help="Measure again although a valid calibration is kept.")] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; a GPU is taken where there is one.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads the engine will use.")] = None,
    kernels: Annotated[str | None, typer.Option(help="torch, native or auto.")] = None,
    quick: Annotated[bool, typer.Option(help="A few points in seconds; too rough to plan with.")] = False,
    patience: Annotated[
        float,
        typer.Option(min=0.0, help="Seconds for measuring again what others slowed down; 0: as it comes."),
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure this machine: products, attention, memory, overheads. Kept as `--chip local`."""
    from tongyun.cloud.engine.calibrate.measure import setting

    chosen = setting(device=device, threads=threads, kernels=kernels, quick=quick)
    spec, path = calibrated(chosen, force=force, quiet=as_json, patience_s=patience)
    if as_json:
        typer.echo(json.dumps(_figures(spec, path)))
    else:
        _show(spec, path)


def calibrated(
    chosen: Setting, *, force: bool = False, quiet: bool = False, patience_s: float = 0.0
) -> tuple[ChipSpec, Path]:
    """The kept calibration where it still holds for this setting, else a new one, kept."""
    from tongyun.cloud.engine.calibrate.spec import local_path, stale
    from tongyun.specs import save

    reasons = ["asked for"] if force else stale(chosen.machine())
    path = local_path()
    if not reasons:
        from tongyun.specs import find_chip

        return find_chip("local"), path
    if not quiet:
        typer.echo(f"calibrating: {'; '.join(reasons)}", err=True)
    spec = _measure(chosen, quiet, 0.0 if chosen.quick else patience_s)
    save(spec, path)
    return spec, path


def _measure(chosen: Setting, quiet: bool, patience_s: float) -> ChipSpec:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from tongyun.cloud.engine.calibrate.machine import Elsewhere
    from tongyun.cloud.engine.calibrate.measure import measure

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # A bar that redraws from a thread of its own would disturb what is measured.
    with Progress(*columns, console=Console(stderr=True), disable=quiet, auto_refresh=False) as progress:
        task = progress.add_task("calibrate", total=1.0)

        def tell(what: str, done: float) -> None:
            progress.update(task, description=f"calibrate: {what}", completed=done)
            progress.refresh()

        with Elsewhere() as others:
            spec = measure(chosen, tell, patience_s=patience_s)
    if others.cores > DISTURBED_CORES:
        typer.echo(
            f"warning: other processes kept {others.cores:.1f} cores busy meanwhile; predictions on this "
            "calibration will be too slow. Repeat with --force when the machine is quiet",
            err=True,
        )
    return spec


def _figures(spec: ChipSpec, path: Path) -> dict[str, object]:
    calibration = spec.calibration
    return {
        "file": str(path),
        "when": calibration.when if calibration else None,
        "machine": dict(calibration.machine) if calibration else {},
        "figures": {
            key: {"value": figure.value, "source": figure.source.value, "reference": figure.reference}
            for key, figure in spec.figures()
        },
    }


def _show(spec: ChipSpec, path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value (SI)", "source", title=spec.title, title_justify="left")
    for key, figure in spec.figures():
        table.add_row(key, f"{figure.value:.4g}", figure.source.value)
    console = Console()
    console.print(table)
    console.print(f"kept in {path}", highlight=False, soft_wrap=True)
