"""What the kernel models know of a chip, and of the library whose kernels run on it.

`Silicon` is the chip: published facts (rates, bandwidth, cores, clock) and at most six
fitted numbers, each with a physical meaning. `Library` is the software of one serving
engine: how many kernels an operator launches, what passes over memory it adds, and how
much of the chip's matmul rate its kernels keep; it is fitted over all measured chips
together and does not change from chip to chip. Both live in `silicon.toml` beside this
file, with the source of every number. Knows no operator and prices nothing.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tongyun.errors import InputError, unknown
from tongyun.specs import Chip, Corner, Ppu, find_ppu
from tongyun.units import DType

FITTED = (
    "memory_efficiency",
    "math_efficiency",
    "core_load_bytes_per_s",
    "fill_s",
    "link_efficiency",
    "hop_s",
)
"""The numbers of a chip that measurements decide; nothing else of `Silicon` is fitted."""


@dataclass(frozen=True, kw_only=True)
class Silicon:
    """One data-centre chip as its kernels see it."""

    name: str
    peak_flops_per_s: Mapping[DType, float]
    memory_bytes_per_s: float
    cores: float
    """Streaming multiprocessors: what a tile of work runs on. A fraction where nobody published how
    many there are and the peak rate stands for them."""
    clock_hz: float
    """Clock at which the peak rates are stated."""
    exponentials_per_cycle: float
    """Exponentials a core starts in a cycle; softmax needs one for each query-key pair."""
    asynchronous: bool
    """Matrix units run beside the instructions that feed them (Hopper and later)."""
    link_bytes_per_s: float
    """Scale-up bandwidth, one direction."""
    domain: int
    """Chips the scale-up link joins."""
    switch_reduces: bool
    """The switch can add what passes through it (NVLink SHARP)."""
    memory_efficiency: float
    """Fraction of the memory bandwidth that a long stream reaches."""
    math_efficiency: float
    """Fraction of the peak rate that the inner loop of a matmul reaches, at a `pace` of 1."""
    core_load_bytes_per_s: float
    """What one core can take in from cache, tiles shared between cores counted once for each."""
    fill_s: float
    """From the first load of a tile to its last store, work excepted: a memory round trip or two."""
    link_efficiency: float
    """Fraction of the link's bandwidth that a long transfer reaches."""
    hop_s: float
    """One step of a collective, too small for bandwidth to matter."""
    math_rows: int = 64
    """Rows a matrix instruction covers at least: a thinner tile takes as long."""
    launch_s: float | None = None
    """Start of a kernel, where the chip says it and not the library's measurements."""
    pace: float = 1.0
    """A core's matrix rate over that of the chip its efficiency was fitted on. What keeps an inner
    loop from its peak (issuing, waiting for operands) takes as long on a chip whose matrix units
    were slowed down, and so costs it a smaller fraction."""

    def math_flops_per_s(self, compute: DType, share: float = 1.0) -> float:
        """What one core's inner loop achieves in this type, when a library keeps `share` of it.

        peak / (1 + (1/e − 1) · pace) with e = math efficiency · share, at most 1. A type
        without a rate uses bf16's.
        """
        peak = self.peak_flops_per_s.get(compute, self.peak_flops_per_s[DType.BF16])
        efficiency = min(self.math_efficiency * share, 1.0)
        return peak / (1.0 + (1.0 / efficiency - 1.0) * self.pace) / self.cores

    @property
    def stream_bytes_per_s(self) -> float:
        return self.memory_bytes_per_s * self.memory_efficiency

    @property
    def wire_bytes_per_s(self) -> float:
        return self.link_bytes_per_s * self.link_efficiency


