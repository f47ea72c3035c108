# ruff: noqa: RUF009 - `has` returns dataclasses.field, which is not evaluated per instance
"""What a spec file may say about chips, fabrics, storage and prices.

Every number is a `Figure` with its range and source. `ChipSpec.at(corner)` resolves
the ranges into a `Chip` of plain numbers, which is what prices are computed from.
Decides which keys exist and which way each range favours us; computes nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tongyun.specs.contents import facts
from tongyun.specs.figure import (
    BANDWIDTH,
    BANDWIDTH_DENSITY,
    BYTES,
    COMPUTE,
    COUNT,
    FRACTION,
    POWER,
    PRICE,
    RATE,
    RATIO,
    TIME,
    Corner,
    Figure,
)
from tongyun.specs.fleet import FleetSpec
from tongyun.specs.form import ByDType, Fact, Scalar, Scalars, Section, Text, Texts, has
from tongyun.specs.market import MarketSpec
from tongyun.specs.ppu import PpuSpec
from tongyun.specs.rows import Samples
from tongyun.specs.samples import (
    AttentionSample,
    CollectiveSample,
    EfficiencySample,
    GroupedMatmulSample,
    MatmulSample,
    MemorySample,
    OverheadSample,
    PassSample,
    ServedSample,
)
from tongyun.specs.workload import WorkloadSpec
from tongyun.units import DType, Source

TOPOLOGIES = ("switch", "full_mesh", "torus2d", "torus3d", "ports", "clos", "rail_clos")
"""`ports`: some point-to-point ports, wiring not published, fewer than the peers of a node."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What `tongyun calibrate` measured, when and on what; the figures of the spec rest on it."""

    when: str = has(Text())
    tool: str = has(Text())
    machine: Mapping[str, Scalar] = has(Scalars())
    matmul: tuple[MatmulSample, ...] = has(Samples(MatmulSample), default=())
    grouped_matmul: tuple[GroupedMatmulSample, ...] = has(Samples(GroupedMatmulSample), default=())
    memory: tuple[MemorySample, ...] = has(Samples(MemorySample), default=())
    attention: tuple[AttentionSample, ...] = has(Samples(AttentionSample), default=())
    passes: tuple[PassSample, ...] = has(Samples(PassSample), default=())
    overhead: tuple[OverheadSample, ...] = has(Samples(OverheadSample), default=())
    served: tuple[ServedSample, ...] = has(Samples(ServedSample), default=())


@dataclass(frozen=True, kw_only=True)
class MatmulSpec:
    """Dense peak rate by data type, and the fraction of it that large products reach."""

    peak: Mapping[DType, Figure] = has(ByDType(Fact(COMPUTE)))
    achieved: Mapping[DType, Figure] = has(ByDType(Fact(FRACTION)))
    attention: Figure = has(Fact(FRACTION))
    """Fraction of the bf16 peak that attention over a long prompt reaches."""

    def problem(self) -> str | None:
        odd = set(self.peak) ^ set(self.achieved)
        return f"peak and achieved need the same data types; only one has {min(odd)}" if odd else None


@dataclass(frozen=True, kw_only=True)
class MemorySpec:
    capacity: Figure = has(Fact(BYTES))
    bandwidth: Figure = has(Fact(BANDWIDTH))
    achieved: Figure = has(Fact(FRACTION))
    """Fraction of `bandwidth` that streaming reaches."""


@dataclass(frozen=True, kw_only=True)
class OverheadSpec:
    kernel_launch: Figure = has(Fact(TIME, more_is_better=False))
    """Paid by every operator, however small."""
    step_host: Figure = has(Fact(TIME, more_is_better=False))
    """Paid by every step of a serving engine: scheduling, sampling, copying."""


@dataclass(frozen=True, kw_only=True)
class LinkSpec:
    """A chip's way to its peers. Bandwidth is per chip and per direction."""

    topology: str = has(Text(TOPOLOGIES))
    bandwidth: Figure = has(Fact(BANDWIDTH))
    achieved: Figure = has(Fact(FRACTION))
    latency: Figure = has(Fact(TIME, more_is_better=False))
    """One ring step, or one message, too small for bandwidth to matter; software included."""
    domain: Figure = has(Fact(COUNT))
    """Chips that reach each other over this link."""
    ports: Figure | None = has(Fact(COUNT), default=None)
    fabric: str | None = has(Text(), default=None)
    """The fabric spec that says more."""


@dataclass(frozen=True, kw_only=True)
class PowerSpec:
    tdp: Figure = has(Fact(POWER, more_is_better=False))
    idle: Figure = has(Fact(POWER, more_is_better=False))

    def problem(self) -> str | None:
        return "idle is above tdp" if self.idle.value > self.tdp.value else None


