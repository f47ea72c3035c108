"""Turn what was measured into a chip spec, keep it, and tell when it no longer holds.

The spec of this machine is the file `chips/local.toml` in the user's folder; `--chip
local` means it. Figures that cannot be measured here (power) are assumed and say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tongyun import __version__
from tongyun.cloud.engine.calibrate.machine import differences
from tongyun.errors import InputError
from tongyun.specs import Calibration, ChipSpec, Figure, load
from tongyun.specs.find import LOCAL
from tongyun.specs.samples import (
    AttentionSample,
    GroupedMatmulSample,
    MatmulSample,
    MemorySample,
    OverheadSample,
    PassSample,
    ServedSample,
)
from tongyun.specs.schema import MatmulSpec, MemorySpec, OverheadSpec, PowerSpec
from tongyun.store import home
from tongyun.units import DType, Source

Scalar = str | int | float | bool
MEASURED_BY = "tongyun calibrate"


@dataclass(frozen=True, kw_only=True)
class Readings:
    """Everything one calibration measured on one machine."""

    machine: Mapping[str, Scalar]
    matmul: tuple[MatmulSample, ...]
    grouped_matmul: tuple[GroupedMatmulSample, ...]
    memory: tuple[MemorySample, ...]
    attention: tuple[AttentionSample, ...]
    passes: tuple[PassSample, ...] = ()
    overhead: tuple[OverheadSample, ...] = ()
    served: tuple[ServedSample, ...] = ()

    @property
    def peak(self) -> dict[DType, float]:
        """The best rate any product reached, by the type of its weights."""
        rates: dict[DType, float] = {}
        for s in self.matmul:
            rates[s.dtype] = max(rates.get(s.dtype, 0.0), 2.0 * s.m * s.n * s.k / s.seconds)
        return rates

    def each(self, what: str) -> float:
        """Seconds that one `what` adds to a step; 0 where none was found."""
        return sum(s.seconds / s.count for s in self.overhead if s.what == what)


def chip_spec(readings: Readings) -> ChipSpec:
    """The spec of this machine: peaks are the best of products, bandwidth that of the largest footprint."""
    machine = readings.machine
    gpu = machine["device"] != "cpu"
    return ChipSpec(
        name=LOCAL,
        title=f"this machine: {machine['processor']}, {machine['engine_threads']} engine threads",
        vendor=str(machine["vendor"]),
        kind="accelerator" if gpu else "cpu",
        status="local",
        chips_per_node=_measured(1.0, "one machine"),
        matmul=MatmulSpec(
            peak={
                dtype: _measured(rate, "best of the matmul samples") for dtype, rate in readings.peak.items()
            },
            achieved={dtype: _measured(1.0, "the peak is what was reached") for dtype in readings.peak},
            attention=_measured(1.0, "the attention samples stand for it"),
        ),
        memory=MemorySpec(
            capacity=_measured(float(machine["memory_bytes"]), "reported by the system"),
            bandwidth=_measured(_largest(readings.memory), "memory sample of the largest footprint"),
            achieved=_measured(1.0, "the bandwidth is what was reached"),
        ),
        overhead=OverheadSpec(
            kernel_launch=_measured(
                readings.each("operator"), "rest of synthetic models' steps, an operator"
            ),
            step_host=_measured(readings.each("step"), "rest of synthetic models' steps, a step"),
        ),
        power=_power(int(machine["cores"]), gpu),
        calibration=Calibration(
            when=datetime.now(UTC).isoformat(timespec="seconds"),
            tool=f"{MEASURED_BY} {__version__}",
            machine=dict(machine),
            matmul=readings.matmul,
            grouped_matmul=readings.grouped_matmul,
            memory=readings.memory,
            attention=readings.attention,
            passes=readings.passes,
            overhead=readings.overhead,
            served=readings.served,
        ),
    )


def _largest(memory: tuple[MemorySample, ...]) -> float:
    return max((s for s in memory if s.rows == 1), key=lambda s: s.footprint_bytes).bytes_per_s


def _measured(value: float, what: str) -> Figure:
    return Figure.of(value, Source.MEASURED, f"{MEASURED_BY}: {what}")


def _power(cores: int, gpu: bool) -> PowerSpec:
    """Nobody measured it: a span that covers servers and desktops, or data-centre GPUs."""
    low, usual, high = (350.0, 700.0, 1000.0) if gpu else (5.0 * cores, 10.0 * cores, 20.0 * cores)
    why = "not measured; usual board power" if gpu else "not measured; 5 to 20 W a core, memory included"
    return PowerSpec(
        tdp=Figure.of(usual, Source.ASSUMED, why, low=low, high=high),
        idle=Figure.of(0.2 * usual, Source.ASSUMED, why, low=0.2 * low, high=0.2 * high),
    )


def local_path() -> Path:
    """Where the calibration of this machine is kept."""
    return home() / "chips" / f"{LOCAL}.toml"


def kept() -> ChipSpec | None:
    """The kept calibration, or None where there is none."""
    path = local_path()
    return load(path, ChipSpec) if path.exists() else None


def stale(machine: Mapping[str, Scalar]) -> list[str]:
    """Why the kept calibration does not hold for `machine`; empty when it does."""
    try:
        spec = kept()
    except InputError as error:
        return [f"the one kept cannot be read: {error}"]
    if spec is None or spec.calibration is None:
        return ["this machine was not measured before"]
    return differences(spec.calibration.machine, machine)
