"""How each kind of field is read from TOML, checked, and laid out for writing again.

A schema dataclass gives every field a form; reading walks the dataclass, so a key
that no field names is refused. Knows TOML values and errors, no particular spec.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

from tongyun.errors import SpecError, unknown
from tongyun.specs.figure import KINDS, Dimension, Figure, written
from tongyun.units import DType, Source

T = TypeVar("T")
Scalar = str | int | float | bool

DTYPES = tuple(dtype.value for dtype in DType)


@dataclass(frozen=True)
class Where:
    """A place in a spec file, for errors."""

    file: object
    key: str = ""

    def __truediv__(self, child: object) -> Where:
        return Where(self.file, f"{self.key}.{child}" if self.key else str(child))

    def wrong(self, problem: str) -> SpecError:
        return SpecError(self.file, self.key, problem)


class Form(Protocol):
    """Reads one field's TOML value, and lays it out as plain TOML values again."""

    def read(self, raw: object, where: Where) -> Any: ...

    def plain(self, value: Any) -> Any: ...


def shown(raw: object) -> str:
    """A value as an error shows it: short, whatever was given."""
    try:
        text = repr(raw)
    except ValueError:  # an integer longer than Python prints
        text = f"a {type(raw).__name__} too long to show"
    return text if len(text) <= 60 else text[:57] + "…"


def table(raw: object, where: Where) -> Mapping[str, object]:
    if not isinstance(raw, dict):
        raise where.wrong(f"expected a table, got {shown(raw)}")
    return raw


def number(raw: object, where: Where) -> float:
    """A finite number ≥ 0; true and false are not numbers here."""
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise where.wrong(f"expected a number, got {shown(raw)}")
    try:
        value = float(raw)
    except OverflowError:
        raise where.wrong("too large") from None
    if not math.isfinite(value) or value < 0:
        raise where.wrong(f"expected a finite number ≥ 0, got {shown(raw)}")
    return value


def text(raw: object, where: Where) -> str:
    if not isinstance(raw, str) or not raw.strip():
        raise where.wrong(f"expected a text that is not empty, got {shown(raw)}")
    return raw


@dataclass(frozen=True)
class Text:
    """A text, one of `choices` if there are any."""

    choices: tuple[str, ...] = ()

    def read(self, raw: object, where: Where) -> str:
        value = text(raw, where)
        if self.choices and value not in self.choices:
            raise where.wrong(unknown("value", value, self.choices))
        return value

    def plain(self, value: str) -> str:
        return value


@dataclass(frozen=True)
class Texts:
    """A list of texts, none twice."""

    def read(self, raw: object, where: Where) -> tuple[str, ...]:
        if not isinstance(raw, list):
            raise where.wrong(f"expected a list of texts, got {shown(raw)}")
        names = tuple(text(item, where / i) for i, item in enumerate(raw))
        if len(set(names)) < len(names):
            raise where.wrong("the same text twice")
        return names

    def plain(self, value: tuple[str, ...]) -> list[str]:
        return list(value)


@dataclass(frozen=True)
class Whole:
    """A whole number ≥ `least` that needs no source: a count fixed by the file itself."""

    least: int = 1

    def read(self, raw: object, where: Where) -> int:
        if isinstance(raw, bool) or not isinstance(raw, int) or not self.least <= raw <= 2**53:
            raise where.wrong(f"expected a whole number ≥ {self.least}, got {shown(raw)}")
        return raw

    def plain(self, value: int) -> int:
        return value


@dataclass(frozen=True)
class Number:
    """A plain number within bounds that needs no source: a choice."""

    least: float = 0.0
    most: float = math.inf
    whole: bool = False

    def read(self, raw: object, where: Where) -> float:
        whole = isinstance(raw, int) and not isinstance(raw, bool)
        if not (whole or (isinstance(raw, float) and not self.whole)) or not self._within(raw):
            upper = "" if self.most == math.inf else f" to {self.most:g}"
            what = "a whole number" if self.whole else "a number"
            raise where.wrong(f"expected {what} from {self.least:g}{upper}, got {shown(raw)}")
        return cast(float, raw) if self.whole else float(cast(float, raw))

    def _within(self, raw: Any) -> bool:
        return bool(self.least <= raw <= self.most and raw < math.inf)

    def plain(self, value: float) -> float:
        return value


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def read(self, raw: object, where: Where) -> bool:
        if not isinstance(raw, bool):
            raise where.wrong(f"expected true or false, got {shown(raw)}")
        return raw

    def plain(self, value: bool) -> bool:
        return value


