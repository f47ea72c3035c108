"""What every engine has to be told about a plan, before any engine's words for it.

Nodes, ports and memory follow from the plan and the chip; the flags of an engine are
`engines`' matter.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tongyun.codesign.launch.platforms import Platform, platform_of
from tongyun.codesign.plan import Offer
from tongyun.codesign.space import Question, released_dtype
from tongyun.codesign.steady import USABLE_MEMORY, Memory, load_at, memory_by_stage
from tongyun.errors import InputError
from tongyun.model.graph import RECIPES, Precision
from tongyun.model.shard import Shard
from tongyun.report import quantity
from tongyun.units import GB, Source


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

    @property
    def shard(self) -> Shard:
        return self.offer.plan.shard

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
        return min(self.offer.plan.replicas, max(1, per_node // self.shard.ranks)) if self.nodes == 1 else 1

    @cached_property
    def _group(self) -> tuple[np.ndarray, np.ndarray]:
        shard, plan = self.shard, self.offer.plan
        return np.array([plan.batch / (shard.dp * shard.pp)]), np.array([float(plan.step_tokens)])

    @cached_property
    def sequences(self) -> int:
        """Sequences an attention group holds at once, in prefill or decoding, over all pipeline stages."""
        batch, budget = self._group
        prompts = load_at(self.question, batch, budget).prompts
        return self.shard.pp * math.ceil(float((batch + prompts)[0]))

    @cached_property
    def memory(self) -> Memory:
        """Of one rank of the fullest stage."""
        stages = memory_by_stage(self.question, self.shard, *self._group)
        return max(stages, key=lambda memory: float(memory.total[0]))

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

    def header(self, *notes: str) -> str:
        """Comment lines: the plan, what is predicted for it and from which sources, memory, and notes."""
        question, plan = self.question, self.offer.plan
        idle = f"; {plan.idle_reason}" if plan.idle_chips else ""
        lines = [
            f"{question.model.name} ({self.recipe}) on {question.chips} × {question.chip.title}: "
            f"{plan}{idle}",
            f"batch {plan.batch} on a replica, {plan.step_tokens} tokens a step",
            f"written by: {self.command}",
            f"predicted for {question.isl} tokens in, {question.osl} out, not measured "
            f"({Source.mix(self.offer.sources)}):",
            *(f"  {line}" for line in self._figures()),
            self._memory_line(),
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

    def _memory_line(self) -> str:
        parts = (self.memory.weights, float(self.memory.kv[0]), float(self.memory.activations[0]))
        weights, kv, activations = (part / GB for part in parts)
        capacity = self.question.chip.memory.capacity.value / GB
        return (
            f"memory of the fullest chip: weights {weights:.2f} + KV {kv:.2f} + activations "
            f"{activations:.2f} = {sum(parts) / GB:.2f} of {capacity:.2f} GB"
        )


def _but_kv(precision: Precision) -> tuple[str, ...]:
    p = precision
    return (p.weights, p.experts, p.compute, p.expert_compute, p.activations)