@dataclass(frozen=True, kw_only=True)
class Library:
    """The kernels of one serving engine. Launches count kernels an operator starts one after the other."""

    name: str
    launch_s: float
    """Start of a kernel in a captured graph, until its first instruction."""
    split_s: float
    """Joining the partial sums of a matmul cut along its inner dimension."""
    fp8_launches: float
    fp8_pass_bytes: float
    """Bytes moved per activation element to quantise it with one scale a tensor or row."""
    fp8_efficiency: float
    block_launches: float
    block_pass_bytes: float
    """The same for block scales (128 × 128 weights)."""
    block_efficiency: float
    prefill_launches: float
    prefill_efficiency: float
    """Share of the rate of products and exponentials that the inner loop keeps."""
    prefill_fp8_efficiency: float
    prefill_tile_s: float
    """What a tile of a prompt takes beyond walking its keys."""
    prefill_passes: float
    """Extra times the new keys and values cross memory: rotary embedding, appending to the cache."""
    decode_launches: float
    decode_block_s: float
    """From one block of keys to the next: load, product, softmax, product, each waiting for the last."""
    decode_fp8_block_s: float
    """The same with a cache in fp8, which some libraries unpack on the way."""
    decode_tile_s: float
    """What a tile of decoding takes beyond walking its keys."""
    decode_stream: float
    """Memory bandwidth reached in reading the cache, over the chip's own figure for matmuls."""
    decode_plain_stream: float
    """The same on a chip that is not asynchronous, whose loads go through registers."""
    decode_join: float
    """Fills it takes to join a cache cut over several cores."""
    latent_prefill_efficiency: float
    latent_decode_efficiency: float
    latent_stream: float
    """The same three of latent attention."""
    moe_launches: float
    moe_efficiency: float
    moe_fp8_launches: float
    moe_fp8_efficiency: float
    moe_fp8_passes: float
    moe_unpack_efficiency: float
    """For weights narrower than the products, unpacked on the way."""
    moe_stream: float
    """Memory bandwidth reached in reading experts, over the chip's own figure for matmuls."""
    moe_passes: float
    """Times the routed activations cross memory between the two products, in their least."""
    start_fills: float
    """Fills before the first byte of a collective is under way."""
    ramp_s: float
    """Depth of a collective's pipeline: chunks are cut so that both their number and their size cost."""
    switch_gain: float
    """How much faster an all-reduce is where the switch adds."""


@lru_cache(maxsize=1)
def tables() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """The contents of `silicon.toml`: `chip`, `sibling` and `library`, by name."""
    return tomllib.loads(Path(__file__).with_name("silicon.toml").read_text(encoding="utf-8"))


def silicon(name: str) -> Silicon:
    """A fitted chip of `silicon.toml`, or a sibling of one: same cores, other facts."""
    chips, siblings = tables()["chip"], tables()["sibling"]
    if name not in chips and name not in siblings:
        raise InputError(unknown("silicon", name, (*chips, *siblings)))
    sibling = siblings.get(name, {})
    values = {**chips[sibling.get("of", name)], **sibling}
    values["peak_flops_per_s"] = {DType(k): v for k, v in values["peak_flops_per_s"].items()}
    known = {f.name for f in fields(Silicon)} - {"name", "pace", "math_rows", "launch_s"}
    made = Silicon(name=name, **{key: values[key] for key in known})
    return replace(made, pace=_core_flops(made) / _core_flops(silicon(sibling["of"]))) if sibling else made


def _core_flops(chip: Silicon) -> float:
    return chip.peak_flops_per_s[DType.BF16] / chip.cores


