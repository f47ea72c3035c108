"""The planner's price of a step beside that of the lowered program, work by work.

The planner prices operators on a `ChipSpec`; the compiler lowers the same model to kernels of a `Ppu`. Both
are cut into the same works, so that FLOPs and weights must be equal and seconds can be compared. What
only the planner has (sampling, the vocabulary's collectives) is a work without a program. It prices nothing
itself and decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tongyun.chip.collective import link_share
from tongyun.chip.ppu.analytic import analyse_repeated
from tongyun.chip.ppu.program import Kernel, Program, Tensor
from tongyun.chip.ppu.rates import TICKS
from tongyun.chip.ppu.timing import COUNTERS, Timing, shortened, simulate_repeated
from tongyun.chip.roofline import parts_s, streamed_bytes
from tongyun.chip.silicon import silicon_of
from tongyun.model.graph import COLLECTIVES, Kind, Operator
from tongyun.specs import Chip, Ppu
from tongyun.units import DType

KERNELS = {
    "embedding": {"embed"},
    "products": {"rmsnorm", "matmul", "join", "swiglu", "quantise", "cast"},
    "rotation, cache": {"rotate", "keep", "angles", "add"},
    "attention": {"attention", "merge"},
    "router": {"router", "choose"},
    "experts": {"experts_up", "experts_down", "dispatch", "combine"},
    "sums": {"all_reduce"},
    "head": set[str](),
    "sampling": set[str](),
    "vocabulary": set[str](),
}
"""Kinds of kernels by work, in the order of a step. Norms are folded into the products behind them and count
there; products outside layers are the head."""
_WEIGHTS = {
    "embed_tokens": "embedding",
    "lm_head": "head",
    "q_norm": "rotation, cache",
    "k_norm": "rotation, cache",
    "gate": "router",
    "norm": "head",
    **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), "products"),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "products"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj", "gate_up_proj"), "products"),
}
"""Works by the last word of a weight's name."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One kind of work of a step on one chip, all layers together."""

    name: str
    planner_s: float
    analytic_s: float
    """Analytic price of the lowered kernels."""
    simulated_s: float
    planner_flops: int
    program_flops: int
    planner_weight_bytes: int
    """Weights held for it."""
    program_weight_bytes: int

    @property
    def is_lowered(self) -> bool:
        return self.simulated_s > 0

    @property
    def ratio(self) -> float | None:
        """The planner's seconds over the lowered program's analytic price; None where one has none."""
        return self.planner_s / self.analytic_s if self.planner_s and self.analytic_s else None


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A figure that both files state, in SI units."""

    name: str
    unit: str
    planner: float
    inside: float

    @property
    def is_same(self) -> bool:
        """To a part in a thousand: 2.04 TB/s and 2.039 are one bandwidth."""
        return abs(self.planner - self.inside) <= 1e-3 * abs(self.inside)


def beside(
    operators: Sequence[Operator], chip: Chip, program: Program, ppu: Ppu, symbols: Mapping[str, ArrayLike]
) -> tuple[Work, ...]:
    """The works of one step, those that neither side has left out.

    `operators` are one rank's of the step that `program` was compiled for, every row of it sampled.
    """
    names = [_of_kernel(kernel) for kernel in shortened(program)[0].kernels]
    analytic = _by_work(analyse_repeated(program, ppu, symbols), names)
    simulated = _by_work(simulate_repeated(program, ppu, symbols), names)
    held = _held(program)
    footprint = streamed_bytes(operators)
    works = []
    for name in KERNELS:
        mine = [op for op in operators if _of_operator(op) == name]
        if not mine and name not in names:
            continue
        works.append(
            Work(
                name=name,
                planner_s=sum(op.repeat * float(sum(parts_s(op, chip, footprint))) for op in mine),
                analytic_s=analytic[name][0],
                simulated_s=simulated[name][0],
                planner_flops=round(sum(op.repeat * float(op.flops) for op in mine)),
                program_flops=simulated[name][1],
                planner_weight_bytes=round(sum(float(op.resident_bytes) for op in mine)),
                program_weight_bytes=held.get(name, 0),
            )
        )
    return tuple(works)


def whole(works: Sequence[Work]) -> Work:
    """The sum of the works that are lowered: what both sides price."""
    lowered = [work for work in works if work.is_lowered]
    return Work(
        name="lowered",
        planner_s=sum(work.planner_s for work in lowered),
        analytic_s=sum(work.analytic_s for work in lowered),
        simulated_s=sum(work.simulated_s for work in lowered),
        planner_flops=sum(work.planner_flops for work in lowered),
        program_flops=sum(work.program_flops for work in lowered),
        planner_weight_bytes=sum(work.planner_weight_bytes for work in lowered),
        program_weight_bytes=sum(work.program_weight_bytes for work in lowered),
    )


def stated(chip: Chip, ppu: Ppu) -> Iterator[Fact]:
    """Published or derived figures that a chip's file and its inside's both give."""
    for dtype in sorted(chip.peak_flops_per_s.keys() & ppu.tensor_flops.keys()):
        peak = ppu.peak_flops_per_s(dtype)
        yield Fact(name=f"peak {dtype}", unit="FLOPS", planner=chip.peak_flops_per_s[dtype], inside=peak)
    yield Fact(name="memory", unit="B", planner=chip.memory_bytes, inside=ppu.hbm_bytes)
    yield Fact(name="bandwidth", unit="B/s", planner=chip.memory_bytes_per_s, inside=ppu.hbm_peak_bytes_per_s)
    yield Fact(name="power", unit="W", planner=chip.tdp_w, inside=ppu.limit_w)
    link = chip.scale_up
    if link is not None and ppu.icn_ports:
        yield Fact(name="chips joined", unit="", planner=link.domain, inside=ppu.icn_domain)
        reached = link.bytes_per_s * link.achieved
        yield Fact(name="links reached", unit="B/s", planner=reached, inside=ppu.icn_bytes_per_s)
        port = ppu.icn_bytes_per_s / (1 if ppu.icn_is_switched else ppu.icn_ports)
        yield Fact(name="to one peer", unit="B/s", planner=reached * link_share(link, 2), inside=port)
        yield Fact(name="link latency", unit="s", planner=link.latency_s, inside=ppu.icn_latency_s)


def reached(chip: Chip, ppu: Ppu) -> Iterator[Fact]:
    """What either model takes a core's products and the memory to reach; where a chip was measured, each
    is fitted with the rest of its own model."""
    silicon = silicon_of(chip)
    products = silicon.math_flops_per_s(DType.BF16) * silicon.cores
    inside = ppu.peak_flops_per_s(DType.BF16) / ppu.tensor_peak
    yield Fact(name="products reach", unit="FLOPS", planner=products, inside=inside)
    streaming = silicon.stream_bytes_per_s
    yield Fact(name="memory reaches", unit="B/s", planner=streaming, inside=ppu.hbm_bytes_per_s)
    softmax = silicon.exponentials_per_cycle * silicon.clock_hz * silicon.cores
    lanes = ppu.softmax_lanes * ppu.clock_hz * ppu.cores
    yield Fact(name="exponentials", unit="1/s", planner=softmax, inside=lanes)


def _by_work(timing: Timing, names: Sequence[str]) -> dict[str, tuple[float, int]]:
    """Seconds and FLOPs of each work."""
    flops = timing.counters[:, COUNTERS.index("flops")]
    found = {}
    for name in KERNELS:
        mine = timing.times * np.array([other == name for other in names])
        found[name] = int(timing.ticks @ mine) / TICKS, int(flops @ mine)
    return found


def _of_kernel(kernel: Kernel) -> str:
    if kernel.layer is None and kernel.kind in KERNELS["products"]:
        return "head"
    return next(name for name, kinds in KERNELS.items() if kernel.kind in kinds)


def _of_operator(op: Operator) -> str:
    if op.routed is not None:
        return "experts"
    if op.kind in COLLECTIVES:
        return "vocabulary" if op.name in {"embed_sum", "logits_gather"} else "sums"
    if op.name in {"router", "head"}:
        return op.name
    if op.name == "final_norm":
        return "head"
    if op.name == "rotate":
        return "rotation, cache"
    kinds = {Kind.EMBED: "embedding", Kind.ATTENTION: "attention", Kind.SAMPLE: "sampling"}
    return kinds.get(op.kind, "products")


def _held(program: Program) -> dict[str, int]:
    """Bytes of the weights in a program's memory, by work."""
    found: dict[str, int] = {}
    for tensor in program.tensors:
        name = _of_weight(tensor)
        if name is not None:
            found[name] = found.get(name, 0) + tensor.bytes
    return found


def _of_weight(tensor: Tensor) -> str | None:
    """The work that a weight is for; None for what is no weight."""
    if tensor.role != "input":
        return None
    if ".experts." in tensor.name:
        return "experts"
    return _WEIGHTS.get(tensor.name.removesuffix(".weight").rsplit(".", 1)[-1])