@dataclass(frozen=True, kw_only=True)
class ChipSpec:
    """One chip, or one CPU machine, as its file says."""

    name: str = has(Text())
    title: str = has(Text())
    vendor: str = has(Text())
    kind: str = has(Text(("accelerator", "cpu")))
    status: str = has(Text(("released", "pre-release", "local")), default="released")
    aliases: tuple[str, ...] = has(Texts(), default=())
    note: str | None = has(Text(), default=None)
    inside: str | None = has(Text(), default=None)
    """The PPU spec that says what it is made of, where nobody measured its kernels."""
    chips_per_node: Figure = has(Fact(COUNT))
    matmul: MatmulSpec = has(Section(MatmulSpec))
    memory: MemorySpec = has(Section(MemorySpec))
    overhead: OverheadSpec = has(Section(OverheadSpec))
    scale_up: LinkSpec | None = has(Section(LinkSpec), default=None)
    scale_out: LinkSpec | None = has(Section(LinkSpec), default=None)
    host_link: Figure | None = has(Fact(BANDWIDTH), default=None)
    """Chip to host memory, per direction."""
    power: PowerSpec = has(Section(PowerSpec))
    calibration: Calibration | None = has(Section(Calibration), default=None)

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Every figure with its dotted key, in the order of the schema."""
        return ((key, figure) for key, figure, _ in facts(self))

    @property
    def has_range(self) -> bool:
        """Whether the slow and the fast corner differ."""
        return any(figure.has_range for _, figure in self.figures())

    def at(self, corner: Corner | str = Corner.NOMINAL) -> Chip:
        """Plain numbers at one corner of all ranges."""
        return _resolve(self, Corner(corner))


@dataclass(frozen=True, kw_only=True)
class Link:
    """A resolved `LinkSpec`: per chip and per direction."""

    topology: str
    bytes_per_s: float
    achieved: float
    latency_s: float
    domain: int
    ports: int | None


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A chip at one corner of its ranges: plain numbers in SI, and the source of each."""

    name: str
    title: str
    vendor: str
    kind: str
    corner: Corner
    chips_per_node: int
    peak_flops_per_s: Mapping[DType, float]
    achieved_matmul: Mapping[DType, float]
    achieved_attention: float
    memory_bytes: float
    memory_bytes_per_s: float
    achieved_memory: float
    kernel_launch_s: float
    step_host_s: float
    scale_up: Link | None
    scale_out: Link | None
    host_bytes_per_s: float | None
    tdp_w: float
    idle_w: float
    provenance: Mapping[str, Source]
    """Source of each figure by its dotted key in the file, e.g. `matmul.peak.bf16`."""
    calibration: Calibration | None
    inside: str | None = None
    """Name of the PPU that it is made of, where its kernels follow from that."""
    is_lowered: bool = False
    """Operators cost what the programs take that the compiler makes of them, where it can."""
    library: str = "any"
    """The serving engine whose kernels run on it; `any` is none in particular."""

    def __hash__(self) -> int:
        return hash((self.name, self.corner, self.memory_bytes_per_s))

    @property
    def sources(self) -> frozenset[Source]:
        return frozenset(self.provenance.values())

    def sources_of(self, *keys: str) -> frozenset[Source]:
        """Sources of the figures under these dotted keys: `sources_of("memory", "matmul.peak.bf16")`."""
        return frozenset(
            source
            for figure, source in self.provenance.items()
            if any(figure == key or figure.startswith(key + ".") for key in keys)
        )


def _resolve(spec: ChipSpec, corner: Corner) -> Chip:
    def more(figure: Figure) -> float:
        return figure.at(corner)

    def less(figure: Figure) -> float:
        return figure.at(corner, more_is_better=False)

    return Chip(
        name=spec.name,
        title=spec.title,
        vendor=spec.vendor,
        kind=spec.kind,
        corner=corner,
        chips_per_node=int(more(spec.chips_per_node)),
        peak_flops_per_s={dtype: more(figure) for dtype, figure in spec.matmul.peak.items()},
        achieved_matmul={dtype: more(figure) for dtype, figure in spec.matmul.achieved.items()},
        achieved_attention=more(spec.matmul.attention),
        memory_bytes=more(spec.memory.capacity),
        memory_bytes_per_s=more(spec.memory.bandwidth),
        achieved_memory=more(spec.memory.achieved),
        kernel_launch_s=less(spec.overhead.kernel_launch),
        step_host_s=less(spec.overhead.step_host),
        scale_up=_link(spec.scale_up, corner),
        scale_out=_link(spec.scale_out, corner),
        host_bytes_per_s=None if spec.host_link is None else more(spec.host_link),
        tdp_w=less(spec.power.tdp),
        idle_w=less(spec.power.idle),
        provenance={key: figure.source for key, figure in spec.figures()},
        calibration=spec.calibration,
        inside=spec.inside,
    )