@dataclass(frozen=True)
class Fact:
    """A figure of one dimension; `better` says which way its range favours us."""

    dimension: Dimension
    more_is_better: bool = True

    def read(self, raw: object, where: Where) -> Figure:
        fields = table(raw, where)
        unit = self._unit(fields, where)
        value, low, high = (
            self.dimension.si(number(fields[key], where / key), unit) if key in fields else None
            for key in (unit, "low", "high")
        )
        assert value is not None
        figure = Figure.of(
            value, self._kind(fields, where), self._reference(fields, where), low=low, high=high
        )
        self._check(figure, where)
        return figure

    def _unit(self, fields: Mapping[str, object], where: Where) -> str:
        units = self.dimension.units
        strange = [key for key in fields if key not in units and key not in ("low", "high", "kind", "source")]
        if strange:
            raise (where / strange[0]).wrong(
                unknown("key", strange[0], [*units, "low", "high", "kind", "source"])
                + f" (this figure is {self.dimension.name})"
            )
        given = [key for key in fields if key in units]
        if len(given) != 1:
            what = f"{len(given)} units given ({', '.join(given)})" if given else "no unit"
            raise where.wrong(f"{what}; give the number as exactly one of: {', '.join(sorted(units))}")
        return given[0]

    def _kind(self, fields: Mapping[str, object], where: Where) -> Source:
        names = tuple(KINDS)
        if "kind" not in fields:
            raise where.wrong(f"no kind; a figure says where it comes from: {', '.join(names)}")
        return Source(Text(names).read(fields["kind"], where / "kind"))

    def _reference(self, fields: Mapping[str, object], where: Where) -> str:
        if "source" not in fields:
            raise where.wrong("no source; name the document, the measurement or the assumption")
        return text(fields["source"], where / "source")

    def _check(self, figure: Figure, where: Where) -> None:
        if not figure.low <= figure.value <= figure.high:
            raise where.wrong(
                f"expected low ≤ value ≤ high, got {figure.low:g}, {figure.value:g}, {figure.high:g}"
            )
        if not math.isfinite(figure.high):
            raise where.wrong("too large")
        most = self.dimension.most
        if most is not None and figure.high > most:
            raise where.wrong(f"{figure.high:g} is above {most:g}")
        if self.dimension.whole and any(
            not bound.is_integer() for bound in (figure.value, figure.low, figure.high)
        ):
            raise where.wrong(f"expected a whole number, got {figure.value:g}")

    def plain(self, value: Figure) -> dict[str, Scalar]:
        return {**written(value, self.dimension)[1], "kind": value.source.value, "source": value.reference}


@dataclass(frozen=True)
class ByDType:
    """A table of figures by data type."""

    fact: Fact

    def read(self, raw: object, where: Where) -> dict[DType, Figure]:
        fields = table(raw, where)
        for key in fields:
            if key not in DTYPES:
                raise (where / key).wrong(unknown("data type", key, DTYPES))
        if not fields:
            raise where.wrong("expected at least one data type")
        return {DType(key): self.fact.read(value, where / key) for key, value in fields.items()}

    def plain(self, value: Mapping[DType, Figure]) -> dict[str, Any]:
        return {key.value: self.fact.plain(figure) for key, figure in value.items()}


@dataclass(frozen=True)
class Section:
    """A nested table, read into its own dataclass."""

    schema: type[Any]

    def read(self, raw: object, where: Where) -> Any:
        return read_fields(self.schema, table(raw, where), where)

    def plain(self, value: Any) -> dict[str, Any]:
        return plain_fields(value)


@dataclass(frozen=True)
class Sections:
    """A list of tables, one at least, each read into the same dataclass."""

    schema: type[Any]

    def read(self, raw: object, where: Where) -> tuple[Any, ...]:
        if not isinstance(raw, list) or not raw:
            raise where.wrong(f"expected one table or more, each under [[{where.key}]], got {shown(raw)}")
        return tuple(Section(self.schema).read(item, where / i) for i, item in enumerate(raw))

    def plain(self, value: tuple[Any, ...]) -> list[dict[str, Any]]:
        return [plain_fields(item) for item in value]


@dataclass(frozen=True)
class OneOrMore(Sections):
    """As `Sections`; a single one may be written as a plain table."""

    def read(self, raw: object, where: Where) -> tuple[Any, ...]:
        if isinstance(raw, dict):
            return (Section(self.schema).read(raw, where),)
        return super().read(raw, where)


@dataclass(frozen=True)
class Scalars:
    """A free table of texts and numbers: the description of a machine."""

    def read(self, raw: object, where: Where) -> dict[str, Scalar]:
        return {key: _scalar(value, where / key) for key, value in table(raw, where).items()}

    def plain(self, value: Mapping[str, Scalar]) -> dict[str, Scalar]:
        return dict(value)


def _scalar(raw: object, where: Where) -> Scalar:
    if isinstance(raw, str | bool):
        return raw
    if isinstance(raw, float) and math.isfinite(raw):
        return raw
    if isinstance(raw, int) and abs(raw) < 2**63:
        return raw
    raise where.wrong(f"expected a text or a number, got {shown(raw)}")


def has(form: Form, *, key: str | None = None, **more: Any) -> Any:
    """A schema field of this form; give `default` to make it optional, `key` where a file calls it
    what Python cannot."""
    return dataclasses.field(metadata={"form": form} if key is None else {"form": form, "key": key}, **more)


def _key(field: dataclasses.Field[Any]) -> str:
    """What a file calls it."""
    return str(field.metadata.get("key", field.name))


def read_fields(schema: type[T], raw: Mapping[str, object], where: Where) -> T:
    """Fill a schema dataclass; refuses unknown keys and missing fields without a default.

    A schema whose fields depend on each other has a `problem()` that says what is wrong.
    """
    fields = dataclasses.fields(cast(Any, schema))
    accepted = [_key(f) for f in fields]
    for key in raw:
        if key not in accepted:
            raise (where / key).wrong(unknown("key", key, accepted))
    values = {}
    for f in fields:
        key = _key(f)
        if key in raw:
            values[f.name] = f.metadata["form"].read(raw[key], where / key)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise (where / key).wrong("missing")
    filled = schema(**values)
    problem = getattr(filled, "problem", None)
    if problem is not None and (found := problem()) is not None:
        raise where.wrong(found)
    return filled


def plain_fields(value: Any) -> dict[str, Any]:
    """The TOML values of a schema dataclass; fields at their default are left out."""
    plain = {}
    for f in dataclasses.fields(value):
        field_value = getattr(value, f.name)
        if field_value is None or (f.default is not dataclasses.MISSING and field_value == f.default):
            continue
        plain[_key(f)] = f.metadata["form"].plain(field_value)
    return plain
