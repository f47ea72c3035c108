"""A hand-made stand-in for the scheduler: it only knows how to cut pieces and name blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tongyun.cloud.engine.protocol import StepResult
from tongyun.cloud.engine.torch_executor import TorchExecutor
from tongyun.cloud.sched.request import Batch, Piece, Request
from tongyun.model.config import Experts, ModelConfig
from tongyun.model.options import SamplingOptions


def tiny(*, tied: bool = True, sparse: bool = False, **changes: object) -> ModelConfig:
    """A Qwen3 small enough for a test that still has uneven heads, grouped queries and several layers."""
    shape: dict[str, object] = {
        "name": "tiny",
        "family": "qwen3_moe" if sparse else "qwen3",
        "layers": 3,
        "hidden": 48,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 16,
        "intermediate": 80,
        "vocab": 211,
        "max_positions": 512,
        "rope_theta": 10_000.0,
        "norm_eps": 1e-6,
        "tied": tied,
        "qk_norm": True,
        "experts": Experts(count=8, per_token=3, intermediate=32) if sparse else None,
        "eos_token_ids": (7,),
    }
    return ModelConfig(**{**shape, **changes})  # type: ignore[arg-type]


@dataclass
class Driven:
    """One request as the driver sees it."""

    request: Request
    blocks: tuple[int, ...]
    done: int = 0
    output: list[int] = field(default_factory=list)

    @property
    def known(self) -> tuple[int, ...]:
        return (*self.request.prompt, *self.output)

    def piece(self, tokens: int | None = None) -> Piece:
        """The next `tokens` unprocessed tokens, all of them by default."""
        end = len(self.known) if tokens is None else min(len(self.known), self.done + tokens)
        return Piece(
            request=self.request,
            start=self.done,
            length=end - self.done,
            samples=end == len(self.known),
            history=self.known,
            blocks=self.blocks,
        )


def drive(executor: TorchExecutor, *work: tuple[Driven, int | None]) -> StepResult:
    """One step of the given requests, each with its number of tokens; outputs are recorded."""
    pieces = [driven.piece(tokens) for driven, tokens in work]
    result = executor.execute(Batch(pieces=tuple(pieces)))
    for (driven, _), piece in zip(work, pieces, strict=True):
        driven.done += piece.length
        if piece.samples:
            driven.output.append(result.tokens[driven.request.id])
    return result


def request(name: str, prompt: tuple[int, ...], sampling: SamplingOptions | None = None) -> Request:
    return Request(id=name, prompt=prompt, output_tokens=64, sampling=sampling)


def prompt(seed: int, length: int, vocab: int = 211) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(vocab, (length,), generator=generator).tolist())
