# ruff: noqa: RUF009 - `has` returns dataclasses.field, which is not evaluated per instance
"""What a fleet file may say of replicas that come and go: `[failures]` and `[autoscale]`.

Names of replicas, nodes, pools and storage are checked by who knows the fleet.
"""

from __future__ import annotations

from dataclasses import dataclass

from tongyun.specs.figure import TIME, Figure
from tongyun.specs.form import Fact, Number, Sections, Text, Whole, has
from tongyun.units import Source

ENGINE_START = Figure.of(
    20.0,
    Source.ASSUMED,
    "assumed: process, kernels and graphs once the weights are there; from a warmed image (Alibaba PAI tells "
    "5.7 s of a whole scale-out of Qwen3-8B, jishuzhan.net/article/1936002333716033538) to a compilation",
    low=5.0,
    high=60.0,
)
"""Seconds from the last byte of weights to the first request."""


@dataclass(frozen=True, kw_only=True)
class OutageSpec:
    """One failure at a moment, of a replica or of a node with all that stands on it."""

    at_s: float = has(Number())
    instance: str | None = has(Text(), default=None)
    """A replica by its pool's role and its number there: `mixed-0`, `decode-3`."""
    node: int | None = has(Whole(least=0), default=None)
    for_s: float | None = has(Number(least=1e-3), default=None)
    """Until it is back; left out, it never is."""

    def problem(self) -> str | None:
        if (self.instance is None) == (self.node is None):
            return "exactly one of instance and node says what fails"
        return None


@dataclass(frozen=True, kw_only=True)
class FailureSpec:
    """Chips and nodes that fail by chance, by script or both, and what becomes of their requests."""

    chip_mtbf_hours: float | None = has(Number(least=1e-3), default=None)
    """Mean time between failures of one chip."""
    chip_repair_hours: float | None = has(Number(least=1e-3), default=None)
    """Mean time until it serves again, weights loaded; with a scaler, until it can be started."""
    node_mtbf_hours: float | None = has(Number(least=1e-3), default=None)
    node_repair_hours: float | None = has(Number(least=1e-3), default=None)
    on_failure: str = has(Text(("retry", "lose")), default="retry")
    retries: int = has(Whole(), default=3)
    """Times that one request is sent again."""
    seed: int = has(Whole(least=0), default=0)
    event: tuple[OutageSpec, ...] = has(Sections(OutageSpec), default=())

    def problem(self) -> str | None:
        for part in ("chip", "node"):
            mtbf, repair = getattr(self, f"{part}_mtbf_hours"), getattr(self, f"{part}_repair_hours")
            if (mtbf is None) != (repair is None):
                return f"{part}_mtbf_hours and {part}_repair_hours come together"
            if mtbf is not None and mtbf < repair:
                return f"{part}_mtbf_hours {mtbf:g} is below {part}_repair_hours {repair:g}: mostly broken"
        if self.chip_mtbf_hours is None and self.node_mtbf_hours is None and not self.event:
            return "nothing fails; accepted: chip_mtbf_hours, node_mtbf_hours, [[failures.event]]"
        return None


@dataclass(frozen=True, kw_only=True)
class AutoscaleSpec:
    """How many of a pool's replicas run; those that the pool names are all there can be."""

    pool: str | None = has(Text(), default=None)
    """The pool's role; left out, every pool has this rule for itself."""
    by: str = has(Text(("requests", "tokens", "wait")), default="requests")
    """Requests in flight or prompt tokens due a replica, or seconds without a first token."""
    target: float = has(Number(least=1e-3))
    min: int = has(Whole(least=0), default=1)
    max: int | None = has(Whole(), default=None)
    start: int | None = has(Whole(least=0), default=None)
    """Replicas up at the beginning; default `min`."""
    step: int | None = has(Whole(), default=None)
    interval_s: float = has(Number(least=1e-3), default=15.0)
    cooldown_up_s: float = has(Number(), default=0.0)
    cooldown_down_s: float = has(Number(), default=300.0)
    weights: str = has(Text(("storage", "neighbour", "host")))
    """Where a replica that starts has its weights from."""
    storage: str | None = has(Text(), default=None)
    """The storage spec that they are read from."""
    engine_start: Figure = has(Fact(TIME, more_is_better=False), default=ENGINE_START)

    def problem(self) -> str | None:
        if (self.weights == "storage") != (self.storage is not None):
            return 'weights = "storage" and storage (a storage spec\'s name) come together'
        if self.max is not None and self.max < self.min:
            return f"max {self.max} is below min {self.min}"
        return None
