"""What the gateway needs of an engine and of a tokenizer, and nothing more.

The gateway does not know whether the engine is a thread, a process or a simulated
fleet on a wall clock; tests use an engine of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tongyun.cloud.engine.protocol import TokenScore
from tongyun.cloud.sched.request import Finish


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How one sequence chooses its tokens; the defaults change nothing about the model's distribution."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    top_logprobs: int | None = None
    """Alternatives to report beside each token's own log-probability; `None`: no scores at all."""
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """One sequence to generate."""

    id: str
    prompt: tuple[int, ...]
    output_tokens: int
    sampling: Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """One token of one sequence. `finish` is set on the last; an aborted sequence ends without a token."""

    id: str
    token: int | None
    finish: Finish | None = None
    score: TokenScore | None = None
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache; known from the sequence's first token on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """What the engine is busy with, read at any moment from any thread."""

    waiting: int
    running: int
    blocks: int
    blocks_used: int


Deliver = Callable[[Sequence[Token]], None]


class Engine(Protocol):
    """Generates tokens. Every method may be called from any thread and returns at once, save `close`."""

    def start(self, deliver: Deliver) -> None:
        """Begin; `deliver` is called once a step, from the engine's own thread."""

    def submit(self, submission: Submission) -> None:
        """Queue a sequence; `RequestError` where it can never fit."""

    def abort(self, sequence_id: str) -> None:
        """Forget a sequence and free its blocks; an unknown or ended one is no error."""

    def stats(self) -> Stats: ...

    def failure(self) -> BaseException | None:
        """What stopped the engine, `None` while it lives."""

    def close(self) -> None:
        """Stop, and wait for the engine's thread."""


class Tokenizer(Protocol):
    """Text to tokens and back."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`; special tokens are left out."""

    def chat(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> list[int]:
        """Prompt tokens of a conversation, ready for the assistant's turn; `RequestError` if the template refuses."""

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the text; nothing for a special one."""

    def token_name(self, token: int) -> bytes:
        """A token spelled out for log-probabilities: its bytes, or a special one's name."""
