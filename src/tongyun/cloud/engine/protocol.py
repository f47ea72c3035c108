"""What the engine's parts say to each other: the two things that differ between the real
engine and the simulated fleet (executor and clock), and what a run of steps reports.

Nothing here knows a tensor, HTTP or a price.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tongyun.cloud.sched.migrate import Traveller
from tongyun.cloud.sched.request import Batch, Finish, Piece, Request


@dataclass(frozen=True, kw_only=True)
class TokenScore:
    """Log-probabilities of one produced token: its own, and the top alternatives'."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Tokens by request id (only for pieces that sample), and how long the step took."""

    tokens: dict[str, int]
    duration_s: float
    scores: dict[str, TokenScore] | None = None
    joules: float | None = None
    chip_s: float | None = None
    """Simulated seconds of the step on a chip that is software; the duration is the simulator's own."""
    further: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Tokens after the first, by request id: of pieces whose drafts were right, at most `Piece.drafts`."""


class Executor(Protocol):
    """Runs one batch. The PyTorch one measures its duration, the simulated one asks the price door.

    It keeps no state of a request but its KV blocks: everything else (history, sampling
    options) comes with the piece, so that a preempted request can start over.
    """

    def execute(self, batch: Batch) -> StepResult: ...


@runtime_checkable
class Verifies(Protocol):
    """An executor that drafts tokens and verifies them: one that heeds `Piece.drafts`."""

    def accepted(self, piece: Piece) -> int:
        """How many of the piece's drafts are right."""


