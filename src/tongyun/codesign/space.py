"""What a plan may vary: the question asked, and the cuts, batches and chunks to try.

Lists candidates and says why a cut is not one; prices nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tongyun.codesign.places import Room, domain_of
from tongyun.errors import InputError, unknown
from tongyun.model.config import Experts, ModelConfig
from tongyun.model.graph import Precision
from tongyun.model.shard import Shard, broken_rule
from tongyun.specs import Chip, ChipSpec, Corner, PriceSpec

CHUNKS = (512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
"""Token budgets of a step: decoding sequences and prefill chunk together."""
BATCHES = np.array(sorted(set(np.round(np.geomspace(1, 4096, 109)).tolist())), dtype=np.float64)
"""Decoding sequences of an attention group to try: every whole number at first, then steps of 8 %."""
KERNELS = ("modelled", "lowered")
POOLS = ("mixed", "split", "both")
MOST_DRAFTED = 16
"""Longest draft; published modules draft one to eight."""
STAGES = (1, 2, 3, 4, 6, 8, 12, 16)
"""Pipeline depths to try; others are counted. Deeper ones only add hand-overs to every token."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A model, a load of equal requests, chips to put it on, and limits on latency."""

    model: ModelConfig
    chip: ChipSpec
    chips: int
    isl: int
    """Input tokens of a request."""
    osl: int
    """Output tokens of a request, the first of them from its prefill."""
    precision: Precision
    ttft_s: float | None = None
    tpot_s: float | None = None
    price: PriceSpec | None = None
    kernels: str = "modelled"
    """What prices operators: kernel models, or `lowered`, the programs that the compiler makes of them."""
    engine: str = "any"
    """The serving engine whose kernels are priced; `any` is none in particular."""
    pools: str = "mixed"
    """Which deployments are searched: replicas that prefill and decode, `split` pools, or `both`."""
    prefix_hit: float = 0.0
    """Share of input tokens whose keys and values are in the cache already: attended to and held,
    not computed."""
    draft_tokens: int = 0
    """Tokens drafted for each step that verifies them; 0: no speculative decoding."""
    acceptance: float = 0.0
    """Probability that a drafted token is right when those before it were."""

    def __post_init__(self) -> None:
        if self.chips < 1:
            raise InputError(f"chips must be at least 1, got {self.chips}")
        if self.isl < 1:
            raise InputError(f"isl must be at least 1 token, got {self.isl}")
        if self.osl < 2:
            raise InputError(f"osl must be at least 2 tokens (TPOT is the time between two), got {self.osl}")
        longest = self.model.max_positions
        if self.isl + self.osl > longest:
            raise InputError(
                f"isl {self.isl} + osl {self.osl} = {self.isl + self.osl} tokens, but "
                f"{self.model.name} has {longest} positions"
            )
        for name, limit in (("ttft", self.ttft_s), ("tpot", self.tpot_s)):
            if limit is not None and not 0 < limit < float("inf"):
                raise InputError(f"{name} must be a positive time, got {limit} s")

        if self.kernels not in KERNELS:
            raise InputError(unknown("kernels", self.kernels, KERNELS))
        if self.pools not in POOLS:
            raise InputError(unknown("pools", self.pools, POOLS))
        if not 0 <= self.prefix_hit < 1:
            raise InputError(
                f"prefix_hit must be a share from 0 up to, not including, 1; got {self.prefix_hit}"
            )
        if not 0 <= self.acceptance <= 1:
            raise InputError(f"acceptance must be a probability from 0 to 1, got {self.acceptance}")
        if not 0 <= self.draft_tokens <= MOST_DRAFTED:
            raise InputError(f"draft_tokens must be from 0 to {MOST_DRAFTED}, got {self.draft_tokens}")

    @property
    def computed(self) -> float:
        """Input tokens of a request that no cache holds; the last one is always computed."""
        return max(1.0, self.isl * (1 - self.prefix_hit))

    @property
    def step_tokens(self) -> float:
        """Expected tokens that a sequence gets in a step: 1 + a + … + a^k."""
        return float(sum(self.acceptance**i for i in range(self.draft_tokens + 1)))

    def at(self, corner: Corner = Corner.NOMINAL) -> Chip:
        """The chip at one corner of its ranges, with the kernels of the engine asked for."""
        is_lowered = self.kernels == "lowered"
        return replace(self.chip.at(corner), library=self.engine, is_lowered=is_lowered)


def default_dtype(config: ModelConfig, chip: ChipSpec) -> str:
    """The recipe a model is served in unless told otherwise: as released, or f32 on a chip without bf16."""
    if "bf16" not in chip.matmul.peak:
        return "f32"
    return released_dtype(config)


def released_dtype(config: ModelConfig) -> str:
    """The recipe in which the family's own checkpoints are stored."""
    return {"deepseek_v3": "fp8", "gpt_oss": "mxfp4"}.get(config.family, "bf16")


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """Cuts to try, how many were refused by a rule or for want of a link or a place, and how many have
    a depth that is not tried."""

    legal: tuple[Shard, ...]
    refused: int
    untried: int


def cuts(config: ModelConfig, chip: Chip, chips: int) -> Cuts:
    """Every cut over at most `chips` ranks that the rules and the chip's links and domains allow,
    smallest first."""
    room = Room.of(chips, domain_of(chip))
    legal: list[Shard] = []
    refused = untried = 0
    for flat in _shapes(config, chips):
        # The rules but the one for layers do not look at depth.
        deepest = min(config.layers, chips // flat.stage_ranks)
        if broken_rule(config, flat) is not None:
            refused += 1
            continue
        found = [replace(flat, pp=pp) for pp in STAGES if pp <= deepest]
        placed = [shard for shard in found if _linked(chip, shard.ranks) and room.fits(shard)]
        legal += placed
        refused += len(found) - len(placed)
        untried += deepest - len(found)
    ordered = sorted(legal, key=lambda shard: (shard.ranks, shard))
    return Cuts(legal=tuple(ordered), refused=refused, untried=untried)


def _shapes(config: ModelConfig, chips: int) -> Iterator[Shard]:
    """All ways to spread one stage over at most `chips` ranks; the rules decide which are legal."""
    for tp in range(1, chips + 1):
        yield Shard(tp=tp)
        yield from _expert_shapes(config.experts, tp, chips)


def _expert_shapes(experts: Experts | None, tp: int, chips: int) -> Iterator[Shard]:
    """Experts over tp alone, or over attention groups as well."""
    if experts is None:
        return
    for ep in _divisors(experts.count, tp)[1:]:
        yield Shard(tp=tp, ep=ep)
    for dp in _divisors(experts.count, chips // tp)[1:]:
        yield Shard(tp=tp, ep=tp * dp, dp=dp)


def _linked(chip: Chip, ranks: int) -> bool:
    """Whether `ranks` chips reach each other at all."""
    if ranks == 1:
        return True
    inside = 1 if chip.scale_up is None else chip.scale_up.domain
    return ranks <= inside or chip.scale_out is not None


def _divisors(number: int, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]


def grid() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Batches along the first axis, step budgets along the second."""
    return BATCHES[:, None], np.asarray(CHUNKS, dtype=np.float64)[None, :]
