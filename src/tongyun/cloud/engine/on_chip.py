"""Run one prompt on the simulated chip and say how its tokens compare with torch's.

The engine's own loop and scheduler run it. Torch then reads the finished text in one pass, in bf16 and in
f32 with the same weights: where f32 would have chosen another token, the two may be so near that
rounding to bf16 decides.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from tongyun.cloud.engine.clock import WallClock
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.ppu_executor import PpuExecutor, PpuOptions
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig
from tongyun.cloud.training.forward import causal
from tongyun.errors import InputError
from tongyun.model.qwen3 import Qwen3
from tongyun.specs import PpuSpec


@dataclass(frozen=True, kw_only=True)
class ChipRun:
    """What came of a prompt on the chip."""

    tokens: tuple[int, ...]
    same: int
    """Tokens that torch in f32 chooses as well, behind the same text."""
    near_ties: int
    """Others, where f32's two best are nearer to each other than torch's own bf16 is to f32, twice."""
    flops: int
    """FLOPs of products, counted by the instructions that did them."""
    steps: int
    chip_s: float
    """Simulated."""
    joules: float
    """Simulated."""
    wall_s: float
    """Measured: what compiling and simulating took here."""

    @property
    def wrong(self) -> int:
        """Tokens that rounding does not explain."""
        return len(self.tokens) - self.same - self.near_ties


def run_prompt(model: Qwen3, spec: PpuSpec, prompt: tuple[int, ...], count: int) -> ChipRun:
    """Greedy: `count` tokens behind `prompt`. The model's operations are `WholeOps`."""
    whole = len(prompt) + count
    if not prompt or whole > model.config.max_positions:
        raise InputError(
            f"a prompt of {len(prompt)} and {count} new tokens: accepted are 1 … "
            f"{model.config.max_positions} together, with at least one in the prompt"
        )
    begun = time.perf_counter()
    options = PpuOptions(sequences=1, step_tokens=len(prompt), context_tokens=whole)
    executor = PpuExecutor(model, spec, options)
    limits = SchedulerConfig(
        blocks=executor.blocks, block_tokens=options.block_tokens, max_context_tokens=whole,
        max_sequences=1, max_step_tokens=len(prompt), prefix_caching=False,
    )  # fmt: skip
    loop = EngineLoop(Scheduler(limits), executor, WallClock())
    loop.add(Request(id="prompt", prompt=prompt, output_tokens=count, arrival_s=loop.clock.now()))
    tokens = [event.token for _ in range(count) for event in loop.step() or [] if event.token is not None]
    same, near = _compare(model, prompt, tokens)
    stats = loop.stats()
    return ChipRun(
        tokens=tuple(tokens), same=same, near_ties=near, flops=executor.flops, steps=stats.steps,
        chip_s=stats.chip_s, joules=stats.chip_joules, wall_s=time.perf_counter() - begun,
    )  # fmt: skip


def _compare(model: Qwen3, prompt: tuple[int, ...], tokens: list[int]) -> tuple[int, int]:
    text = torch.tensor([*prompt, *tokens[:-1]])
    rows = slice(len(prompt) - 1, None)
    narrow, exact = (_logits(model, text, dtype)[rows] for dtype in (torch.bfloat16, torch.float32))
    chosen = torch.tensor(tokens)
    same = exact.argmax(-1) == chosen
    # Of the chip's token, not of the second best: it may be a third.
    behind = exact.amax(-1) - exact.gather(-1, chosen[:, None])[:, 0]
    near = ~same & (behind <= 2 * (narrow - exact).abs().amax(-1))
    return int(same.sum()), int(near.sum())


def _logits(model: Qwen3, text: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    before, model.activation_dtype = model.activation_dtype, dtype
    try:
        with torch.no_grad():
            return model.logits(model(text, torch.arange(len(text)), causal(len(text))))
    finally:
        model.activation_dtype = before
