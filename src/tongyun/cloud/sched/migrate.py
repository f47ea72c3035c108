"""Choose which requests move from one engine to another while they run.

Pure policy over what engines report, in the manner of Llumnix (Sun et al., OSDI 2024): at
intervals, the engines with the least freeness are paired with those that have the most. How a
request is moved, and what that takes, is for others to know.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tongyun.cloud.sched.freeness import Load, freeness
from tongyun.cloud.sched.request import Request


class Movable(NamedTuple):
    """A request that could leave an engine now."""

    id: str
    priority: int
    decoding: bool
    """It has keys and values of all tokens but the last; else it waits and has none."""
    tokens: int
    """Known so far, prompt and output."""
    handed: int = 0
    """Of one that waits: tokens whose keys and values came with it and go where it goes."""


class Traveller(NamedTuple):
    """All that is known of a request between two engines, but for its keys and values."""

    request: Request
    history: array[int]
    computed: int
    """Tokens with keys and values; none of a request that waited."""
    admitted: bool
    cached_tokens: int


@dataclass(frozen=True, kw_only=True)
class MigrationPolicy:
    """When an engine gives and when it takes."""

    interval_s: float = 0.2
    below_steps: float = 32.0
    """An engine with less freeness than this gives."""
    above_steps: float = 128.0
    """An engine with more freeness than this, and nobody waiting, takes."""
    stages: int = 3
    """Copies at most while the request decodes on; the last one, for which it pauses, not among them."""
    last_tokens: int = 16
    """So few tokens left to copy end the stages earlier."""
    headroom: Mapping[str, float] = field(default_factory=dict)
    """Share of an engine's blocks to keep around the requests of a class (see `freeness`)."""

    def pairs(self, loads: Sequence[Load]) -> list[tuple[int, int]]:
        """Engines that give and those that take, the neediest with the freest.

        One that is not up gives all it has.
        """
        frees = [
            freeness(load, self.headroom, whole_queue=False) if load.up else float("-inf") for load in loads
        ]
        order = sorted(range(len(loads)), key=lambda index: (frees[index], index))
        sources = [i for i in order if frees[i] < self.below_steps and loads[i].requests]
        takes = [i for i in reversed(order) if frees[i] > self.above_steps and self._open(loads[i])]
        return list(zip(sources, takes, strict=False))

    def fits(self, one: Movable, source: Load, target: Load) -> bool:
        """Whether the target has room for a request, and is freer with it than the source is now."""
        room = target.room()
        blocks = _blocks(one.tokens + 1, room.block_tokens)
        if room.free_blocks < blocks or not self._open(target):
            return False
        after = freeness(target, self.headroom, whole_queue=False) * max(room.running, 1)
        after = (after - blocks * room.block_tokens) / (room.running + 1)
        now = freeness(source, self.headroom, whole_queue=False)
        return not source.up or after > now

    def choose(self, decoding: Iterable[Movable], source: Load, target: Load) -> Movable | None:
        """Whom to move: the lowest priority, and of these the fewest tokens, so that it is quickly done."""
        fitting = (one for one in decoding if self.fits(one, source, target))
        return min(fitting, key=lambda one: (one.priority, one.tokens, one.id), default=None)

    @staticmethod
    def _open(load: Load) -> bool:
        room = load.room()
        return load.up and not room.waiting and room.places > 0


@dataclass(frozen=True, kw_only=True)
class PromptPolicy:
    """Which waiting prompt goes from one engine that only prefills to another, and when."""

    interval_s: float = 0.2

    def pair(self, loads: Sequence[Load], last: Callable[[int], int | None]) -> tuple[int, int] | None:
        """An engine whose last waiting prompt, of `last` tokens, is computed sooner at another, and that one.

        It is done when all is that its engine has to compute; there, when all that is due and itself
        are. So whoever goes leaves the fuller of both with less, and this comes to an end. One that is not up
        gives all that wait.
        """
        takers = [index for index, load in enumerate(loads) if load.up]
        order = sorted(range(len(loads)), key=lambda i: (loads[i].up, -loads[i].prompt_tokens, i))
        for source in order:
            others = [index for index in takers if index != source]
            target = min(others, key=lambda i: (loads[i].prompt_tokens, i), default=None)
            if target is None or not loads[source].requests:
                continue
            lead = loads[source].prompt_tokens - loads[target].prompt_tokens
            if loads[source].up and lead <= 0:
                return None
            tokens = last(source)
            if tokens is not None and (tokens < lead or not loads[source].up):
                return source, target
        return None


def _blocks(tokens: int, block_tokens: int) -> int:
    return -(-tokens // block_tokens)
