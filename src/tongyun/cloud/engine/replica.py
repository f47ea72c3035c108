"""One of several engines behind a gateway, to who gives it requests and to who looks after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from tongyun.cloud.engine.letters import Down, Up
from tongyun.cloud.engine.protocol import EngineStats
from tongyun.cloud.sched.freeness import Room
from tongyun.cloud.sched.migrate import Movable, Traveller
from tongyun.cloud.sched.request import Request


class Replica(Protocol):
    """`apart.Distant` is one, and says what each of these is."""

    def submit(self, request: Request) -> None: ...

    def resume(self, traveller: Traveller) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def stats(self) -> EngineStats: ...

    def room(self) -> Room: ...

    def tell(self, letter: Down) -> None: ...

    reads: Callable[[Sequence[Up]], None] | None

    @property
    def head(self) -> Movable | None: ...

    @property
    def failure(self) -> BaseException | None: ...

    def outlive(self) -> None: ...

    def close(self) -> None: ...

    signs: int

    @property
    def awaited(self) -> bool: ...
