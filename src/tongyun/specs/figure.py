"""A figure: a number in SI, its range, and where it comes from; and the units it may be written in.

In a file a figure is a table with exactly one unit key, so that a number without a
unit cannot be written: `{ tb_per_s = 2.4, low = 1.6, high = 2.8, kind = "assumed",
source = "…" }`. `low` and `high` are in the same unit. Knows no file and no spec.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

from tongyun.units import GB, GIB, KB, KIB, MB, MIB, MS, TB, US, Source

KINDS = (Source.VENDOR, Source.MEASURED, Source.DERIVED, Source.ASSUMED)
"""The sources a fact file may claim; simulated and analytic are what Tongyun itself computes."""


class Corner(StrEnum):
    """Which end of every range: against us, as given, in our favour."""

    SLOW = "slow"
    NOMINAL = "nominal"
    FAST = "fast"


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """What a figure measures, and the factor from each unit key to SI."""

    name: str
    si_unit: str
    units: Mapping[str, float]
    most: float | None = None
    """The largest value that makes sense, in SI; None where there is none."""
    whole: bool = False

    def si(self, number: float, unit: str) -> float:
        """`number` of `unit` in SI, as if the product had been typed: 5 µs is exactly 5e-6."""
        return float(Decimal(repr(number)) * Decimal(repr(self.units[unit])))

    def within(self, si: float, unit: str) -> float:
        """An SI number expressed in `unit`; the inverse of `si` but for the last digit."""
        return float(Decimal(repr(si)) / Decimal(repr(self.units[unit])))


BYTES = Dimension(
    name="bytes",
si_unit="B",
    units={
        "bytes": 1.0, "kb": KB, "mb": MB, "gb": GB, "tb": TB, "pb": 1e15,
        "kib": KIB, "mib": MIB, "gib": GIB, "tib": float(2**40), "pib": float(2**50),
    },
)  # fmt: skip
BANDWIDTH = Dimension(
    name="bytes per second",
si_unit="B/s",
    units={
        "bytes_per_s": 1.0, "mb_per_s": MB, "gb_per_s": GB, "tb_per_s": TB,
        "gib_per_s": GIB, "gbit_per_s": GB / 8, "tbit_per_s": TB / 8,
    },
)  # fmt: skip
BANDWIDTH_DENSITY = Dimension(
    name="bytes per second per byte stored",
    si_unit="B/s/B",
    units={"bytes_per_s_per_byte": 1.0, "mb_per_s_per_tib": MB / 2**40},
)
COMPUTE = Dimension(
    name="operations per second",
    si_unit="FLOP/s",
    units={"flops_per_s": 1.0, "gflops": 1e9, "tflops": 1e12, "pflops": 1e15, "tops": 1e12},
)
TIME = Dimension(name="seconds", si_unit="s", units={"s": 1.0, "ms": MS, "us": US, "ns": 1e-9, "h": 3600.0})
POWER = Dimension(name="watts", si_unit="W", units={"w": 1.0, "kw": 1e3})
FRACTION = Dimension(name="a fraction", si_unit="", units={"fraction": 1.0}, most=1.0)
RATIO = Dimension(name="a ratio", si_unit="", units={"ratio": 1.0})
COUNT = Dimension(name="a whole number", si_unit="", units={"count": 1.0}, whole=True)
TOKENS = Dimension(name="tokens", si_unit="tokens", units={"tokens": 1.0})
RATE = Dimension(name="events per second", si_unit="1/s", units={"per_s": 1.0, "iops": 1.0})
FREQUENCY = Dimension(name="hertz", si_unit="Hz", units={"hz": 1.0, "mhz": 1e6, "ghz": 1e9})
ENERGY = Dimension(name="joules", si_unit="J", units={"j": 1.0, "nj": 1e-9, "pj": 1e-12})
WORK_PER_CYCLE = Dimension(name="operations per cycle", si_unit="1/cycle", units={"per_cycle": 1.0})
BYTES_PER_CYCLE = Dimension(name="bytes per cycle", si_unit="B/cycle", units={"bytes_per_cycle": 1.0})
PRICE = Dimension(name="US dollars per hour", si_unit="$/h", units={"usd_per_hour": 1.0})
DIMENSIONS = (
    BYTES, BANDWIDTH, BANDWIDTH_DENSITY, COMPUTE, TIME, POWER, FRACTION, RATIO, COUNT, TOKENS, RATE, PRICE,
    FREQUENCY, ENERGY, WORK_PER_CYCLE, BYTES_PER_CYCLE,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number in SI with its range (`low ≤ value ≤ high`), source kind and source text."""

    value: float
    low: float
    high: float
    source: Source
    reference: str

    @classmethod
    def of(
        cls,
        value: float,
        source: Source,
        reference: str,
        *,
        low: float | None = None,
        high: float | None = None,
    ) -> Figure:
        """A figure in SI; a missing bound is the value itself."""
        return cls(
            value=value,
            low=value if low is None else low,
            high=value if high is None else high,
            source=source,
            reference=reference,
        )

    @property
    def has_range(self) -> bool:
        return self.low < self.high

    def at(self, corner: Corner, *, more_is_better: bool = True) -> float:
        """The value at a corner: `fast` takes the bound in our favour, `slow` the one against us."""
        if corner is Corner.NOMINAL:
            return self.value
        return self.high if (corner is Corner.FAST) == more_is_better else self.low


