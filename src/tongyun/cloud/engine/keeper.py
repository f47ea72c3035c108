"""Keep replicas alive: see which has ended or hangs, and start another in its place.

One hangs that has work and has given no sign of life for too long. It is killed, and from there on it has
ended like any other: what becomes of its requests is for those to say who are told of ends (`replicas`).
Another begins after a pause that doubles with every failure in a row; after so many of these it stays
away. A start that takes too long is a failure. Knows no request.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tongyun.cloud.engine.live import Sink
from tongyun.cloud.engine.replica import Replica
from tongyun.errors import TongyunError

EXITED, HUNG, UNREADY = "exited", "hung", "unready"
REASONS = (EXITED, HUNG, UNREADY)
"""Why one is started again: it ended, it was silent, or what was started did not become ready."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Upkeep:
    """When a replica is given up, and when another is started."""

    hang_after_s: float = 60.0
    """Of silence. Signs of life come with every layer of a step (`Advances`): only a single operation that
    takes longer than this is mistaken, or a step of an executor that does not count layers."""
    restarts: int = 5
    """In a row; after so many it stays away."""
    first_s: float = 1.0
    """The pause before the first of them."""
    most_s: float = 60.0
    settled_s: float = 60.0
    """Who has been ready for so long has failed for the first time when it fails."""
    start_s: float = 600.0
    """The most that a start may take: models are large, disks slow and kernels compiled."""

    @property
    def beat_s(self) -> float:
        """Between two signs of life, and between two looks for them."""
        return min(1.0, self.hang_after_s / 10)

    @property
    def doubt_s(self) -> float:
        """Of silence, after which new requests go to others: a few beats, well before the end."""
        return min(5.0, self.hang_after_s / 2)

    def pause_s(self, failures: int) -> float:
        """Before the next start, after so many that failed in a row."""
        return min(self.most_s, self.first_s * 2.0**failures)


class Process(Protocol):
    """What an engine runs in (`process.EngineProcess`)."""

    def again(self) -> Process: ...

    def built(self, timeout_s: float) -> bool: ...

    def ready(self) -> object: ...

    def connect(self, sink: Sink) -> Replica: ...

    def kill(self) -> str: ...


class Ward(Protocol):
    """Who gives the engines requests (`replicas.Replicas`)."""

    def engine(self, index: int) -> Replica: ...

    def put(self, index: int, start: Callable[[Sink], Replica]) -> None:
        """Let another take the place of one that has ended, and of whose end all are told."""


class Keeper:
    """Looks after the processes of a ward, each on a thread of its own, from its making to `stop`."""

    def __init__(self, ward: Ward, processes: Sequence[Process], upkeep: Upkeep) -> None:
        """The processes are those of the ward's engines, in the same order."""
        self._ward, self._processes, self._upkeep = ward, list(processes), upkeep
        self.restarts = [Counter[str]() for _ in processes]
        self._silent_s = [0.0] * len(self._processes)
        self._left = [False] * len(self._processes)
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._keep, args=(index,), name="tongyun-keeper", daemon=True)
            for index in range(len(self._processes))
        ]

    def start(self) -> None:
        """Begin to look after them, once the ward has them all."""
        for thread in self._threads:
            thread.start()

    def doubted(self, index: int) -> bool:
        """Whether one has been silent for longer than is usual."""
        return self._silent_s[index] >= self._upkeep.doubt_s

    @property
    def hopeful(self) -> bool:
        """Whether one that has ended is still to come again."""
        return self._upkeep.restarts > 0 and not all(self._left)

    def stop(self, grace_s: float) -> threading.Timer:
        """Start nothing more, and kill who has not ended after a time, unless the timer is cancelled."""
        self._closing.set()
        for thread in self._threads:
            thread.join()
        last = threading.Timer(grace_s, lambda: [process.kill() for process in self._processes])
        last.daemon = True
        last.start()
        return last

    def _keep(self, index: int) -> None:
        failures = 0
        while True:
            begun_s = time.monotonic()
            reason = self._watch(index)
            if reason is None:
                return
            if time.monotonic() - begun_s >= self._upkeep.settled_s:
                failures = 0
            self._bury(index, reason)
            while reason is not None:
                if failures >= self._upkeep.restarts:
                    self._leave(index, failures)
                    return
                pause_s = self._upkeep.pause_s(failures)
                failures += 1
                _log.warning(
                    "replica %d is started again in %g s, attempt %d of %d",
                    *(index, pause_s, failures, self._upkeep.restarts),
                )
                if self._closing.wait(pause_s):
                    return
                self.restarts[index][reason] += 1
                reason = self._revive(index)

    def _watch(self, index: int) -> str | None:
        """Wait until one has ended or hangs, and say which; None where all end."""
        engine, beat_s = self._ward.engine(index), self._upkeep.beat_s
        seen, last_s = engine.signs, time.monotonic()
        self._silent_s[index] = 0.0
        while not self._closing.wait(min(beat_s, 0.25)):
            if engine.failure is not None:
                return EXITED
            now_s = time.monotonic()
            if engine.signs != seen or not engine.awaited:
                seen, self._silent_s[index] = engine.signs, 0.0
            else:
                # A gateway that was stopped itself has heard nobody meanwhile.
                self._silent_s[index] += min(now_s - last_s, beat_s)
            last_s = now_s
            if self._silent_s[index] >= self._upkeep.hang_after_s:
                return HUNG
        return None

    def _bury(self, index: int, reason: str) -> None:
        """See to it that one has ended, and that all who had to do with it know."""
        if reason == HUNG:
            _log.error(
                "replica %d has given no sign of life for %g s: killed", index, self._upkeep.hang_after_s
            )
        how, engine = self._processes[index].kill(), self._ward.engine(index)
        engine.outlive()
        engine.close()
        if reason == EXITED:
            _log.error("replica %d has ended: %s (%s)", index, engine.failure, how)

    def _leave(self, index: int, failures: int) -> None:
        self._left[index] = True
        _log.error("replica %d is not started again: %d restarts in a row have failed", index, failures)

    def _revive(self, index: int) -> str | None:
        """Start another; why it is to be tried again, None where it takes requests or all end."""
        begun_s = time.monotonic()
        try:
            process = self._processes[index].again()
        # Of the operating system: too many processes, or no memory for one more.
        except OSError as error:
            return self._unready(index, str(error))
        while not process.built(0.1):
            if self._closing.is_set():
                process.kill()
                return None
            if time.monotonic() - begun_s > self._upkeep.start_s:
                process.kill()
                return self._unready(index, f"not ready after {self._upkeep.start_s:g} s")
        try:
            process.ready()
        except TongyunError as error:
            process.kill()
            return self._unready(index, str(error))
        self._processes[index] = process
        self._ward.put(index, process.connect)
        _log.warning("replica %d takes requests again, %.1f s later", index, time.monotonic() - begun_s)
        return None

    @staticmethod
    def _unready(index: int, why: str) -> str:
        _log.error("replica %d did not start: %s", index, why)
        return UNREADY
