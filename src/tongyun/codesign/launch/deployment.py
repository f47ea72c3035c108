"""What every engine has to be told about a plan, before any engine's words for it.

A plan is one or several kinds of equal replicas, each with a task: `Member`. Machines and memory
follow from the plan and the chip; the flags of an engine are `engines`' matter, which machine a
replica stands on is `machines`'.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tongyun.codesign.launch.platforms import Platform, platform_of
from tongyun.codesign.plan import Offer, Plan
from tongyun.codesign.pools import PoolPrices
from tongyun.codesign.space import Question, released_dtype
from tongyun.codesign.steady import USABLE_MEMORY, Memory, load_at, memory_by_stage, steady
from tongyun.errors import InputError
from tongyun.model.graph import RECIPES, Precision
from tongyun.model.shard import Shard
from tongyun.report import quantity
from tongyun.units import GB, Source

MIXED, PREFILL, DECODE = "mixed", "prefill", "decode"


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """The best plan of a question, with the weights it serves."""

    question: Question
    offer: Offer
    command: str
    """The command line that asked, for the files' headers."""
    weights: str
    """Hugging Face id or path that engines load, stored as the model was released."""
    checkpoint: str | None = None
    """Other weights, already stored in the plan's precision."""
    draft: str | None = None
    """Weights of the draft module, where the model has none of its own."""

    @property
    def source(self) -> str:
        """What the engines load."""
        return self.checkpoint or self.weights

    @cached_property
    def platform(self) -> Platform:
        return platform_of(self.question.chip)

    @cached_property
    def name(self) -> str:
        """A DNS label for the model on the chip, `qwen3-32b-h200`."""
        text = f"{self.question.model.name.rsplit('/', 1)[-1]}-{self.question.chip.name}".lower()
        return re.sub(r"[^a-z0-9]+", "-", text).strip("-")[:50].rstrip("-")

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """The kinds of replica, the main one first, of two pools prefill; a lone kind needs no label."""
        kinds = self.offer.plan.kinds
        found, mixed = [], 0
        for index, (role, plan) in enumerate(kinds):
            mixed += role == MIXED
            label = f"{role}-{mixed}" if role == MIXED else role
            label = label if len(kinds) > 1 else ""
            found.append(Member(deployment=self, role=role, plan=plan, label=label, index=index))
        return tuple(found)

    @property
    def pools(self) -> tuple[Member, ...]:
        """The two members that share the work on a request; none where every replica does both."""
        return tuple(member for member in self.members if member.role != MIXED)

    @property
    def mixed(self) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.role == MIXED)

    @cached_property
    def recipe(self) -> str:
        """The dtype's short name, KV apart."""
        wanted = self.question.precision
        return next(name for name, recipe in RECIPES.items() if _but_kv(recipe) == _but_kv(wanted))

    @property
    def quantises(self) -> bool:
        """Whether the engine quantises released weights as it loads them; most recipes need a checkpoint."""
        released = released_dtype(self.question.model)
        if self.checkpoint is not None or self.recipe in (released, "f32"):
            return False
        if (self.recipe, released) == ("fp8", "bf16"):
            return True
        raise InputError(
            f"{self.question.model.name} is released in {released}, which engines cannot turn into "
            f"{self.recipe} while loading: name weights stored in {self.recipe} with --checkpoint"
        )

    @property
    def drafter(self) -> str | None:
        """Weights of the draft module; None where the model brings its own."""
        model = self.question.model
        if self.draft is None and not model.mtp_layers:
            raise InputError(
                f"{model.name} has no draft module of its own: name EAGLE-3 weights for it with "
                "--draft-weights"
            )
        return self.draft

    @cached_property
    def shares(self) -> tuple[float, float]:
        """Output tokens per second of the two pools, and of all replicas that do both."""
        both = sum(member.tokens_per_s for member in self.mixed)
        whole = self.offer.figures.tok_s_per_chip * self.question.chips
        return (max(whole - both, 0.0), both) if self.pools else (0.0, both)

    def header(self, *notes: str, member: Member | None = None) -> str:
        """Comment lines: the plan, what is predicted for it and from which sources, memory, and notes."""
        question, plan = self.question, self.offer.plan
        idle = f"; {plan.idle_reason}" if plan.idle_chips else ""
        lines = [
            f"{question.model.name} ({self.recipe}) on {question.chips} × {question.chip.title}: "
            f"{plan}{idle}",
            *(() if member is None else member.describe()),
            f"written by: {self.command}",
            f"predicted for {question.isl} tokens in, {question.osl} out, not measured "
            f"({Source.mix(self.offer.sources)}):",
            *(f"  {line}" for line in self._figures()),
            *(each.memory_line() for each in (self.members if member is None else (member,))),
            *notes,
        ]
        return "".join(f"# {line}\n" for line in lines)

    def _figures(self) -> list[str]:
        rows = (
            ("TTFT", "ttft_s", "s"),
            ("TPOT", "tpot_s", "s"),
            ("output per chip", "tok_s_per_chip", "tokens/s"),
            ("per million output tokens", "usd_per_mtoken", "$"),
            ("energy per output token", "joules_per_token", "J"),
        )
        found = []
        for title, key, unit in rows:
            corners = [self.offer.figures, self.offer.slow, self.offer.fast]
            values = [getattr(figures, key) for figures in corners if figures is not None]
            if None not in values:
                found.append(f"{title} {quantity(values[0], unit, low=min(values), high=max(values))}")
        return found


