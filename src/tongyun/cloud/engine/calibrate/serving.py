"""Measure what serving adds around the engine: the way in, the way out, and who waits for whom.

The real gateway runs in this process over a synthetic tiny model and the real load
generator in another, as they do when a model is served. What comes of it: what a request
takes beyond the engine, how that grows with its prompt, and how much longer a step takes
when it is served.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from tongyun.chip.calibrated import nonnegative
from tongyun.cloud.engine.calibrate import steps
from tongyun.cloud.engine.calibrate.bench import Bench
from tongyun.cloud.engine.live import LiveEngine
from tongyun.cloud.engine.protocol import TokenEvent
from tongyun.cloud.gateway.app import Gateway, build_app
from tongyun.cloud.gateway.ask import Served
from tongyun.cloud.gateway.ports import Sink
from tongyun.cloud.gateway.server import bind
from tongyun.cloud.gateway.server import serving as running
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.load import LoadOptions, measure
from tongyun.cloud.probe import Target
from tongyun.cloud.sched.request import Request
from tongyun.cloud.workload import Arrival, Arrivals, Lengths, Process, Workload, sample
from tongyun.model.config import ModelConfig
from tongyun.model.vocabulary import Vocabulary, byte_characters
from tongyun.specs.samples import OverheadSample

SHORT, LONG = 17, 513
"""Prompt tokens of single requests; lengths that no other request of a round has."""
SINGLES = 16
GAP_S = 0.08
Records = tuple[RequestRecord, ...]


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """An open-loop load: about so many requests stream at a time, each to so many tokens."""

    streams: int
    output: int
    prompt: int
    """Prompt tokens; a length that no other load has tells its requests from others."""


CELLS = (
    _Cell(streams=2, output=64, prompt=32),
    _Cell(streams=5, output=64, prompt=33),
    _Cell(streams=2, output=16, prompt=34),
)
CELL_S = 2.0
AROUND_S = 5e-4
"""What serving about adds to a step: a rate that left it out would flood small models."""
BATCHES = (1, 4, 16)
"""Sequences in the steps that are measured without a server."""
FAR_OFF_S = 0.02
"""A step that waits longer than this waited for something else on the machine."""


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A step at the engine: when its tokens left, how many, and whether it only decoded."""

    ended_s: float
    tokens: int
    decoding: bool
    prompt: int


@dataclass(kw_only=True)
class _Seen:
    """What happened at the engine: when requests came, when first tokens left, what steps ran."""

    came_s: dict[str, tuple[int, float]] = field(default_factory=dict)
    first_s: dict[str, float] = field(default_factory=dict)
    steps: list[_Step] = field(default_factory=list)

    def inside_s(self, prompt: int, count: int) -> float:
        """Mean seconds from queue to first token, of the last `count` prompts of this length."""
        names = [name for name, (length, _) in self.came_s.items() if length == prompt]
        return statistics.fmean(self.first_s[name] - self.came_s[name][1] for name in names[-count:])

    def gaps(self, prompt: int) -> list[tuple[int, float]]:
        """Sequences and seconds since the step before, of steps that only decoded prompts of this length.

        Such a step follows another without a pause: its sequences were in that one.
        """
        return [
            (step.tokens, step.ended_s - before.ended_s)
            for before, step in pairwise(self.steps)
            if step.decoding and step.prompt == prompt
        ]


class _Witnessed(LiveEngine):
    """The live engine, taking note of what passes."""

    seen: _Seen

    def submit(self, request: Request) -> None:
        self.seen.came_s[request.id] = (len(request.prompt), time.perf_counter())
        super().submit(request)


class _Bytes:
    """A tokenizer of bytes: the load sends token ids, so hardly anything is asked of it."""

    def encode(self, text: str) -> Sequence[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token % 256 for token in tokens).decode(errors="replace")

    def chat(self, messages: Sequence[Mapping[str, Any]], **template: Any) -> Sequence[int]:
        return self.encode("".join(str(message["content"]) for message in messages))


