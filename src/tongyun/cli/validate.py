"""`tongyun validate`: every prediction beside what was published or measured.

Prints the two tables, or writes them as the page docs/validation.md. Measured rows come
from the records of `tongyun up` and of the fidelity benchmark on this machine; nothing is
left out, and where a figure was measured twice the latest counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tongyun.codesign.validate import Comparison
    from tongyun.store import Header

PUBLISHED = ("model", "chip", "type", "cut", "in/out", "phase", "published", "predicted", "range", "ratio")
MEASURED = ("model", "load", "figure", "predicted", "measured", "error")


def validate(
    write: Annotated[Path | None, typer.Option(help="Write the page to this file instead.")] = None,
) -> None:
    """Lay predictions beside published and measured figures, every row."""
    from tongyun.codesign.validate import published_rows

    published, measured = published_rows(), latest()
    if write is None:
        _print(published, measured)
        return
    temporary = write.with_name(f".{write.name}.new")
    temporary.write_text("\n".join(page(published, measured)) + "\n", encoding="utf-8")
    temporary.replace(write)
    typer.echo(f"{write}: {len(published)} published and {len(measured)} measured rows")


Measured = tuple[str, ...]


def latest() -> dict[tuple[str, str, str], tuple[Measured, Header]]:
    """The last measurement of each (model, load, figure) in this machine's records, with its run."""
    from tongyun.codesign.fidelity import COMPARED
    from tongyun.report import quantity
    from tongyun.store import home, runs

    found: dict[tuple[str, str, str], tuple[Measured, Header]] = {}
    for run in runs(home() / "runs"):
        for row in run.rows(COMPARED):
            body = row.body
            key = (str(body["model"]), str(body["load"]), str(body["name"]))
            predicted, measured, unit = body["predicted"], body["measured"], body["unit"]
            error = f"{(predicted - measured) / measured:+.1%}" if measured else "–"
            cells = (*key, quantity(predicted, unit), quantity(measured, unit), error)
            found[key] = cells, run.header
    return found


def _published_cells(found: Comparison) -> tuple[str, ...]:
    from tongyun.report import number

    row = found.row
    return (
        row.model,
        row.chip,
        row.dtype,
        f"tp{row.shard.tp} ep{row.shard.ep} dp{row.shard.dp}",
        f"{row.isl}/{row.osl}",
        row.phase if row.batch is None else f"{row.phase}, batch {row.batch}",
        number(row.tok_s_per_chip),
        number(found.predicted),
        f"{number(found.low)} – {number(found.high)}",
        f"{found.ratio:.2f}",
    )


def _print(
    published: Sequence[Comparison], measured: dict[tuple[str, str, str], tuple[Measured, Header]]
) -> None:
    from tongyun.report import column, show, table

    show(
        table(
            "tokens/s per chip, published beside predicted (analytic; fitted to none of these rows)",
            [column(name, left=index < 6) for index, name in enumerate(PUBLISHED)],
            [_published_cells(found) for found in published],
        ),
        table(
            "this machine, predicted (simulated) beside measured",
            [column(name, left=index < 3) for index, name in enumerate(MEASURED)],
            [cells for cells, _ in measured.values()],
        ),
    )


def page(
    published: Sequence[Comparison], measured: dict[tuple[str, str, str], tuple[Measured, Header]]
) -> Iterator[str]:
    """The lines of docs/validation.md."""
    yield "# Predicted beside measured and published"
    yield ""
    yield "Written by `tongyun validate --write docs/validation.md`; every row there is, good or bad."
    yield ""
    yield "## This machine"
    yield ""
    yield (
        "`tongyun up` and `benchmarks/fidelity.py` predict a load by running the production scheduler on a "
        "virtual clock, priced on the calibrated machine, and then send the same arrivals over HTTP. "
        "Predicted is *simulated*, measured is *measured*; error is (predicted − measured) / measured. "
        "Nothing of the served model takes part in the calibration."
    )
    yield ""
    for header in {header.id: header for _, header in measured.values()}.values():
        versions = ", ".join(f"{name} {version}" for name, version in header.versions.items())
        gigabytes = int(header.machine["memory_bytes"]) / 1e9
        yield (
            f"- run {header.id}: {header.machine['processor']}, {header.machine['cores']} cores, "
            f"{gigabytes:.0f} GB; {versions}"
        )
    yield ""
    yield from _markdown(MEASURED, [cells for cells, _ in measured.values()])
    yield ""
    yield "## Published"
    yield ""
    yield (
        "Tokens per second per chip: output tokens for `serving` and `decode`, prompt tokens for `prefill`. "
        "Predicted is *analytic* on the chip's spec (*vendor*, *derived* and *assumed* figures; the range is "
        "its slow and fast corner). No figure of the price model was chosen by looking at these rows; a "
        "ratio is predicted over published."
    )
    yield ""
    yield from _markdown(PUBLISHED, [_published_cells(found) for found in published])
    yield ""
    for source in dict.fromkeys(found.row.source for found in published):
        chips = sorted({found.row.chip for found in published if found.row.source == source})
        yield f"- {', '.join(chips)}: {source}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