@runtime_checkable
class Foresight(Protocol):
    """An executor that can tell beforehand what decoding steps will take and yield."""

    def coming_s(self, sequences: int, context_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """Seconds of each of the next steps, in which so many decode behind these tokens in all, [steps].

        Exactly what `execute` would report, one step after the other.
        """

    def beside(self, decoding: int, context_tokens: int, pieces: Sequence[Piece]) -> StepResult:
        """A step of these pieces of prompts beside so many requests that decode behind these tokens in all.

        As `execute` would report it, with tokens of the given pieces only.
        """

    def path(self, request: Request, known: int, drafts: int) -> NDArray[np.int64]:
        """Tokens known before each step of a request from `known` on, so many drafts verified in each, and
        its limit."""

    def went(self, steps: int) -> None:
        """So many of the steps told last have been taken."""

    def new_tokens(self, request: Request, known: int, count: int) -> Sequence[int]:
        """The next `count` tokens of a request of which `known` are known, prompt included."""


@runtime_checkable
class Portable(Protocol):
    """An executor whose KV blocks can be taken elsewhere, between two steps."""

    @property
    def block_bytes(self) -> int:
        """Of one block, all layers."""

    def read_blocks(self, blocks: Sequence[int], out: memoryview) -> None:
        """Write their contents to `out`, which has exactly their bytes."""

    def write_blocks(self, blocks: Sequence[int], contents: memoryview) -> None:
        """Give as many blocks the contents that were read elsewhere."""


@runtime_checkable
class Advances(Protocol):
    """An executor that can be seen to go on within a step."""

    @property
    def layers(self) -> int:
        """Layers begun since the start, in all steps."""


class Clock(Protocol):
    """Wall or virtual time, in seconds from an arbitrary start."""

    def now(self) -> float: ...

    def wait_until(self, moment_s: float) -> None: ...


class TokenEvent(NamedTuple):
    """What one step did to one request: a token, its end, or both.

    A token that ended the request by itself (end-of-text, a stop token) is reported with
    `finish=STOP`; whether to show it is the reader's choice. An abort and an error carry
    no token. `cached_tokens` is how much of the prompt came from the prefix cache.
    """

    request_id: str
    token: int | None
    moment_s: float
    """The engine's clock when the step ended."""
    finish: Finish | None = None
    score: TokenScore | None = None
    cached_tokens: int = 0
    error: str | None = None


class Stretch(NamedTuple):
    """One step of an engine, or several in a row in which the same requests decode."""

    begin_s: float
    end_s: float
    steps: int
    decoding: int
    context_tokens: int
    """Of those that decode, before the first of the steps."""
    prompt_tokens: int
    """Computed besides, in prompts and in what was preempted."""
    running: int
    waiting: int
    kv_begin: int
    """Blocks that requests hold in the first of the steps; in several, they are taken about evenly."""
    kv_end: int
    """And in the last, those that end with it included."""
    accepted_tokens: int = 0
    """Drafts that were right: tokens besides one a step of each that decodes."""


class Tape(Protocol):
    """Who is told of an engine's steps as they are taken, leaps as they are leapt."""

    def queued(self, request: Request) -> None:
        """A request has been given to the engine."""

    def note(self, stretch: Stretch, pieces: Sequence[Piece], ended: Mapping[str, Finish]) -> None:
        """Steps were taken, these pieces of prompts among others in them, and who ended with the last."""

    def preempted(self, request_id: str, moment_s: float) -> None:
        """A request has given its blocks back and waits again, before the steps noted next."""

    def left(self, request_id: str, moment_s: float) -> None:
        """A request was taken away between two steps."""

    def arrived(self, traveller: Traveller, moment_s: float, decodes: bool) -> None:
        """A request that left another engine goes on here; it decodes at once, or waits."""

    def turned(self, up: bool, moment_s: float) -> None:
        """From now on the engine is given requests, or is not."""

    def moved(self, begin_s: float, end_s: float, standing: bool) -> None:
        """Experts went to other ranks in that time; steps stood still for it, or went on."""


@dataclass(frozen=True, kw_only=True)
class Switched:
    """Changes to one model, on an instance that several share."""

    count: int = 0
    """Times it came to work after another."""
    loads: int = 0
    """Times its weights came from host memory."""
    seconds: float = 0.0
    """In which the instance waited for its bytes, and for the room they need."""
    in_bytes: float = 0.0
    """Weights and KV blocks that came, on one rank."""
    out_bytes: float = 0.0
    """KV blocks of others that went to host memory."""

    def plus(
        self,
        *,
        count: float = 0,
        loads: float = 0,
        seconds: float = 0,
        in_bytes: float = 0,
        out_bytes: float = 0,
    ) -> Switched:
        """With so much more."""
        return Switched(
            count=self.count + int(count),
            loads=self.loads + int(loads),
            seconds=self.seconds + seconds,
            in_bytes=self.in_bytes + in_bytes,
            out_bytes=self.out_bytes + out_bytes,
        )


def total(parts: Iterable[Switched]) -> Switched:
    """Sums."""
    whole = Switched()
    for one in parts:
        whole = whole.plus(
            count=one.count,
            loads=one.loads,
            seconds=one.seconds,
            in_bytes=one.in_bytes,
            out_bytes=one.out_bytes,
        )
    return whole


PAUSES_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Bounds by which `MoveStats` counts."""


@dataclass(frozen=True, kw_only=True)
class MoveStats:
    """Requests that were moved between engines since the start, in the words of `cloud.migration.Move`."""

    outcomes: Mapping[str, int]
    nbytes: int
    """Keys and values copied, those of moves called off included."""
    downtime_s: float
    """Of those migrated, summed: from the end of a request's last step to the beginning of its next."""
    downtimes: tuple[int, ...]
    """How many of these lasted no longer than each of `PAUSES_S`, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class ReplicaStats:
    """One of several engines behind a gateway."""

    up: bool
    restarts: Mapping[str, int] = field(default_factory=dict)
    """Times that it was started again, by why (`keeper.REASONS`)."""


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Gauges of this moment and counters since the start."""

    running: int
    waiting: int
    kv_blocks_total: int
    kv_blocks_used: int
    """Blocks that some request holds now."""
    kv_blocks_cached: int
    """Blocks nobody holds whose contents may still be reused; they count as free."""
    prompt_tokens: int
    """Prompt tokens of admitted requests, cached ones included."""
    prefix_hit_tokens: int
    computed_tokens: int
    output_tokens: int
    preemptions: int
    steps: int
    busy_s: float
    """Seconds spent inside steps."""
    finished: dict[Finish, int]
    chip_s: float = 0.0
    """Simulated seconds on a chip that is software; zero where the engine's steps are measured."""
    chip_joules: float = 0.0
    """And the joules, simulated as well."""
    verifications: int = 0
    """Times a request had drafts verified in a step."""
    accepted_tokens: int = 0
    """Output tokens that were drafts."""
    tier_hit_tokens: tuple[int, ...] = ()
    """Those of the prefix hits that lay in each memory behind the cache, the fastest first."""
    switched: Mapping[str, Switched] = field(default_factory=dict)
    """By model, where several share the engine."""
    moves: MoveStats | None = None
    """Of several engines whose running requests move."""
    replicas: tuple[ReplicaStats, ...] = ()
    """Of several engines behind one gateway, each."""


def summed(parts: Sequence[EngineStats]) -> EngineStats:
    """Of several engines together; there must be one."""
    apart = ("finished", "tier_hit_tokens", "switched", "moves", "replicas")
    numbers = {
        one.name: sum(getattr(part, one.name) for part in parts)
        for one in fields(EngineStats)
        if one.name not in apart
    }
    finished: Counter[Finish] = Counter()
    for part in parts:
        finished.update(part.finished)
    names = dict.fromkeys(name for part in parts for name in part.switched)
    return EngineStats(
        **numbers,
        finished=dict(finished),
        tier_hit_tokens=tuple(map(sum, zip(*(part.tier_hit_tokens for part in parts), strict=True))),
        switched={
            name: total(part.switched[name] for part in parts if name in part.switched) for name in names
        },
    )
