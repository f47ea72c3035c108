"""What the scheduler is given and what it hands out.

A `Request` never changes. A `Batch` is one step's work: pieces of requests, each a
run of consecutive tokens whose keys and values go to the listed blocks. A piece looks
at the scheduler's live lists instead of copying them, so it is valid until the batch
is committed and must be copied by whoever wants to keep it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple


class Finish(StrEnum):
    """Why a request ended, in OpenAI's words plus our own."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One generation. `output_tokens` is the most it may produce.

    The scheduler reads the first six fields only. `sampling` is opaque to everybody
    but the executor; the loop ends a request when it produces an end-of-text token
    (unless `ignore_eos`) or one of `stop_token_ids`.
    """

    id: str
    prompt: Sequence[int]
    output_tokens: int
    arrival_s: float = 0.0
    priority: int = 0
    """Higher runs first and is preempted last."""
    handed_tokens: int = 0
    """Tokens of the prompt whose keys and values come with the request, from an engine that prefilled it."""
    sampling: object | None = None
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    model: str | None = None
    """Which model it is for, where a fleet has several."""
    priority_class: str | None = None
    """The name of its class of service, for who reports by class; `priority` is what the scheduler reads."""
    keys: dict[int, list[bytes]] | None = field(default=None, compare=False, repr=False)
    """By tokens of a block, keys of the prompt's first blocks (see `prefix`). An engine that names more adds
    them, so that one after it, whose prompt begins alike, need not; never for two engines at a time."""


class Piece(NamedTuple):
    """Tokens `start … start+length` of one request, computed in one step.

    `samples` says that the last of them is the newest known token of the request, so
    that the step yields its successor. `history` is every token known so far (the prompt,
    then what was produced; penalties and seeded sampling need it, and a recomputed request
    has it from the first step). `blocks` lists the request's KV blocks in order, long
    enough to hold every token up to the piece's end. Both are live: read, never changed.
    """

    request: Request
    start: int
    length: int
    samples: bool
    history: Sequence[int]
    blocks: Sequence[int]
    cached_tokens: int = 0
    """How much of the prompt was found in the prefix cache when the request was admitted."""
    restored: Sequence[int] = ()
    """Blocks to bring back from each lower tier before the piece can be computed."""
    drafts: int = 0
    """Drafted tokens that are verified behind the piece; `blocks` hold those before the output limit."""

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def tokens(self) -> Sequence[int]:
        """The tokens to feed, `length` of them."""
        return self.history[self.start : self.start + self.length]


class Batch(NamedTuple):
    """One step: decode pieces (one known token each) first, then prefill chunks, in scheduling order."""

    pieces: Sequence[Piece]

    @property
    def tokens(self) -> int:
        """Computed in it, drafts included."""
        return sum(piece.length + piece.drafts for piece in self.pieces)
