# ruff: noqa: RUF009 - `has` returns dataclasses.field, which is not evaluated per instance
"""What a PPU spec says: the inside of a chip, as the instruction set sees it.

A `ChipSpec` says what a chip reaches; this says what it is made of, so that a compiler can place tiles
on it and a simulator can run them. `PpuSpec.at(corner)` gives plain numbers. Computes nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tongyun.specs.contents import facts
from tongyun.specs.figure import (
    BANDWIDTH,
    BYTES,
    BYTES_PER_CYCLE,
    COUNT,
    ENERGY,
    FRACTION,
    FREQUENCY,
    POWER,
    TIME,
    WORK_PER_CYCLE,
    Corner,
    Figure,
)
from tongyun.specs.form import ByDType, Fact, Section, Text, Texts, has
from tongyun.units import DType, Source


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Attention of a chip on which it is a kernel of tensor unit and lanes and not one instruction's work."""

    rows: Figure = has(Fact(COUNT, more_is_better=False))
    """Query rows of a tile; fewer cost as much."""
    keys: Figure = has(Fact(COUNT, more_is_better=False))
    """Keys of a tile of heads 128 wide, in proportion fewer of wider ones; fewer cost as much."""
    softmax: Figure = has(Fact(WORK_PER_CYCLE))
    """Pairs of query and key a cycle whose scores the lanes turn into weights."""
    hidden: Figure = has(Fact(FRACTION))
    """Part of the shorter of products and softmax that runs beside the longer."""


@dataclass(frozen=True, kw_only=True)
class CoreSpec:
    """One core: its tensor unit, its lanes and its SRAM."""

    tile_m: Figure = has(Fact(COUNT, more_is_better=False))
    tile_n: Figure = has(Fact(COUNT, more_is_better=False))
    tile_k: Figure = has(Fact(COUNT, more_is_better=False))
    """The smallest product the tensor unit takes; smaller ones cost as much."""
    tensor: Mapping[DType, Figure] = has(ByDType(Fact(WORK_PER_CYCLE)))
    """FLOPs a cycle of the tensor unit, by type of the operands."""
    tensor_latency: Figure = has(Fact(TIME, more_is_better=False))
    """From the last operand in to the last sum out."""
    vector: Figure = has(Fact(WORK_PER_CYCLE))
    """Elements a cycle of the vector lanes."""
    special: Figure = has(Fact(WORK_PER_CYCLE))
    """Elements a cycle of the special-function lanes (exponential, sine, division)."""
    vector_latency: Figure = has(Fact(TIME, more_is_better=False))
    sram: Figure = has(Fact(BYTES))
    port: Figure = has(Fact(BYTES_PER_CYCLE))
    """Bytes a cycle between one core and the L2, each way."""
    tensor_achieved: Figure | None = has(Fact(FRACTION), default=None)
    """What a stream of products reaches of `tensor` at `clock`: the clock falls under load, operands wait."""
    attention: AttentionSpec | None = has(Section(AttentionSpec), default=None)


@dataclass(frozen=True, kw_only=True)
class SharedSpec:
    """What all cores share."""

    l2: Figure = has(Fact(BYTES))
    l2_rate: Figure = has(Fact(BYTES_PER_CYCLE))
    l2_latency: Figure = has(Fact(TIME, more_is_better=False))
    hbm: Figure = has(Fact(BYTES))
    hbm_bandwidth: Figure = has(Fact(BANDWIDTH))
    hbm_achieved: Figure = has(Fact(FRACTION))
    hbm_latency: Figure = has(Fact(TIME, more_is_better=False))
    barrier: Figure = has(Fact(TIME, more_is_better=False))
    """From the last core's arrival at a barrier to the first instruction behind it."""


@dataclass(frozen=True, kw_only=True)
class IcnSpec:
    """The way to other chips; bandwidth is per port and direction."""

    topology: str = has(Text(("switch", "ports")), default="switch")
    """Whether a switch gives all ports to any peer, or each peer has a port of its own."""
    ports: Figure = has(Fact(COUNT))
    port_bandwidth: Figure = has(Fact(BANDWIDTH))
    achieved: Figure = has(Fact(FRACTION))
    latency: Figure = has(Fact(TIME, more_is_better=False))
    domain: Figure = has(Fact(COUNT))


@dataclass(frozen=True, kw_only=True)
class EnergySpec:
    """Energy of one operation or byte, and the power that flows whatever runs."""

    flop: Mapping[DType, Figure] = has(ByDType(Fact(ENERGY, more_is_better=False)))
    vector: Figure = has(Fact(ENERGY, more_is_better=False))
    """One element of one vector operation."""
    sram_byte: Figure = has(Fact(ENERGY, more_is_better=False))
    l2_byte: Figure = has(Fact(ENERGY, more_is_better=False))
    hbm_byte: Figure = has(Fact(ENERGY, more_is_better=False))
    icn_byte: Figure = has(Fact(ENERGY, more_is_better=False))
    static: Figure = has(Fact(POWER, more_is_better=False))
    limit: Figure = has(Fact(POWER))
    """The envelope; a run that would exceed it is slowed to it."""


