"""Run the engine in a thread of its own and report its tokens.

The thread owns scheduler and executor; everybody else speaks to it through a queue.
It knows no HTTP and no text. One call of `on_events` per step, made on the engine's
thread, carries the events of all requests: an asyncio server hands the whole tuple
over with a single `call_soon_threadsafe`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tongyun.cloud.engine.protocol import EngineStats, TokenEvent
from tongyun.cloud.sched.request import Request

Sink = Callable[[Sequence[TokenEvent]], None]


class LiveEngine:
    """A running engine. Every method may be called from any thread."""

    def submit(self, request: Request) -> None:
        """Queue a request; RequestError at once if it can never run, ServiceError when draining."""
        raise NotImplementedError

    def abort(self, request_id: str) -> None:
        """End a request and free its blocks before the next step; unknown ids are ignored."""
        raise NotImplementedError

    def stats(self) -> EngineStats:
        """The state after the latest step."""
        raise NotImplementedError

    def drain(self, timeout_s: float | None = None) -> bool:
        """Refuse new requests and wait for those in flight; False if time ran out first."""
        raise NotImplementedError

    def close(self) -> None:
        """Abort what is left and end the thread."""
        raise NotImplementedError
