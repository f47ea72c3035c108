"""What the gateway needs of an engine and of a tokenizer, and nothing more.

The gateway does not know whether the engine is a thread, a process or a simulated
fleet on a wall clock; tests use an engine of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from tongyun.cloud.engine.protocol import EngineStats, TokenEvent
from tongyun.cloud.sched.request import Request


class Engine(Protocol):
    """Generates tokens. Every method may be called from any thread; only `close` waits."""

    def submit(self, request: Request) -> None:
        """Queue a sequence; `RequestError` where it can never fit, `ServiceError` when draining."""

    def abort(self, request_id: str) -> None:
        """Forget a sequence and free its blocks; an unknown or ended one is no error."""

    def stats(self) -> EngineStats: ...

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine before its time; `None` while it lives."""

    def close(self) -> None: ...


Sink = Callable[[Sequence[TokenEvent]], None]
"""Called by the engine once a step, from a thread of its own; with no event where it has failed."""

StartEngine = Callable[[Sink], Engine]
"""Begin to run an engine that reports to the given sink."""


class Tokenizer(Protocol):
    """Text to tokens and back."""

    def encode(self, text: str) -> Sequence[int]: ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`; special tokens are left out."""

    def chat(self, messages: Sequence[Mapping[str, Any]], **template: Any) -> Sequence[int]:
        """Prompt of a conversation, ready for the assistant; `RequestError` if the template refuses."""


class Vocabulary(Protocol):
    """Tokens one at a time, cheaply."""

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to the text; nothing for a special one."""

    def name_of(self, token: int) -> bytes:
        """A token spelled out for log-probabilities: its bytes, or a special one's name."""