LABELS: Mapping[str, str] = {
    "bytes": "B", "kb": "kB", "mb": "MB", "gb": "GB", "tb": "TB", "pb": "PB",
    "kib": "KiB", "mib": "MiB", "gib": "GiB", "tib": "TiB", "pib": "PiB",
    "bytes_per_s": "B/s", "mb_per_s": "MB/s", "gb_per_s": "GB/s", "tb_per_s": "TB/s",
    "gib_per_s": "GiB/s", "gbit_per_s": "Gb/s", "tbit_per_s": "Tb/s",
    "bytes_per_s_per_byte": "B/s/B", "mb_per_s_per_tib": "MB/s/TiB",
    "flops_per_s": "FLOP/s", "gflops": "GFLOPS", "tflops": "TFLOPS", "pflops": "PFLOPS", "tops": "TOPS",
    "h": "h", "s": "s", "ms": "ms", "us": "µs", "ns": "ns", "w": "W", "kw": "kW",
    "fraction": "", "ratio": "", "count": "", "tokens": "tokens", "per_s": "/s", "iops": "/s",
    "usd_per_hour": "$/h", "hz": "Hz", "mhz": "MHz", "ghz": "GHz", "j": "J", "nj": "nJ", "pj": "pJ",
    "per_cycle": "/cycle", "bytes_per_cycle": "B/cycle",
}  # fmt: skip
"""How a unit key is written for people."""


def written(figure: Figure, dimension: Dimension) -> tuple[str, dict[str, float]]:
    """The unit in which a figure reads best and gives exactly itself back, and its numbers in it."""
    bounds = {"low": figure.low, "high": figure.high} if figure.has_range else {}
    values = {"": figure.value, **bounds}
    ranked = []
    for index, unit in enumerate(dimension.units):
        scaled = {key: _short(dimension.within(value, unit)) for key, value in values.items()}
        if all(dimension.si(scaled[key], unit) == value for key, value in values.items()):
            awkward = not 1 <= scaled[""] < 1000
            long = any(len(repr(number)) > 8 for number in scaled.values())
            ranked.append((awkward, long, index, unit, scaled))
    *_, unit, scaled = min(ranked, key=lambda candidate: candidate[:3])
    return unit, {unit: scaled.pop(""), **scaled}


def _short(value: float) -> float:
    return int(value) if value.is_integer() and abs(value) < 1e15 else value