@dataclass(frozen=True, kw_only=True)
class PpuSpec:
    """The inside of one chip, as its file says."""

    name: str = has(Text())
    title: str = has(Text())
    vendor: str = has(Text())
    aliases: tuple[str, ...] = has(Texts(), default=())
    note: str | None = has(Text(), default=None)
    cores: Figure = has(Fact(COUNT))
    clock: Figure = has(Fact(FREQUENCY))
    core: CoreSpec = has(Section(CoreSpec))
    shared: SharedSpec = has(Section(SharedSpec))
    icn: IcnSpec | None = has(Section(IcnSpec), default=None)
    energy: EnergySpec = has(Section(EnergySpec))

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Every figure with its dotted key, in the order of the schema."""
        return ((key, figure) for key, figure, _ in facts(self))

    def at(self, corner: Corner | str = Corner.NOMINAL) -> Ppu:
        """Plain numbers at one corner of all ranges."""
        return _resolve(self, Corner(corner))


@dataclass(frozen=True, kw_only=True)
class Ppu:
    """A PPU at one corner of its ranges: plain numbers, times in seconds, rates per cycle where named so."""

    name: str
    corner: Corner
    cores: int
    clock_hz: float
    tile_m: int
    tile_n: int
    tile_k: int
    tensor_flops: Mapping[DType, float]
    """FLOPs a cycle and core, as reached."""
    tensor_peak: float
    """What the tensor unit would do, as a multiple of what it reaches."""
    tensor_latency_s: float
    attention_rows: int
    """Query rows of an attention tile that cost as much as fewer; 0 where one instruction does it all."""
    attention_keys: int
    softmax_lanes: float
    softmax_hidden: float
    vector_lanes: float
    special_lanes: float
    vector_latency_s: float
    sram_bytes: int
    port_bytes: float
    """Bytes a cycle and core."""
    l2_bytes: int
    l2_rate: float
    """Bytes a cycle, all cores together."""
    l2_latency_s: float
    hbm_bytes: int
    hbm_bytes_per_s: float
    """What streaming reaches."""
    hbm_peak_bytes_per_s: float
    hbm_latency_s: float
    barrier_s: float
    icn_ports: int
    icn_is_switched: bool
    """All ports reach each peer; else a peer has one, and few peers leave the others idle."""
    icn_bytes_per_s: float
    """Per direction, all ports together, as reached."""
    icn_latency_s: float
    icn_domain: int
    flop_j: Mapping[DType, float]
    vector_j: float
    sram_byte_j: float
    l2_byte_j: float
    hbm_byte_j: float
    icn_byte_j: float
    static_w: float
    limit_w: float
    sources: frozenset[Source]

    def __hash__(self) -> int:
        return hash((self.name, self.corner, self.cores, self.clock_hz, self.hbm_bytes_per_s))

    def peak_flops_per_s(self, dtype: DType = DType.BF16) -> float:
        return self.cores * self.clock_hz * self.tensor_flops[dtype] * self.tensor_peak


def _resolve(spec: PpuSpec, corner: Corner) -> Ppu:
    def more(figure: Figure) -> float:
        return figure.at(corner)

    def less(figure: Figure) -> float:
        return figure.at(corner, more_is_better=False)

    core, shared, icn, energy = spec.core, spec.shared, spec.icn, spec.energy
    tile = core.attention
    reached = 1.0 if core.tensor_achieved is None else more(core.tensor_achieved)
    return Ppu(
        name=spec.name,
        corner=corner,
        cores=int(more(spec.cores)),
        clock_hz=more(spec.clock),
        tile_m=int(less(core.tile_m)),
        tile_n=int(less(core.tile_n)),
        tile_k=int(less(core.tile_k)),
        tensor_flops={dtype: more(figure) * reached for dtype, figure in core.tensor.items()},
        tensor_peak=1 / reached,
        tensor_latency_s=less(core.tensor_latency),
        attention_rows=0 if tile is None else int(less(tile.rows)),
        attention_keys=0 if tile is None else int(less(tile.keys)),
        softmax_lanes=more(core.special if tile is None else tile.softmax),
        softmax_hidden=1.0 if tile is None else more(tile.hidden),
        vector_lanes=more(core.vector),
        special_lanes=more(core.special),
        vector_latency_s=less(core.vector_latency),
        sram_bytes=int(more(core.sram)),
        port_bytes=more(core.port),
        l2_bytes=int(more(shared.l2)),
        l2_rate=more(shared.l2_rate),
        l2_latency_s=less(shared.l2_latency),
        hbm_bytes=int(more(shared.hbm)),
        hbm_bytes_per_s=more(shared.hbm_bandwidth) * more(shared.hbm_achieved),
        hbm_peak_bytes_per_s=more(shared.hbm_bandwidth),
        hbm_latency_s=less(shared.hbm_latency),
        barrier_s=less(shared.barrier),
        icn_ports=0 if icn is None else int(more(icn.ports)),
        icn_is_switched=icn is None or icn.topology == "switch",
        icn_bytes_per_s=0.0
        if icn is None
        else more(icn.ports) * more(icn.port_bandwidth) * more(icn.achieved),
        icn_latency_s=0.0 if icn is None else less(icn.latency),
        icn_domain=1 if icn is None else int(more(icn.domain)),
        flop_j={dtype: less(figure) for dtype, figure in energy.flop.items()},
        vector_j=less(energy.vector),
        sram_byte_j=less(energy.sram_byte),
        l2_byte_j=less(energy.l2_byte),
        hbm_byte_j=less(energy.hbm_byte),
        icn_byte_j=less(energy.icn_byte),
        static_w=less(energy.static),
        limit_w=more(energy.limit),
        sources=frozenset(figure.source for _, figure in spec.figures()),
    )
