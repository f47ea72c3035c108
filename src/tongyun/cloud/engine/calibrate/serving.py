"""Measure what serving adds around the engine: the way in, the way out, and who waits for whom.

The engine runs in this process on a synthetic tiny model, the real gateway in another and
the real load generator in a third, as they do when a model is served. What comes of it:
what a request takes beyond the engine, how that grows with its prompt, and how much longer
a served step takes than its price says. Held against the price and not against a step without
a server, what the price gets wrong of such steps is in it too, and a load that is foreseen adds both.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from bisect import bisect, bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tongyun.chip.calibrated import engine_precision
from tongyun.chip.curves import TINY, nonnegative
from tongyun.cloud.engine.apart import Distant, attend
from tongyun.cloud.engine.calibrate import steps
from tongyun.cloud.engine.calibrate.bench import Bench
from tongyun.cloud.engine.calibrate.loads import Cell, arrivals, cells
from tongyun.cloud.engine.calibrate.pace import Pace
from tongyun.cloud.engine.cores import stand_aside
from tongyun.cloud.engine.live import LiveEngine, Standing
from tongyun.cloud.engine.protocol import EngineStats, TokenEvent
from tongyun.cloud.engine.simulated import StepLoad
from tongyun.cloud.engine.step_table import StepTable
from tongyun.cloud.gateway.app import Gateway, build_app
from tongyun.cloud.gateway.ask import Served
from tongyun.cloud.gateway.ports import Sink
from tongyun.cloud.gateway.server import bind, run, url_of
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.load import LoadOptions, measure
from tongyun.cloud.pauses import settled
from tongyun.cloud.probe import Target
from tongyun.cloud.sched.limits import SchedulerConfig
from tongyun.cloud.sched.request import Request
from tongyun.cloud.workload import Arrival
from tongyun.model.config import ModelConfig
from tongyun.model.vocabulary import Vocabulary, byte_characters
from tongyun.specs import Chip
from tongyun.specs.samples import OverheadSample, ServedSample

SHORT, LONG = 17, 513
"""Prompt tokens of single requests; lengths that no other request of a round has."""
SINGLES = 12
GAP_S = 0.08
Records = tuple[RequestRecord, ...]
Pieces = tuple[tuple[int, int], ...]
"""New and cached tokens of each sequence of a step."""
Gap = tuple[Pieces, int, float]
"""A decoding step, the requests that came meanwhile, and its seconds."""
StepPrice = Callable[[Pieces], float]
"""Seconds of a step without a server, as priced."""
STREAMS = (1, 4, 12, 24, 40)
"""Sequences in a step at which the cost of serving is told."""
LEAST_SEEN = 20.0
"""Steps, and requests, that are enough to tell a cost from."""
FAR_OFF_S = 0.02
"""A step that takes so much longer than its price waited for something else on the machine."""


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A step at the engine: when its tokens left, how many, what it computed, for prompts of which length."""

    ended_s: float
    tokens: int
    pieces: Pieces
    prompt: int

    @property
    def decoding(self) -> bool:
        return all(new == 1 for new, _ in self.pieces)


@dataclass(kw_only=True)
class _Seen:
    """What happened at the engine: when requests came, when first tokens left, what steps ran."""

    came_s: dict[str, tuple[int, float]] = field(default_factory=dict)
    first_s: dict[str, float] = field(default_factory=dict)
    steps: list[_Step] = field(default_factory=list)

    def clear(self) -> None:
        """Forget what was seen."""
        self.came_s.clear()
        self.first_s.clear()
        self.steps.clear()

    def gaps(self, prompt: int) -> list[Gap]:
        """Steps that only decoded, each since the step before.

        Such a step follows another without a pause: its sequences were in that one.
        """
        came = sorted(came_s for _, came_s in self.came_s.values())
        return [
            (
                step.pieces,
                bisect(came, step.ended_s) - bisect(came, before.ended_s),
                step.ended_s - before.ended_s,
            )
            for before, step in pairwise(self.steps)
            if step.decoding and step.prompt == prompt
        ]

    def firsts(self, prompt: int, count: int) -> list[tuple[int, float]]:
        """Of the last `count` such prompts: tokens of the step that gave the first, seconds inside."""
        ended = [step.ended_s for step in self.steps]
        names = [name for name, (length, _) in self.came_s.items() if length == prompt][-count:]
        places = [bisect_left(ended, self.first_s[name]) for name in names]
        inside_s = [self.first_s[name] - self.came_s[name][1] for name in names]
        return [(self.steps[place].tokens, s) for place, s in zip(places, inside_s, strict=True)]


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


