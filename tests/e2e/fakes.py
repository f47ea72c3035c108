"""An engine whose tokens and times are known in advance, and a tokenizer of bytes.

The fake repeats the prompt from its start, one token a step, so every request has an
answer of its own and a mix-up between requests shows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tongyun.cloud.engine.protocol import EngineStats, TokenEvent, TokenScore
from tongyun.cloud.gateway.ask import Served
from tongyun.cloud.gateway.ports import Sink
from tongyun.cloud.sched.request import Finish, Request
from tongyun.errors import RequestError
from tongyun.model.sampling import SamplingOptions

EOS = 256
VOCAB = 300
BLOCK = 16


class ByteTokenizer:
    """Token i is byte i; 256 ends a text and 257 opens a turn."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.bytes_of, tokens)).decode(errors="replace")

    def chat(self, messages: Sequence[Mapping[str, Any]], **template: Any) -> list[int]:
        if messages[-1]["role"] == "assistant":
            raise RequestError("the last message is the assistant's", param="messages")
        return [token for m in messages for token in (257, *self.encode(f"{m['role']}:{m['content']}"), EOS)]

    def bytes_of(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def name_of(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else f"<{token}>".encode()


@dataclass
class _Running:
    request: Request
    first_s: float
    cached: int
    produced: int = 0


def repeat_prompt(request: Request, at: int) -> int:
    """The answer's token number `at`: the prompt from its start, over and over."""
    return request.prompt[at % len(request.prompt)]


@dataclass
class FakeEngine:
    """Steps every `tpot_s`; a request's first token comes `ttft_s` after its submission."""

    sink: Sink
    ttft_s: float = 0.0
    tpot_s: float = 0.001
    answer: Callable[[Request, int], int] = repeat_prompt
    capacity: int = 100_000
    running: dict[str, _Running] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    submitted: list[Request] = field(default_factory=list)
    failure: BaseException | None = None

    def __post_init__(self) -> None:
        self._seen: set[tuple[int, ...]] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._run, name="fake-engine")
        self.thread.start()

    def submit(self, request: Request) -> None:
        if len(request.prompt) + request.output_tokens > self.capacity:
            raise RequestError("more KV blocks than there are", code="context_length_exceeded")
        prompt = tuple(request.prompt)
        with self._lock:
            cached = (len(prompt) - 1) // BLOCK * BLOCK if prompt in self._seen else 0
            self._seen.add(prompt)
            self.submitted.append(request)
            self.running[request.id] = _Running(request, time.perf_counter() + self.ttft_s, cached)

    def abort(self, request_id: str) -> None:
        with self._lock:
            if self.running.pop(request_id, None) is not None:
                self.aborted.append(request_id)

    def stats(self) -> EngineStats:
        with self._lock:
            used = sum(-(-(len(r.request.prompt) + r.produced) // BLOCK) for r in self.running.values())
            running = len(self.running)
        return EngineStats(
            running=running,
            waiting=0,
            kv_blocks_total=1000,
            kv_blocks_used=used,
            kv_blocks_cached=0,
            prompt_tokens=sum(len(r.prompt) for r in self.submitted),
            prefix_hit_tokens=0,
            computed_tokens=0,
            output_tokens=0,
            preemptions=0,
            steps=0,
            busy_s=0.0,
            finished={},
        )

    def close(self) -> None:
        self._stop.set()
        self.thread.join()

    def fail(self, why: str) -> None:
        """End as an engine does whose executor raised."""
        with self._lock:
            self.failure = RuntimeError(why)
            events = [
                TokenEvent(id, None, time.perf_counter(), finish=Finish.ERROR, error=why)
                for id in self.running
            ]
            self.running.clear()
        self.sink(events)

    def _run(self) -> None:
        due = time.perf_counter()
        while not self._stop.is_set():
            events = self._step()
            if events:
                self.sink(events)
            due = max(due + self.tpot_s, time.perf_counter() - self.tpot_s)
            self._stop.wait(max(0.0, due - time.perf_counter()))

    def _step(self) -> list[TokenEvent]:
        now, events = time.perf_counter(), []
        with self._lock:
            for running in list(self.running.values()):
                if now >= running.first_s:
                    events.append(self._token(running, now))
                    if events[-1].finish is not None:
                        del self.running[running.request.id]
        return events

    def _token(self, running: _Running, now: float) -> TokenEvent:
        request, at = running.request, running.produced
        token = self.answer(request, at)
        running.produced += 1
        finish = None
        if (token == EOS and not request.ignore_eos) or token in request.stop_token_ids:
            finish = Finish.STOP
        elif running.produced == request.output_tokens:
            finish = Finish.LENGTH
        score = None
        sampling = request.sampling
        if isinstance(sampling, SamplingOptions) and sampling.logprobs:
            top = tuple((token + i, -0.5 - i) for i in range(sampling.top_logprobs))
            score = TokenScore(logprob=-0.5, top=top)
        return TokenEvent(request.id, token, now, finish, score, running.cached)


def served(*names: str, context_tokens: int = 4096) -> Served:
    return Served(
        names=names or ("fake",),
        context_tokens=context_tokens,
        vocab=VOCAB,
        vocabulary=ByteTokenizer(),
        tokenizer=ByteTokenizer(),
        created=1_700_000_000,
    )
