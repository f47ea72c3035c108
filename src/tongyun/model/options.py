"""How a request wants its tokens drawn, and which wishes make sense.

Apart from the drawing itself, so that a server's front need not load PyTorch to say no.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tongyun.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How one request draws its tokens; the defaults are OpenAI's. Temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or output are divided by it if positive, else multiplied."""
    presence_penalty: float = 0.0
    """Subtracted once from the logits of tokens already produced."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time a token was produced."""
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        _inside("temperature", self.temperature, 0.0, 100.0)
        _inside("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _inside("min_p", self.min_p, 0.0, 1.0)
        _inside("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _inside("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _inside("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _inside("top_logprobs", self.top_logprobs, 0, 20)
        if self.top_k is not None and self.top_k < 1:
            raise RequestError(f"top_k: {self.top_k} is not a whole number ≥ 1", param="top_k")
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def _inside(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise RequestError(f"{name}: {value} is outside {bracket}{low:g}, {high:g}]", param=name)