def silicon_of(chip: Chip) -> Silicon:
    """A spec's chip as silicon: its own facts, and the fitted numbers of its like.

    A chip in `silicon.toml` keeps its cores and fitted numbers. Any other gets the class
    of the newest measured chip, with as many of its cores as the bf16 peak is worth; at
    the slow and fast corner each fitted number is the worst and best of all measured
    chips, so that a chip without measurements answers with a range. One whose inside is
    written down is made of that.
    """
    known = {*tables()["chip"], *tables()["sibling"]}
    base = silicon(chip.name if chip.name in known else NEWEST)
    peaks = dict(chip.peak_flops_per_s)
    peaks.setdefault(DType.BF16, max(peaks.values()))
    link = chip.scale_up
    base = replace(
        base,
        name=chip.name,
        peak_flops_per_s=peaks,
        memory_bytes_per_s=chip.memory_bytes_per_s,
        link_bytes_per_s=link.bytes_per_s if link else 0.0,
        domain=link.domain if link else 1,
    )
    if chip.name in known:
        return base
    if chip.inside is not None:
        return replace(
            base, switch_reduces=False, **{**_class(chip.corner), **_stated(chip), **_made_of(chip)}
        )
    # Not rounded: one core more, each a little slower, would make a faster chip slower.
    cores = base.cores * peaks[DType.BF16] / silicon(NEWEST).peak_flops_per_s[DType.BF16]
    fitted = {**_class(chip.corner), **_stated(chip)}
    return replace(base, cores=cores, switch_reduces=False, **fitted)


def is_measured(chip: Chip) -> bool:
    """Whether this chip, or a sibling with the same cores, is among those the numbers were fitted on."""
    return chip.name in tables()["chip"] or chip.name in tables()["sibling"]


def _stated(chip: Chip) -> dict[str, Any]:
    """What the spec itself says of fractions reached, which is worth more than another chip's."""
    link = chip.scale_up
    wires = {} if link is None else {"link_efficiency": link.achieved, "hop_s": link.latency_s}
    products = chip.achieved_matmul.get(DType.BF16, min(chip.achieved_matmul.values(), default=None))
    maths = {} if products is None else {"math_efficiency": products}
    return {"memory_efficiency": chip.achieved_memory, **maths, **wires}


def inside_of(chip: Chip) -> Ppu:
    """The PPU that a chip is made of, by default of the same name, at the chip's corner.

    Cores and clock are those of the middle, whose product is the peak that the chip's file states.
    """
    spec = find_ppu(chip.inside or chip.name)
    middle = spec.at()
    return replace(spec.at(chip.corner), cores=middle.cores, clock_hz=middle.clock_hz)


def _made_of(chip: Chip) -> dict[str, Any]:
    """What a chip's inside says of its cores: the figures that the lowered program runs on.

    A tile's fill is a load from memory, a product, an epilogue and a store.
    """
    ppu = inside_of(chip)
    fill_s = ppu.hbm_latency_s + 2 * ppu.l2_latency_s + ppu.tensor_latency_s + ppu.vector_latency_s
    port_bytes = min(ppu.port_bytes, ppu.l2_rate / ppu.cores)
    return {
        "cores": float(ppu.cores),
        "clock_hz": ppu.clock_hz,
        "exponentials_per_cycle": ppu.softmax_lanes,
        "core_load_bytes_per_s": port_bytes * ppu.clock_hz,
        "fill_s": fill_s,
        "math_rows": ppu.tile_m,
        "launch_s": ppu.barrier_s,
    }


NEWEST = "h100"


def _class(corner: Corner) -> dict[str, Any]:
    """Fitted numbers for a chip nobody measured."""
    if corner is Corner.NOMINAL:
        return {}
    measured = [silicon(name) for name in tables()["chip"]]
    worst = {field: max if field in ("fill_s", "hop_s") else min for field in FITTED}
    best = {field: min if field in ("fill_s", "hop_s") else max for field in FITTED}
    choose = worst if corner is Corner.SLOW else best
    return {field: choose[field](getattr(chip, field) for chip in measured) for field in FITTED}


def library(name: str = "any") -> Library:
    """An engine's kernel library by name; `any` is one set fitted over all engines together."""
    libraries = tables()["library"]
    if name not in libraries:
        raise InputError(unknown("kernel library", name, libraries))
    values = libraries[name]
    return Library(name=name, **{f.name: values[f.name] for f in fields(Library) if f.name != "name"})
