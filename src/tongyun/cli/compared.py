"""How `tongyun plan --compare` looks: one row a chip, the best plan of each or the limit that binds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from tongyun.codesign.plan import Answer, Figures, Offer

COLUMNS = (
    ("TTFT ms", "ttft_s", 1e3),
    ("TPOT ms", "tpot_s", 1e3),
    ("tok/s/chip", "tok_s_per_chip", 1.0),
    ("$/Mtok", "usd_per_mtoken", 1.0),
    ("J/tok", "joules_per_token", 1.0),
)


def named(text: str, chips: int) -> list[tuple[str, int]]:
    """`h200,h20:16` as names and counts; a name without a count gets `chips`."""
    from tongyun.errors import InputError

    found = []
    for part in text.split(","):
        name, colon, count = part.strip().rpartition(":")
        if not (colon and count.isdigit()):
            name, count = part.strip(), str(chips)
        if not name:
            raise InputError(f"--compare takes names like h200,h20:16 (chip, or chip:count), got '{text}'")
        found.append((name, int(count)))
    return found


def compare_table(answers: list[Answer]) -> Table:
    """Best plans side by side under the same limits, with ranges from the slow to the fast corner."""
    from tongyun.report import column, source_tag, table

    rows = []
    for answer in answers:
        label = f"{answer.question.chips} × {answer.question.chip.name}"
        if answer.best is None:
            rows.append([label, f"[red]no:[/] {answer.limit}", *[""] * len(COLUMNS), ""])
            continue
        best, plan = answer.best, answer.best.plan
        idle = f", {plan.idle_chips} idle" if plan.idle_chips else ""
        text = f"{plan} batch {plan.batch}{idle}"
        cells = [_cell(best, key, factor) for _, key, factor in COLUMNS]
        rows.append([label, text, *cells, source_tag(best.sources)])
    columns = [
        column("compare", left=True),
        column("best plan, or the limit that binds", left=True, wrap=True),
        *(column(head) for head, _, _ in COLUMNS),
        column("source", left=True, wrap=True),
    ]
    return table("", columns, rows, caption="(slow–fast corner of the spec)")


def _cell(best: Offer, key: str, factor: float) -> str:
    from tongyun.report import number

    corners: list[Figures] = [c for c in (best.figures, best.slow, best.fast) if c is not None]
    values = [getattr(corner, key) for corner in corners]
    if None in values:
        return number(None)
    low, high = min(values), max(values)
    span = f" ({number(low * factor)}–{number(high * factor)})" if low < high else ""
    return f"{number(values[0] * factor)}{span}"