@dataclass(frozen=True, kw_only=True)
class Member:
    """Equal replicas of a deployment with one task."""

    deployment: Deployment
    role: str
    """`mixed`, `prefill` or `decode`."""
    plan: Plan
    """The replicas themselves; what stands beside them is not looked at."""
    label: str
    """Names it among the members, `prefill` or `mixed-2`; empty where it is the only one."""
    index: int

    @property
    def question(self) -> Question:
        return self.deployment.question

    @property
    def shard(self) -> Shard:
        return self.plan.shard

    @property
    def name(self) -> str:
        """A DNS label, the deployment's and its own."""
        return f"{self.deployment.name}-{self.label}" if self.label else self.deployment.name

    @cached_property
    def nodes(self) -> int:
        """Machines one replica spans: the fewest over which its ranks divide evenly."""
        per_node = int(self.question.chip.chips_per_node.value)
        ranks = self.shard.ranks
        return next(n for n in range(math.ceil(ranks / per_node), ranks + 1) if ranks % n == 0)

    @property
    def chips_per_node(self) -> int:
        """Chips of one replica on each of its machines."""
        return self.shard.ranks // self.nodes

    @property
    def replicas_per_node(self) -> int:
        """Replicas that share a machine; one where a replica takes several."""
        per_node = int(self.question.chip.chips_per_node.value)
        return min(self.plan.replicas, max(1, per_node // self.shard.ranks)) if self.nodes == 1 else 1

    @cached_property
    def _group(self) -> tuple[np.ndarray, np.ndarray]:
        shard, plan = self.shard, self.plan
        return np.array([plan.batch / (shard.dp * shard.pp)]), np.array([float(plan.step_tokens)])

    @cached_property
    def sequences(self) -> int:
        """Sequences an attention group holds at once over all pipeline stages: in prefill or decoding, of
        a prefill pool those being computed and as many being handed over."""
        batch, budget = self._group
        each = float(batch[0])
        if self.role == PREFILL:
            each = 2 * each
        elif self.role == MIXED:
            each += float(load_at(self.question, batch, budget).prompts[0])
        return self.shard.pp * math.ceil(each)

    @property
    def step_tokens(self) -> int:
        """Token budget of an attention group's step, enough for a token of every sequence it decodes."""
        return max(self.plan.step_tokens, self.sequences)

    @cached_property
    def memory(self) -> Memory:
        """Of one rank of the fullest stage."""
        if self.role == MIXED:
            stages = memory_by_stage(self.question, self.shard, *self._group)
        else:
            prices = PoolPrices(self.question, self.question.at(), *self._group)
            held = prices.prefill_memories if self.role == PREFILL else prices.decode_memories
            stages = held(self.shard)
        return max(stages, key=lambda memory: float(memory.total[0]))

    @cached_property
    def tokens_per_s(self) -> float:
        """Output of all its replicas, which do both."""
        one = steady(self.question, self.question.at(), self.shard, *self._group)
        return self.plan.replicas * float(one.tokens_per_s[0])

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return self.question.isl + self.question.osl

    @property
    def static_fraction(self) -> float:
        """Share of memory for weights and KV that leaves the activations their room within the usable part.

        (usable · M − activations) / M, rounded down to 0.001 unless weights and KV need the rest.
        """
        capacity = self.question.chip.memory.capacity.value
        most = USABLE_MEMORY - float(self.memory.activations[0]) / capacity
        least = (self.memory.weights + float(self.memory.kv[0])) / capacity
        rounded = math.floor(most * 1000) / 1000
        return rounded if rounded >= least else math.floor(most * 1e6) / 1e6

    def describe(self) -> list[str]:
        """Which of the deployment's replicas these are, and their load."""
        load = f"batch {self.plan.batch} on a replica, {self.plan.step_tokens} tokens a step"
        if not self.label:
            return [load]
        return [f"this file: {self.label}, {self.plan.replicas} × ({self.shard}), {load}"]

    def memory_line(self) -> str:
        """What the fullest chip holds."""
        parts = (self.memory.weights, float(self.memory.kv[0]), float(self.memory.activations[0]))
        weights, kv, activations = (part / GB for part in parts)
        capacity = self.question.chip.memory.capacity.value / GB
        whose = f"{self.label}, " if self.label else ""
        return (
            f"{whose}memory of the fullest chip: weights {weights:.2f} + KV {kv:.2f} + activations "
            f"{activations:.2f} = {sum(parts) / GB:.2f} of {capacity:.2f} GB"
        )


def _but_kv(precision: Precision) -> tuple[str, ...]:
    p = precision
    return (p.weights, p.experts, p.compute, p.expert_compute, p.activations)
