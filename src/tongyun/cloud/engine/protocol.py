"""The two things that differ between the real engine and the simulated fleet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tongyun.cloud.sched.request import Batch


@dataclass(frozen=True, kw_only=True)
class TokenScore:
    """Log-probabilities of one produced token: its own, and the top alternatives'."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Tokens by request id (only for pieces that sample), and how long the step took."""

    tokens: dict[str, int]
    duration_s: float
    scores: dict[str, TokenScore] | None = None


class Executor(Protocol):
    """Runs one batch. The PyTorch one measures its duration, the simulated one asks the price door."""

    def execute(self, batch: Batch) -> StepResult: ...


class Clock(Protocol):
    """Wall or virtual time, in seconds from an arbitrary start."""

    def now(self) -> float: ...

    def wait_until(self, moment_s: float) -> None: ...