def serving(bench: Bench) -> Iterator[OverheadSample]:
    """Seconds of a request's way in and out, of each prompt token on it, and what serving adds to steps."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        # A fresh interpreter: a fork would copy the threads' locks, and a thread would share our GIL.
        rounds = [_round(bench, config, pool) for config in _shapes(bench)]
    found = _ways(rounds) | _slower(rounds)
    yield from (OverheadSample(what=what, count=1, seconds=s) for what, s in found.items() if s > 0)


def _shapes(bench: Bench) -> list[ModelConfig]:
    """Steps of little but overhead, steps of many small operators, and steps of shared products."""
    if bench.quick:
        return [steps.synthetic(1), steps.synthetic(4)]
    return [steps.synthetic(2), steps.synthetic(6, hidden=256, sparse=True), steps.synthetic(4, hidden=512)]


@dataclass(frozen=True, kw_only=True)
class _Round:
    """One synthetic model, served and not."""

    seen: _Seen
    singles: tuple[Records, Records]
    """Short and long prompts, each alone."""
    cells: tuple[tuple[_Cell, Records], ...]
    bare_s: tuple[float, ...]
    """The step of each of `BATCHES` without a server around it."""

    def way_s(self, prompt: int, records: Records) -> float:
        """Mean seconds that first tokens spent outside the engine."""
        felt = [r.ttft_s for r in records if r.ttft_s is not None]
        return statistics.fmean(felt) - self.seen.inside_s(prompt, len(felt))

    def excess(self, cell: _Cell, records: Records) -> tuple[list[float], float, float]:
        """Of a decoding step under a load: counts of what may slow it, what it took more, what it took."""
        gaps = [
            (n, gap - float(np.interp(n, BATCHES, self.bare_s))) for n, gap in self.seen.gaps(cell.prompt)
        ]
        near = [(n, more) for n, more in gaps if more < FAR_OFF_S]
        tokens = statistics.fmean(n for n, _ in near)
        more = statistics.fmean(more for _, more in near)
        return (
            [1.0, tokens, len(records) / len(near)],
            more,
            float(np.interp(tokens, BATCHES, self.bare_s)) + more,
        )


def _round(bench: Bench, config: ModelConfig, pool: ProcessPoolExecutor) -> _Round:
    seen, engine = _Seen(), steps.Engine(bench, config)
    before = [_bare_s(engine, batch) for batch in BATCHES]
    cells = CELLS[-1:] if bench.quick else CELLS
    loads = [_arrivals(cell, float(np.interp(cell.streams, BATCHES, before)), bench.quick) for cell in cells]
    with bind("127.0.0.1", 0) as sock, running(build_app(_gateway(engine, seen)), sock) as url:
        short, long, *rest = pool.submit(_load, url, loads, bench.quick).result()
    after = [_bare_s(engine, batch) for batch in BATCHES]
    return _Round(
        seen=seen,
        singles=(short, long),
        cells=tuple(zip(cells, rest, strict=True)),
        bare_s=tuple((a + b) / 2 for a, b in zip(before, after, strict=True)),
    )


def _arrivals(cell: _Cell, step_s: float, quick: bool) -> list[Arrival]:
    """Poisson arrivals at the rate that keeps about `streams` requests at a time, by Little's law."""
    rate = cell.streams / (cell.output * (step_s + AROUND_S))
    return sample(
        Workload(
            arrivals=Arrivals(process=Process.POISSON, rate_per_s=rate),
            prompt=Lengths.fixed(cell.prompt),
            output=Lengths.fixed(cell.output),
            requests=max(8, round(rate * (0.2 if quick else CELL_S))),
            seed=cell.prompt,
        )
    )


def _bare_s(engine: steps.Engine, batch: int) -> float:
    each = steps.Round(batch=batch, prompt=CELLS[0].prompt, output=CELLS[0].output)
    return next(engine.samples((each,), ())).seconds


def _ways(rounds: Sequence[_Round]) -> dict[str, float]:
    """What a request spends outside the engine, and each of its prompt tokens.

    The way of a token is told from requests alone; that of a request from those under
    load, which share the cores with the engine as requests in earnest do.
    """
    short_s, long_s = (
        statistics.median(one.way_s(prompt, one.singles[i]) for one in rounds)
        for i, prompt in enumerate((SHORT, LONG))
    )
    each = max(0.0, (long_s - short_s) / (LONG - SHORT))
    loaded_s = [
        one.way_s(cell.prompt, records) - each * cell.prompt for one in rounds for cell, records in one.cells
    ]
    return {"request": max(0.0, statistics.median(loaded_s)), "prompt_token": each}


def _slower(rounds: Sequence[_Round]) -> dict[str, float]:
    """What a served step takes more: fixed, for each streamed token, and for each request that comes in.

    Server and client take cores and caches from the engine for the tokens and requests they
    handle, not for the time a step takes: a large model's long steps lose as little as short ones.
    """
    rows, rests = [], []
    for one in rounds:
        for cell, records in one.cells:
            counts, more_s, period_s = one.excess(cell, records)
            rows.append([count / period_s for count in counts])
            rests.append(more_s / period_s)
    parts = nonnegative(np.array(rows), np.array(rests)).tolist()
    return dict(zip(("served_step", "streamed_token", "coming_request"), parts, strict=True))


def _gateway(engine: steps.Engine, seen: _Seen) -> Gateway:
    config, loop = engine.config, engine.loop()

    def start(sink: Sink) -> LiveEngine:
        def noting(events: Sequence[TokenEvent]) -> None:
            now_s = time.perf_counter()
            length, _ = seen.came_s.get(events[0].request_id, (0, 0.0))
            decoding = all(new == 1 for new, _ in engine.pieces)
            seen.steps.append(_Step(ended_s=now_s, tokens=len(events), decoding=decoding, prompt=length))
            for event in events:
                seen.first_s.setdefault(event.request_id, now_s)
            sink(events)

        live = _Witnessed(loop, noting)
        live.seen = seen
        return live

    symbols = {character: byte for byte, character in enumerate(byte_characters())}
    served = Served(
        names=("synthetic",),
        context_tokens=config.max_positions,
        vocab=config.vocab,
        tokenizer=_Bytes(),
        vocabulary=Vocabulary.of(symbols, []),
        created=0,
    )
    return Gateway(served=served, start_engine=start)


def _load(url: str, loads: Sequence[Sequence[Arrival]], quick: bool) -> list[Records]:
    """Loads one after the other: short prompts alone, long prompts alone, and those given."""
    singles = 6 if quick else SINGLES
    alone = [[Arrival(i * GAP_S, prompt, 2) for i in range(singles)] for prompt in (SHORT, LONG)]
    options = LoadOptions(warmup_requests=2)
    return [measure(Target(url=url), load, options).records for load in (*alone, *loads)]
