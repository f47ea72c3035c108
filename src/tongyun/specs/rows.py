"""How measured rows are read from TOML and laid out again: columns by name, then numbers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tongyun.errors import unknown
from tongyun.specs.form import DTYPES, Text, Where, Whole, number, shown, table, text
from tongyun.units import DType


@dataclass(frozen=True)
class Samples:
    """Measured rows: `columns` (exactly the sample's fields, in order) and `rows` of plain SI values."""

    schema: type[Any]

    def read(self, raw: object, where: Where) -> tuple[Any, ...]:
        fields = table(raw, where)
        columns = [f.name for f in dataclasses.fields(self.schema)]
        for key in fields:
            if key not in ("columns", "rows"):
                raise (where / key).wrong(unknown("key", key, ("columns", "rows")))
        if fields.get("columns") != columns:
            raise (where / "columns").wrong(f"expected {columns}, got {shown(fields.get('columns'))}")
        rows = fields.get("rows")
        if not isinstance(rows, list):
            raise (where / "rows").wrong(f"expected a list of rows, got {shown(rows)}")
        return tuple(self._row(row, where / "rows" / i) for i, row in enumerate(rows))

    def _row(self, row: object, where: Where) -> Any:
        fields = dataclasses.fields(self.schema)
        if not isinstance(row, list) or len(row) != len(fields):
            raise where.wrong(f"expected {len(fields)} values, got {shown(row)}")
        cells = zip(fields, row, strict=True)
        return self.schema(**{f.name: _cell(str(f.type), cell, where / f.name) for f, cell in cells})

    def plain(self, value: tuple[Any, ...]) -> dict[str, Any]:
        columns = [f.name for f in dataclasses.fields(self.schema)]
        return {"columns": columns, "rows": [[getattr(v, c) for c in columns] for v in value]}


def _cell(kind: str, raw: object, where: Where) -> object:
    if kind == "str":
        return text(raw, where)
    if kind == "DType":
        return DType(Text(DTYPES).read(raw, where))
    if kind == "int":
        return Whole().read(raw, where)
    if kind == "Cached":
        return 0 if raw == 0 and type(raw) is int else Whole().read(raw, where)
    value = number(raw, where)
    if value == 0:
        raise where.wrong("expected a number above 0")
    return value