def serving(
    bench: Bench, pace: Pace, chip: Chip
) -> tuple[tuple[OverheadSample, ...], tuple[ServedSample, ...], float]:
    """What prompt tokens and coming requests add, what serving takes by the streams there are, and the pace
    of the processors under load. `chip` prices steps: it has all samples but those of serving."""
    # A fresh interpreter: a fork would copy the threads' locks, and a thread would share our GIL.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, initializer=stand_aside) as pool:
        rounds = [_round(bench, config, pool, pace, _price(config, chip)) for config in _shapes(bench)]
    each_s = _prompt_token_s(rounds)
    step_s, coming_s = _slower(rounds)
    way_s = _ways(rounds, each_s)
    each = {"prompt_token": each_s, "coming_request": coming_s}
    return (
        tuple(OverheadSample(what=what, count=1, seconds=s) for what, s in each.items() if s > 0),
        tuple(
            ServedSample(streams=n, step_s=max(step_s[n], TINY), way_s=max(way_s[n], TINY))
            for n in STREAMS
            if n in step_s and n in way_s
        ),
        statistics.fmean(pace for one in rounds for pace in one.paces),
    )


def _shapes(bench: Bench) -> list[ModelConfig]:
    """Steps of many small operators, and steps of shared products: as long as those of small models.

    Shorter ones would give tokens faster than one core can send and another program's take.
    """
    if bench.quick:
        return [steps.synthetic(4)]
    return [
        steps.synthetic(layers, hidden=hidden, sparse=sparse)
        for layers, hidden, sparse in ((12, 256, True), (8, 512, False), (8, 256, True), (12, 256, False))
    ]


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A model under one load."""

    cell: Cell
    ways: tuple[tuple[int, float], ...]
    """Of each request: tokens of its first step, and seconds outside the engine."""
    excess: tuple[tuple[int, int, float], ...]
    """See `_excess`."""


@dataclass(frozen=True, kw_only=True)
class _Round:
    """One synthetic model, served."""

    way_s: tuple[float, float]
    """Mean seconds that first tokens of short and long prompts, each alone, spent outside the engine."""
    loaded: tuple[_Loaded, ...]
    paces: tuple[float, ...]
    """Of the processors, under each load."""


def _round(
    bench: Bench, config: ModelConfig, pool: ProcessPoolExecutor, pace: Pace, price: StepPrice
) -> _Round:
    seen, engine = _Seen(), steps.Engine(bench, config)
    with _gateway(engine, seen) as url:

        def put(load: Sequence[Arrival], prompt: int) -> list[tuple[int, float]]:
            """Of each request of a load: tokens of its first step, and seconds outside the engine."""
            seen.clear()
            records = pool.submit(_load, url, load).result()
            inside = seen.firsts(prompt, len(records))
            return [(n, felt - s) for (n, s), felt in zip(inside, _ttfts(records), strict=True)]

        def alone(prompt: int) -> float:
            count = 6 if bench.quick else SINGLES
            return statistics.fmean(
                s for _, s in put([Arrival(i * GAP_S, prompt, 2) for i in range(count)], prompt)
            )

        def under(cell: Cell) -> _Loaded:
            step_s, prompt_s = price(((1, cell.prompt),) * cell.streams), price(((cell.prompt, 0),))
            ways = put(arrivals(bench, cell, step_s, prompt_s), cell.prompt)
            return _Loaded(cell=cell, ways=tuple(ways), excess=_excess(seen.gaps(cell.prompt), price))

        short, long = (pace.calmly(partial(alone, prompt))[0] for prompt in (SHORT, LONG))
        each = [pace.calmly(partial(under, cell)) for cell in cells(bench)]
    return _Round(
        way_s=(short, long),
        loaded=tuple(loaded for loaded, _ in each),
        paces=tuple(felt for _, felt in each),
    )


def _excess(gaps: Sequence[Gap], price: StepPrice) -> tuple[tuple[int, int, float], ...]:
    """Of each decoding step: sequences, requests that came meanwhile, seconds it took more than its price."""
    all_of = ((len(pieces), came, seconds - price(pieces)) for pieces, came, seconds in gaps)
    return tuple((n, came, more) for n, came, more in all_of if more < FAR_OFF_S)


def _price(config: ModelConfig, chip: Chip) -> StepPrice:
    """As a load that is foreseen asks for it."""
    assert chip.calibration is not None
    table = StepTable(config, chip, engine_precision(chip.calibration))

    def of(pieces: Pieces) -> float:
        new, cached = np.array(pieces).T
        return float(table(StepLoad(new_tokens=new, context=cached, samples=len(pieces))).seconds)

    return of


def _ttfts(records: Records) -> list[float]:
    """Times to first tokens, in the order in which requests were sent."""
    return [r.ttft_s for r in sorted(records, key=lambda r: r.arrival_s) if r.ttft_s is not None]


def _prompt_token_s(rounds: Sequence[_Round]) -> float:
    """What each prompt token adds to a request's way, told from requests alone."""
    short_s, long_s = (statistics.median(one.way_s[i] for one in rounds) for i in range(2))
    return max(0.0, (long_s - short_s) / (LONG - SHORT))


