"""Lay a prediction beside a measurement of the same load.

Both are `LatencyReport`s, summed up by the same arithmetic over the same arrivals. Knows
neither the engine nor how either was obtained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from tongyun.cloud.latency import LatencyReport, Percentiles
from tongyun.store import Writer, home

COMPARED = "compared"
"""Kind of the rows in a run record that hold one figure both ways."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One figure both ways, in SI."""

    name: str
    unit: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """(predicted − measured) / measured."""
        return (self.predicted - self.measured) / self.measured


def compare(predicted: LatencyReport, measured: LatencyReport) -> tuple[Compared, ...]:
    """The figures a user of an endpoint feels; those that either run does not have are left out."""
    return tuple(_rows(predicted, measured))


def keep(model: str, load: str, figures: Sequence[Compared]) -> None:
    """Add what was compared under a load to this machine's run records, for `tongyun validate`."""
    with Writer.create(home() / "runs") as record:
        record.append_all(COMPARED, ({"model": model, "load": load, **asdict(each)} for each in figures))


def _rows(predicted: LatencyReport, measured: LatencyReport) -> Iterator[Compared]:
    pairs = (
        ("TTFT", predicted.ttft_s, measured.ttft_s),
        ("TPOT", predicted.tpot_s, measured.tpot_s),
        ("end to end", predicted.latency_s, measured.latency_s),
    )
    for name, ours, theirs in pairs:
        if ours is not None and theirs is not None:
            yield from _percentiles(name, ours, theirs)
    yield Compared(
        name="throughput",
        unit="tokens/s",
        predicted=predicted.output_tokens_per_s,
        measured=measured.output_tokens_per_s,
    )
    yield Compared(
        name="requests",
        unit="requests/s",
        predicted=predicted.requests_per_s,
        measured=measured.requests_per_s,
    )


def _percentiles(name: str, ours: Percentiles, theirs: Percentiles) -> Iterator[Compared]:
    for label in ("p50", "p99"):
        yield Compared(
            name=f"{name} {label}", unit="s", predicted=getattr(ours, label), measured=getattr(theirs, label)
        )
