"""One HTTP request in flight: its sequences, their text, and the one waiter to wake.

Runs on the event loop only. The per-token path is `Exchange.accept`; everything else
happens once a request.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import Literal

from tongyun.cloud.engine.protocol import TokenEvent
from tongyun.cloud.gateway.faults import Refused
from tongyun.cloud.gateway.frames import Frames
from tongyun.cloud.gateway.ports import Vocabulary
from tongyun.cloud.gateway.scores import ScoredToken, scored
from tongyun.cloud.gateway.text import TextStream
from tongyun.cloud.sched.request import Finish
from tongyun.errors import RequestError
from tongyun.model.options import SamplingOptions

Kind = Literal["chat.completion", "text_completion"]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request as the engine needs it: token prompts, `n` sequences each."""

    id: str
    kind: Kind
    model: str
    created: int
    prompts: tuple[tuple[int, ...], ...]
    n: int
    output_tokens: tuple[int, ...]
    """The most each prompt's sequences may produce, one entry a prompt."""
    sampling: SamplingOptions
    stops: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    stream: bool = False
    include_usage: bool = False
    echoes: tuple[str, ...] = ()
    """The prompts' texts where they are to be repeated, one a prompt; otherwise none."""
    priority: int = 0
    priority_class: str | None = None

    def sampling_of(self, index: int) -> SamplingOptions:
        """The sampling of one choice: a seeded request's choices differ, and each can be repeated."""
        if self.sampling.seed is None or index == 0:
            return self.sampling
        return replace(self.sampling, seed=self.sampling.seed + index)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)


@dataclass(slots=True)
class Choice:
    """One sequence of a request."""

    index: int
    id: str
    text: TextStream
    parts: list[str] = field(default_factory=list)
    scores: list[ScoredToken] = field(default_factory=list)
    tokens: int = 0
    cached_tokens: int = 0
    finish: str | None = None
    first_s: float = 0.0
    last_s: float = 0.0


class Exchange:
    """The state of one request between its submission and its last byte."""

    def __init__(self, ask: Ask, vocabulary: Vocabulary, arrived_s: float | None = None) -> None:
        """`arrived_s`: when it reached this process, by `time.perf_counter`; now if left out."""
        self.ask, self.vocabulary = ask, vocabulary
        self.choices = [
            Choice(index=i, id=f"{ask.id}-{i}", text=TextStream(vocabulary.bytes_of, ask.stops))
            for i in range(len(ask.prompts) * ask.n)
        ]
        self.frames = (
            Frames(ask.kind, ask.id, ask.created, ask.model, ask.include_usage) if ask.stream else None
        )
        self.arrived_s = time.perf_counter() if arrived_s is None else arrived_s
        self.fault: RequestError | None = None
        self.gone = False
        """The client hung up."""
        self.open = len(self.choices)
        self._out: list[str] = []
        self._wake: asyncio.Future[None] | None = None

    def prompt_of(self, choice: Choice) -> int:
        """Index of the prompt that a choice continues."""
        return choice.index // self.ask.n

    def accept(self, choice: Choice, event: TokenEvent, now_s: float) -> bool:
        """Take one token; true when the sequence is over for the client, whether or not the engine knows."""
        if event.token is None:
            self.fail(
                Refused(
                    503, f"the engine ended the request: {event.error or event.finish}", code="engine_error"
                )
            )
            return True
        before = choice.text.length
        # The token that ends a sequence by itself (end-of-text, a stop token) is counted but not shown.
        piece = choice.text.end() if event.finish is Finish.STOP else choice.text.feed(event.token)
        if event.finish is Finish.LENGTH:
            piece += choice.text.end()
        choice.tokens += 1
        choice.last_s = now_s
        if choice.tokens == 1:
            choice.first_s, choice.cached_tokens = now_s, event.cached_tokens
            piece = self._opening(choice) + piece
        if choice.text.stopped:
            choice.finish = Finish.STOP.value
        elif event.finish is not None:
            choice.finish = event.finish.value
        scores = None if event.score is None else [scored(event.token, event.score, before, self.vocabulary)]
        self._emit(choice, piece, scores)
        return choice.finish is not None

    def _opening(self, choice: Choice) -> str:
        return self.ask.echoes[self.prompt_of(choice)] if self.ask.echoes else ""

    def _emit(self, choice: Choice, piece: str, scores: list[ScoredToken] | None) -> None:
        if choice.finish is not None:
            self.open -= 1
        if self.frames is not None:
            self._out.append(self.frames.chunk(choice.index, piece, choice.finish, scores))
            self.wake()
            return
        choice.parts.append(piece)
        if scores:
            choice.scores += scores
        if self.open == 0:
            self.wake()

    def fail(self, fault: RequestError) -> None:
        """End the request with an error; the first one counts."""
        self.fault = self.fault or fault
        self.wake()

    def hang_up(self) -> None:
        self.gone = True
        self.wake()

    @property
    def over(self) -> bool:
        return self.gone or self.fault is not None or self.open == 0

    def wake(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def turn(self) -> str:
        """Wait until there is something to write or the request is over; returns what to write."""
        while not (self._out or self.over):
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        out = "".join(self._out)
        self._out.clear()
        return out

    def usage(self) -> dict[str, object]:
        """Token counts. A prompt counts once however many sequences continue it."""
        produced = sum(choice.tokens for choice in self.choices)
        cached = sum(choice.cached_tokens for choice in self.choices[:: self.ask.n])
        return {
            "prompt_tokens": self.ask.prompt_tokens,
            "completion_tokens": produced,
            "total_tokens": self.ask.prompt_tokens + produced,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