def _ways(rounds: Sequence[_Round], prompt_token_s: float) -> dict[int, float]:
    """Seconds of a first token outside the engine, by the tokens that its step sent.

    The way is that under load: the tokens of a step leave one after the other, while the
    next step has the cores and, for Python's own part of it, the interpreter.
    """
    seen = [
        (n, s - prompt_token_s * loaded.cell.prompt)
        for one in rounds
        for loaded in one.loaded
        for n, s in loaded.ways
    ]
    streams, weights = _about([n for n, _ in seen])
    found = nonnegative(weights, np.array([s for _, s in seen]))
    return dict(zip(streams, np.maximum.accumulate(found).tolist(), strict=True))


def _slower(rounds: Sequence[_Round]) -> tuple[dict[int, float], float]:
    """What a served step takes more than its price: by the streams there are, and for each request that
    comes in.

    Server and client take cores, caches and the interpreter from the engine. The tokens of a few
    streams are sent by a core that the step leaves free; those of many make it wait. Never less than
    nothing: where a price is too long it stays so.
    """
    seen = [row for one in rounds for loaded in one.loaded for row in loaded.excess if row[0] <= STREAMS[-1]]
    streams, weights = _about([n for n, _, _ in seen])
    came = np.array([float(came) for _, came, _ in seen])
    found = nonnegative(np.column_stack((weights, came)), np.array([more for _, _, more in seen]))
    return dict(zip(streams, np.maximum.accumulate(found[:-1]).tolist(), strict=True)), float(found[-1])


def _about(counts: Sequence[int]) -> tuple[tuple[int, ...], NDArray[np.float64]]:
    """Those of `STREAMS` with enough counts about them, and how much of each count belongs to which.

    Least squares with these weights finds the values at them of a line straight in between.
    """
    weights = np.array([np.interp(counts, STREAMS, unit) for unit in np.eye(len(STREAMS))]).T
    told = weights.sum(axis=0) >= LEAST_SEEN
    streams = tuple(n for n, enough in zip(STREAMS, told, strict=True) if enough) or STREAMS[:1]
    return streams, np.array([np.interp(counts, streams, unit) for unit in np.eye(len(streams))]).T


@contextmanager
def _gateway(engine: steps.Engine, seen: _Seen) -> Iterator[str]:
    """A gateway in a process of its own before an engine in this one; its address while it runs."""
    loop, context = engine.loop(), multiprocessing.get_context("spawn")
    line, there = context.Pipe()
    ready, tell = context.Pipe(duplex=False)
    facts = there, engine.config, loop.scheduler.config, loop.stats(), Standing(loop.room(), 0)
    front = context.Process(target=_front, args=(tell, *facts), daemon=True)
    front.start()
    there.close()
    tell.close()

    def start(sink: Sink) -> LiveEngine:
        def noting(events: Sequence[TokenEvent]) -> None:
            now_s = time.perf_counter()
            length, _ = seen.came_s.get(events[0].request_id, (0, 0.0))
            seen.steps.append(_Step(ended_s=now_s, tokens=len(events), pieces=engine.pieces, prompt=length))
            for event in events:
                seen.first_s.setdefault(event.request_id, now_s)
            sink(events)

        live = _Witnessed(loop, noting)
        live.seen = seen
        return live

    attending = Thread(target=attend, args=(line, start))
    attending.start()
    try:
        # As an engine that serves does: looking at all that lives here would hold up a step.
        with settled():
            yield ready.recv()
    finally:
        front.terminate()
        front.join()
        attending.join()


def _front(
    tell: Connection,
    line: Connection,
    config: ModelConfig,
    limits: SchedulerConfig,
    stats: EngineStats,
    standing: Standing,
) -> None:
    """The gateway's process: serve the engine at the other end of the line."""
    symbols = {character: byte for byte, character in enumerate(byte_characters())}
    served = Served(
        names=("synthetic",),
        context_tokens=config.max_positions,
        vocab=config.vocab,
        tokenizer=_Bytes(),
        vocabulary=Vocabulary.of(symbols, []),
        created=0,
    )
    app = build_app(Gateway(served=served, start_engine=partial(Distant, line, limits, stats, standing)))
    stand_aside()
    with bind("127.0.0.1", 0) as sock:
        run(app, sock, drain_s=1.0, on_ready=partial(tell.send, url_of(sock)))


def _load(url: str, load: Sequence[Arrival]) -> Records:
    return measure(Target(url=url), load, LoadOptions(warmup_requests=2)).records
