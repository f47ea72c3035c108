"""What is said over an engine's line about a request that moves to another engine while it runs.

All but its keys and values, which lie in memory that every engine sees (`carry.Windows`). With the
source S and the target T of a move, one that goes well is said so:

    Expect → T, Ready ← T, Give → S,
    then as often as there is something to copy: Slice ← S, Slice → T, Taken ← T, Taken → S,
    and at last: Departed ← S, Arrive → T, Landed ← T.

Up to Departed the request is the source's, which may say Stayed instead and be told Stay; from then on
the target's. A target that Refused or is told Release keeps nothing for it any more. Every letter
names its move, so that one that comes late is known as such.
"""

from __future__ import annotations

from typing import NamedTuple

from tongyun.cloud.sched.migrate import Traveller


class Expect(NamedTuple):
    """To the target: keep so many blocks, and a place."""

    move: int
    request_id: str
    blocks: int


class Ready(NamedTuple):
    """From the target: it keeps so many."""

    move: int
    granted: int


class Give(NamedTuple):
    """To the source: copy the request while it decodes on, or let it go at once where it waits."""

    move: int
    request_id: str
    granted: int
    stages: int
    last_tokens: int
    """Both as in `MigrationPolicy`."""


class Slice(NamedTuple):
    """From the source and on to the target: blocks lie in a slot of the source's window."""

    move: int
    source: int
    slot: int
    first: int
    """The first of them, of the request's blocks."""
    blocks: int
    """None, where only more blocks are asked for."""
    nbytes: int
    wanted: int
    """Blocks to keep in all from now on."""


class Taken(NamedTuple):
    """From the target and on to the source: the oldest slice is copied, and so many blocks are kept."""

    move: int
    granted: int


class Departed(NamedTuple):
    """From the source: the request is here no more, its last blocks in a slice."""

    move: int
    traveller: Traveller
    last: Slice | None
    moment_s: float
    """When its last step here had ended."""


class Arrive(NamedTuple):
    """To the target: go on with it."""

    move: int
    traveller: Traveller
    last: Slice | None


class Landed(NamedTuple):
    """From the target: it decodes here; or it waits, where it came or found no blocks."""

    move: int
    decodes: bool
    moment_s: float
    """When its next step began, at the earliest."""


class Stay(NamedTuple):
    """To the source: nothing comes of it."""

    move: int


class Stayed(NamedTuple):
    """From the source: the request has ended, or cannot leave."""

    move: int


class Release(NamedTuple):
    """To the target: nothing comes of it."""

    move: int


class Refused(NamedTuple):
    """From the target: there is no room, or what was kept went to those who run there."""

    move: int
    why: str


Down = Expect | Give | Slice | Taken | Arrive | Stay | Release
Up = Ready | Slice | Taken | Departed | Landed | Stayed | Refused