def _link(spec: LinkSpec | None, corner: Corner) -> Link | None:
    if spec is None:
        return None
    return Link(
        topology=spec.topology,
        bytes_per_s=spec.bandwidth.at(corner),
        achieved=spec.achieved.at(corner),
        latency_s=spec.latency.at(corner, more_is_better=False),
        domain=int(spec.domain.at(corner)),
        ports=None if spec.ports is None else int(spec.ports.at(corner)),
    )


# What chips are connected to, kept on and paid with.


@dataclass(frozen=True, kw_only=True)
class FabricSpec:
    """A network between chips. Bandwidth is per endpoint (chip) and per direction."""

    name: str = has(Text())
    title: str = has(Text())
    vendor: str = has(Text())
    kind: str = has(Text(("scale_up", "scale_out")))
    topology: str = has(Text(TOPOLOGIES))
    status: str = has(Text(("released", "pre-release")), default="released")
    aliases: tuple[str, ...] = has(Texts(), default=())
    note: str | None = has(Text(), default=None)
    bandwidth: Figure = has(Fact(BANDWIDTH))
    achieved: Figure = has(Fact(FRACTION))
    latency: Figure = has(Fact(TIME, more_is_better=False))
    endpoints: Figure = has(Fact(COUNT))
    endpoints_per_node: Figure = has(Fact(COUNT))
    endpoints_per_segment: Figure | None = has(Fact(COUNT), default=None)
    """Endpoints one switch hop apart."""
    tiers: Figure | None = has(Fact(COUNT, more_is_better=False), default=None)
    planes: Figure | None = has(Fact(COUNT), default=None)
    oversubscription: Figure | None = has(Fact(RATIO, more_is_better=False), default=None)
    """Downward over upward bandwidth at the topmost tier; 1 is none."""
    collectives: tuple[CollectiveSample, ...] = has(Samples(CollectiveSample), default=())
    collectives_source: str | None = has(Text(), default=None)
    efficiency: tuple[EfficiencySample, ...] = has(Samples(EfficiencySample), default=())
    efficiency_source: str | None = has(Text(), default=None)


@dataclass(frozen=True, kw_only=True)
class StorageSpec:
    """A parallel file system: totals, what one client gets, and what a byte stored earns."""

    name: str = has(Text())
    title: str = has(Text())
    vendor: str = has(Text())
    aliases: tuple[str, ...] = has(Texts(), default=())
    note: str | None = has(Text(), default=None)
    capacity: Figure = has(Fact(BYTES))
    read_bandwidth: Figure = has(Fact(BANDWIDTH))
    write_bandwidth: Figure = has(Fact(BANDWIDTH))
    read_density: Figure | None = has(Fact(BANDWIDTH_DENSITY), default=None)
    """Read bandwidth each stored byte of capacity brings, up to `read_bandwidth`."""
    write_density: Figure | None = has(Fact(BANDWIDTH_DENSITY), default=None)
    client_bandwidth: Figure = has(Fact(BANDWIDTH))
    read_latency: Figure = has(Fact(TIME, more_is_better=False))
    write_latency: Figure = has(Fact(TIME, more_is_better=False))
    read_operations: Figure | None = has(Fact(RATE), default=None)
    write_operations: Figure | None = has(Fact(RATE), default=None)


@dataclass(frozen=True, kw_only=True)
class PriceSpec:
    """What an hour of one chip costs, everything around it included."""

    name: str = has(Text())
    chip: str = has(Text())
    basis: str = has(Text(("market", "list", "operator", "ownership", "assumed")))
    """market: rental offers; list: a public price list; operator: what an operator says it pays;
    ownership: derived from total cost of ownership; assumed: nobody published one."""
    note: str | None = has(Text(), default=None)
    chip_hour: Figure = has(Fact(PRICE, more_is_better=False))


Spec = ChipSpec | FabricSpec | StorageSpec | PriceSpec | WorkloadSpec | FleetSpec | MarketSpec | PpuSpec

SCHEMAS: Mapping[str, type[Spec]] = {
    "chips": ChipSpec,
    "fabrics": FabricSpec,
    "storage": StorageSpec,
    "prices": PriceSpec,
    "workloads": WorkloadSpec,
    "ppus": PpuSpec,
}
"""Kind of spec (its catalogue folder) to schema; models are `config.json` files and
have none, and fleets are the user's own files."""
