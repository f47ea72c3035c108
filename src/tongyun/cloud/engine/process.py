"""The process that an engine runs in.

What the engine is made of, the caller says with a function that a fresh interpreter can import.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from tongyun.cloud.engine.apart import Distant, attend, tell
from tongyun.cloud.engine.carry import Carrier, Windows
from tongyun.cloud.engine.live import LiveEngine, Sink, Standing
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.pauses import settle
from tongyun.cloud.sched.limits import SchedulerConfig
from tongyun.errors import InputError, ServiceError, TongyunError

Seat = tuple[Windows, int]
"""Memory that engines share, and whose number of them one has."""


class EngineProcess:
    """An engine that is being built in a process of its own; `ready` waits for it, `connect` uses it."""

    def __init__(self, build: Callable[[], EngineLoop], seat: Seat | None = None) -> None:
        """`build` runs there: a function of a module, or a `partial` of one with arguments that pickle. With
        a `seat`, requests move between this engine and the others that share its windows."""
        context = multiprocessing.get_context("spawn")
        self._line, there = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_run, args=(there, build, seat), name="tongyun-engine", daemon=True
        )
        self._process.start()
        # Ours alone keeps the line open: where the engine dies, we read its end.
        there.close()

    def ready(self) -> SchedulerConfig:
        """The limits of the engine, once it is built; what was wrong with it is raised here."""
        try:
            first, *rest = self._line.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            raise ServiceError(f"the engine's process ended with {code} before it was ready") from None
        if isinstance(first, int):
            raise InputError(*rest) if first == InputError.exit_code else ServiceError(*rest)
        limits: SchedulerConfig = first
        self._limits, (self._stats, self._standing) = limits, rest
        return limits

    def connect(self, sink: Sink) -> Distant:
        """The engine, whose events go to `sink`; once, after `ready`."""
        return Distant(self._line, self._limits, self._stats, self._standing, sink)

    @property
    def pid(self) -> int:
        """Of the operating system."""
        assert self._process.pid is not None
        return self._process.pid

    def ended(self, timeout_s: float) -> bool:
        """Wait for the process's end; False if time ran out first."""
        self._process.join(timeout_s)
        return not self._process.is_alive()

    def close(self) -> None:
        """End the process of an engine that nobody connected to."""
        self._line.close()
        self._process.terminate()
        self._process.join()


def _run(line: Connection, build: Callable[[], EngineLoop], seat: Seat | None) -> None:
    """The life of an engine's process: build it or say why not, then attend."""
    # Ctrl-C reaches every process of a terminal; the gateway says when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        loop = build()
        carrier = None if seat is None else Carrier(loop, *seat)
    except TongyunError as error:
        tell(line, (error.exit_code, str(error)))
        return
    settle()
    if tell(line, (loop.scheduler.config, loop.stats(), Standing(loop.room(), 0))):
        attend(line, partial(LiveEngine, loop, carrier=carrier))
