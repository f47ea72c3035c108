"""What a spec says, listed: its figures, and its words and whole numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from tongyun.specs.figure import Dimension, Figure
from tongyun.specs.form import ByDType, Fact, Scalars, Section, Text, Texts, Whole


def facts(value: Any, key: str = "") -> Iterator[tuple[str, Figure, Dimension]]:
    """Every figure under a spec with its dotted key and dimension, in the order of the schema."""
    for f in dataclasses.fields(value):
        item, form = getattr(value, f.name), f.metadata["form"]
        name = f"{key}.{f.name}" if key else f.name
        if item is None:
            continue
        if isinstance(form, Fact):
            yield name, item, form.dimension
        elif isinstance(form, ByDType):
            for dtype, figure in item.items():
                yield f"{name}.{dtype}", figure, form.fact.dimension
        elif isinstance(form, Section):
            yield from facts(item, name)


def texts(value: Any) -> dict[str, Any]:
    """What a spec says in words and whole numbers, by dotted key; figures and samples are left out."""
    said: dict[str, Any] = {}
    for f in dataclasses.fields(value):
        item, form = getattr(value, f.name), f.metadata["form"]
        if item is None:
            continue
        if isinstance(form, Text | Texts | Whole | Scalars):
            said[f.name] = form.plain(item)
        elif isinstance(form, Section):
            said.update({f"{f.name}.{key}": inner for key, inner in texts(item).items()})
    return said
