"""What an answer is made of: plans, what they give, and what was cut.

Holds the words of a deployment. Searches and prices nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tongyun.codesign.space import Question
from tongyun.model.shard import Shard
from tongyun.units import Source


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A deployment: equal replicas, and what stands beside them."""

    shard: Shard
    batch: int
    """Sequences decoding at once on one replica."""
    step_tokens: int
    """Token budget of an engine's step, for one attention group."""
    replicas: int
    idle_chips: int
    prefill: Plan | None = None
    """The pool that prefills for these replicas, which then only decode."""
    others: tuple[Plan, ...] = ()
    """Further kinds of replica, on chips that these leave over."""
    idle_reason: str = ""
    """Why chips stay idle, in words; empty where none do."""

    @property
    def kinds(self) -> tuple[tuple[str, Plan], ...]:
        """All groups of equal replicas with their task: `mixed` ones, or `prefill` and `decode`."""
        if self.prefill is not None:
            first: tuple[tuple[str, Plan], ...] = (("prefill", self.prefill), ("decode", self))
        else:
            first = (("mixed", self),)
        return first + tuple(("mixed", kind) for kind in self.others)

    @property
    def chips(self) -> int:
        """Chips at work."""
        return sum(kind.replicas * kind.shard.ranks for _, kind in self.kinds)

    @property
    def pools(self) -> tuple[Mapping[str, object], ...]:
        """Groups of equal replicas; a mixed one prefills and decodes."""
        return tuple(kind.pool(role) for role, kind in self.kinds)

    def pool(self, role: str) -> Mapping[str, object]:
        """This kind's own replicas as a program reads them."""
        shard = self.shard
        return {
            "role": role,
            "replicas": self.replicas,
            "chips": self.replicas * shard.ranks,
            **{axis: getattr(shard, axis) for axis in ("tp", "pp", "ep", "dp")},
            "batch": self.batch,
            "step_tokens": self.step_tokens,
        }

    def __str__(self) -> str:
        """`2 × (tp4 pp1 ep1 dp1) + 1 × (tp2 pp1 ep1 dp1)`; pools are named by their task."""
        said = {"mixed": "", "prefill": "prefill ", "decode": "decode "}
        return " + ".join(f"{kind.replicas} × {said[role]}({kind.shard})" for role, kind in self.kinds)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a plan gives at one corner of the chip's ranges; of several kinds, the slowest's latencies."""

    ttft_s: float
    tpot_s: float
    tok_s_per_chip: float
    joules_per_token: float
    usd_per_mtoken: float | None
    usd_per_mtoken_total: float | None
    """Per million tokens, input and output together."""

    @property
    def tok_s_per_user(self) -> float:
        return 1 / self.tpot_s


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A plan with what it gives: nominal, and at the slow and fast corner where the spec has ranges."""

    plan: Plan
    figures: Figures
    slow: Figures | None
    fast: Figures | None
    replica_tokens_per_s: float
    """Output of one replica of the main kind, nominal; of two pools, a decode replica's part."""
    meets: bool
    sources: frozenset[Source]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Best and Pareto of a question, what was evaluated, and what was cut for which reason."""

    question: Question
    best: Offer | None
    pareto: tuple[Offer, ...]
    evaluated: int
    cut: Mapping[str, int]
    limit: str | None
    """Which limit binds when there is no best, in words."""
