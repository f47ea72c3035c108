"""The process that an engine runs in.

What the engine is made of, the caller says with a function that a fresh interpreter can import.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from select import POLLOUT, poll
from threading import Thread
from typing import Any

from tongyun.cloud.engine.apart import Distant, attend, tell
from tongyun.cloud.engine.carry import Carrier, Windows
from tongyun.cloud.engine.cores import given, on
from tongyun.cloud.engine.live import LiveEngine, Sink, Standing
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.pauses import settle
from tongyun.cloud.sched.limits import SchedulerConfig
from tongyun.errors import InputError, ServiceError, TongyunError

Seat = tuple[Windows, int]
"""Memory that engines share, and whose number of them one has."""


Build = Callable[[], EngineLoop]


class EngineProcess:
    """An engine that is being built in a process of its own; `ready` waits for it, `connect` uses it."""

    def __init__(
        self,
        build: Build,
        seat: Seat | None = None,
        *,
        beat_s: float | None = None,
        like: Callable[[SchedulerConfig], Build] | None = None,
    ) -> None:
        """`build` runs there: a function of a module, or a `partial` of one with arguments that pickle. With
        a `seat`, requests move between this engine and the others that share its windows. With `beat_s`
        it gives signs of life that often; `like` tells what builds another with the limits it had."""
        self._build, self._seat, self._beat_s, self._like = build, seat, beat_s, like
        self._cores = given()
        context = multiprocessing.get_context("spawn")
        self._line, there = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_run, args=(there, build, seat, beat_s), name="tongyun-engine", daemon=True
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
        line = self._line if self._beat_s is None else Outbox(self._line)
        return Distant(line, self._limits, self._stats, self._standing, sink)

    def built(self, timeout_s: float) -> bool:
        """Wait for what `ready` has to say; False if time ran out first."""
        return self._line.poll(timeout_s)

    def again(self) -> EngineProcess:
        """Begin another in its place, on the cores that it had; after `ready`."""
        build = self._build if self._like is None else self._like(self._limits)
        # A gateway leaves cores to its engines, and what it starts then would not get them either.
        with on(self._cores):
            return EngineProcess(build, self._seat, beat_s=self._beat_s, like=self._like)

    def kill(self) -> str:
        """End the process whatever it does; returns how it ended, by this or before."""
        # A stopped process keeps any other signal for later.
        self._process.kill()
        self._process.join()
        return told(self._process.exitcode)

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


AT_ONCE_BYTES = 32 * 2**10
"""A local socket takes so much where it has room at all: that means three quarters of 208 KiB on Linux."""


class Outbox:
    """The near end of a line at which nobody waits to be heard.

    What an engine that hangs does not read fills the line up, and who speaks holds a lock that those
    need who have to do with the others. Where there is room words go at once: a thread would have to
    wait for its turn at the interpreter.
    """

    def __init__(self, line: Connection) -> None:
        self._line = line
        self.recv: Callable[[], Any] = line.recv
        self._room = poll()
        self._room.register(line.fileno(), POLLOUT)
        self._later: SimpleQueue[bytes] = SimpleQueue()
        # How much was put off and how much of it is said; each is counted by one thread.
        self._put, self._said = 0, 0
        Thread(target=self._speak, name="tongyun-outbox", daemon=True).start()

    def send(self, item: Any, /) -> None:
        """Say it in turn; None is the last that is said. One thread at a time may call this."""
        words = bytes(ForkingPickler.dumps(item))
        idle = self._put == self._said
        # The last word ends the thread as well.
        if idle and item is not None and len(words) <= AT_ONCE_BYTES and self._room.poll(0):
            self._line.send_bytes(words)
        else:
            self._put += 1
            self._later.put(words)

    def _speak(self) -> None:
        words, last = b"", bytes(ForkingPickler.dumps(None))
        while words != last:
            words = self._later.get()
            # To an end that is gone there is nothing to say, but what is meant for it has to go somewhere.
            with suppress(OSError):
                self._line.send_bytes(words)
            self._said += 1


def told(exit_code: int | None) -> str:
    """How a process ended, in words."""
    if exit_code is None or exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"


def _run(line: Connection, build: Build, seat: Seat | None, beat_s: float | None) -> None:
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
        attend(line, partial(LiveEngine, loop, carrier=carrier), beat_s)
