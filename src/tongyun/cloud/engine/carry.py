"""Give the keys and values of a running request to another engine, and take those of one that comes.

Both ends of a move as one engine has them, between two of its steps. Full blocks go first, a slice of
at most `SLICE_BYTES` after each step, while the request decodes on; the rest goes when it leaves, and the
target decodes from the next step on. Blocks are kept at the target before anything is copied; they
go back to those who run there when these need them, and the request then stays, or is computed again.
What is said about it goes through the gateway (`letters`), the blocks themselves do not. Knows no policy.
"""

from __future__ import annotations

import ctypes
import multiprocessing
from dataclasses import dataclass

from tongyun.cloud.engine.letters import (
    Arrive,
    Departed,
    Down,
    Expect,
    Give,
    Landed,
    Ready,
    Refused,
    Release,
    Slice,
    Stay,
    Stayed,
    Taken,
    Up,
)
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.protocol import Portable
from tongyun.errors import InputError

SLICE_BYTES = 4 * 2**20
"""About a millisecond of copying at either end; a block that is larger goes alone."""
SLOTS = 2
"""One is filled while the other is read."""


class Windows:
    """Memory that all engines of a machine see: each writes slices into its own, and the others read them."""

    def __init__(self, engines: int, block_bytes: int) -> None:
        """`block_bytes`: of the largest block that has to pass."""
        self.slot_bytes = max(SLICE_BYTES, block_bytes)
        # Without a name, so that nothing is left behind however the processes end.
        context = multiprocessing.get_context("spawn")
        self._memory = context.RawArray(ctypes.c_ubyte, engines * SLOTS * self.slot_bytes)

    def slot(self, engine: int, index: int, nbytes: int) -> memoryview:
        """So many bytes of one engine's slot."""
        begin = (engine * SLOTS + index) * self.slot_bytes
        return memoryview(self._memory).cast("B")[begin : begin + nbytes]


@dataclass
class _Giving:
    """A request that is copied while it decodes here."""

    asked: Give
    granted: int
    """Blocks that the target keeps for it."""
    copied: int = 0
    """Blocks of it that were sent."""
    stages: int = 0
    """Times that all full blocks had been sent."""
    sent: int = 0
    taken: int = 0
    """Slices."""


