"""What the scheduler is given and what it hands out.

A `Request` never changes. A `Batch` is one step's work: pieces of requests, each a
run of consecutive tokens whose keys and values go to the listed blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Finish(StrEnum):
    """Why a request ended, in OpenAI's words plus our own."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One generation. `output_tokens` is the most it may produce."""

    id: str
    prompt: tuple[int, ...]
    output_tokens: int
    arrival_s: float = 0.0
    priority: int = 0


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tokens `start … start+len(tokens)` of one request, computed in one step.

    `samples` says that the last of them is the newest known token of the request, so
    that the step yields its successor. `blocks` lists the request's KV blocks in order,
    long enough to hold every token up to the piece's end.
    """

    request: Request
    start: int
    tokens: tuple[int, ...]
    samples: bool
    blocks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step: prefill and decode pieces mixed, in scheduling order."""

    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        return sum(len(piece.tokens) for piece in self.pieces)