class Carrier:
    """An engine's part in moves. Called by whoever owns the loop, between two steps."""

    def __init__(self, loop: EngineLoop, windows: Windows, engine: int) -> None:
        """`engine` is its number among those that share the windows."""
        if not isinstance(loop.executor, Portable):
            raise InputError(
                f"{type(loop.executor).__name__} keeps keys and values to itself: nothing can move"
            )
        self._loop, self._pages, self._windows, self._engine = loop, loop.executor, windows, engine
        self._slice_blocks = windows.slot_bytes // self._pages.block_bytes
        if not self._slice_blocks:
            raise InputError(
                f"a KV block of {self._pages.block_bytes} bytes does not fit a slot of {windows.slot_bytes}"
            )
        self._giving: dict[int, _Giving] = {}
        self._taking: dict[int, str] = {}
        self._letters: list[Up] = []

    def collect(self) -> list[Up]:
        """What there is to say since the last call."""
        letters, self._letters = self._letters, []
        return letters

    def tell(self, letter: Down) -> None:
        """What was said to this engine."""
        match letter:
            case Expect():
                self._expect(letter)
            case Slice():
                self._take(letter)
            case Arrive():
                self._arrive(letter)
            case Release():
                self._release(letter.move)
            case Give():
                self._give(letter)
            case Taken():
                if (giving := self._giving.get(letter.move)) is not None:
                    giving.taken, giving.granted = giving.taken + 1, letter.granted
            case Stay():
                self._giving.pop(letter.move, None)

    def clear(self) -> None:
        """Keep nothing for anybody: the engine ends."""
        self._giving.clear()
        for move in list(self._taking):
            self._release(move)

    # ── to another ───────────────────────────────────────────────────────────────────

    def work(self) -> None:
        """Go on with what is given, right after a step."""
        for giving in list(self._giving.values()):
            self._go_on(giving)

    def _give(self, asked: Give) -> None:
        one = self._loop.scheduler.movable(asked.request_id)
        if one is None:
            self._letters.append(Stayed(asked.move))
            return
        self._giving[asked.move] = giving = _Giving(asked, asked.granted)
        if not one.decoding:
            # The next step may admit it.
            self._depart(giving, 0, self._loop.clock.now())

    def _go_on(self, giving: _Giving) -> None:
        one = self._loop.scheduler.movable(giving.asked.request_id)
        if one is None:
            del self._giving[giving.asked.move]
            self._letters.append(Stayed(giving.asked.move))
            return
        if not one.decoding:
            self._depart(giving, 0, self._loop.clock.now())
            return
        block_tokens, computed = self._loop.scheduler.config.block_tokens, one.tokens - 1
        full, rest = computed // block_tokens - giving.copied, computed - giving.copied * block_tokens
        wanted = -(-(one.tokens + 1) // block_tokens)
        last = -(-rest // block_tokens)
        if self._may_leave(giving, full, rest) and wanted <= giving.granted and last <= self._slice_blocks:
            self._depart(giving, last, self._loop.clock.now())
        elif full and giving.sent - giving.taken < SLOTS:
            count = min(full, self._slice_blocks)
            self._letters.append(self._slice(giving, count, wanted + 1))
            giving.stages += count == full
        elif wanted > giving.granted and giving.sent == giving.taken:
            self._letters.append(self._slice(giving, 0, wanted + 1))

    @staticmethod
    def _may_leave(giving: _Giving, full: int, rest: int) -> bool:
        """Whether all that was sent is in place, and little or no time is left for more."""
        little = not full or rest <= giving.asked.last_tokens or giving.stages >= giving.asked.stages
        return little and giving.sent == giving.taken

    def _slice(self, giving: _Giving, count: int, wanted: int) -> Slice:
        """The next blocks, in the window."""
        first, slot = giving.copied, giving.sent % SLOTS
        nbytes = count * self._pages.block_bytes
        if count:
            blocks = self._loop.scheduler.held(giving.asked.request_id)[first : first + count]
            self._pages.read_blocks(blocks, self._windows.slot(self._engine, slot, nbytes))
        giving.copied, giving.sent = first + count, giving.sent + 1
        return Slice(giving.asked.move, self._engine, slot, first, count, nbytes, wanted)

    def _depart(self, giving: _Giving, blocks: int, moment_s: float) -> None:
        """Let the request go, with so many blocks that were not sent yet."""
        last = self._slice(giving, blocks, giving.granted) if blocks else None
        traveller = self._loop.depart(giving.asked.request_id)
        del self._giving[giving.asked.move]
        self._letters.append(Departed(giving.asked.move, traveller, last, moment_s))

    # ── from another ─────────────────────────────────────────────────────────────────

    def _expect(self, letter: Expect) -> None:
        if not self._loop.scheduler.reserve(letter.request_id, letter.blocks):
            self._letters.append(Refused(letter.move, f"no room for {letter.blocks} blocks"))
            return
        self._taking[letter.move] = letter.request_id
        self._letters.append(Ready(letter.move, letter.blocks))

    def _take(self, letter: Slice) -> None:
        name = self._taking.get(letter.move)
        if name is None:
            return
        why = self._copy(letter, name)
        if why is None and not self._loop.scheduler.reserve(name, letter.wanted):
            why = f"no room for {letter.wanted} blocks"
        if why is None:
            self._letters.append(Taken(letter.move, len(self._loop.scheduler.reserved(name))))
        else:
            self._release(letter.move)
            self._letters.append(Refused(letter.move, why))

    def _copy(self, letter: Slice, name: str) -> str | None:
        """Bring a slice to the blocks that are kept for it; why not, where it has no place there."""
        kept = self._loop.scheduler.reserved(name)
        if not kept:
            return "its blocks went to those who run here"
        if letter.nbytes != letter.blocks * self._pages.block_bytes:
            return f"{letter.blocks} blocks are {letter.nbytes} bytes there: another layout"
        blocks = kept[letter.first : letter.first + letter.blocks]
        if len(blocks) < letter.blocks:
            return "fewer blocks are kept than come"
        if blocks:
            self._pages.write_blocks(blocks, self._windows.slot(letter.source, letter.slot, letter.nbytes))
        return None

    def _arrive(self, letter: Arrive) -> None:
        name = letter.traveller.request.id
        if letter.last is not None and self._copy(letter.last, name) is not None:
            self._loop.scheduler.give_up(name)
        decodes = self._loop.arrive(letter.traveller)
        self._taking.pop(letter.move, None)
        self._letters.append(Landed(letter.move, decodes, self._loop.clock.now()))

    def _release(self, move: int) -> None:
        name = self._taking.pop(move, None)
        if name is not None:
            self._loop.scheduler.give_up(name)
