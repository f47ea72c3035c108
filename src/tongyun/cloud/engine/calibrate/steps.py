"""Measure whole steps of the engine on synthetic tiny models.

What a step takes beyond its operators (the scheduler, index tensors, Python between two
operators, sampling, reporting) cannot be measured an operator at a time. Models that are
almost nothing but overhead show it: a few layers and many, dense and sparse, one sequence
and many; wider ones show what threads that help cost. They resemble no model anybody serves.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tongyun.cloud.engine.calibrate.bench import Bench
from tongyun.cloud.engine.calibrate.stopwatch import typical
from tongyun.cloud.engine.clock import WallClock
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.protocol import Executor, StepResult
from tongyun.cloud.engine.torch_executor import GREEDY, TorchExecutor, spare_blocks
from tongyun.cloud.sched.request import Batch, Request
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig
from tongyun.model.config import Experts, ModelConfig
from tongyun.model.graph import StepShape
from tongyun.model.paged import PagedCache
from tongyun.model.weights import random_model

BLOCK_TOKENS = 16
BLOCKS = 1024


@dataclass(frozen=True, kw_only=True)
class StepSample:
    """Steps of one composition: new and cached tokens of each piece, and what such a step usually takes."""

    config: ModelConfig
    pieces: tuple[tuple[int, int], ...]
    seconds: float

    @property
    def shape(self) -> StepShape:
        return StepShape.ragged(self.pieces)


@dataclass(frozen=True, kw_only=True)
class Round:
    """Requests that start together: how many, and how long."""

    batch: int
    prompt: int
    output: int


ROUNDS = (
    Round(batch=1, prompt=32, output=16),
    Round(batch=8, prompt=32, output=16),
    Round(batch=32, prompt=16, output=16),
)
PROMPTS = (8, 32, 128, 512)
"""Prompts that are computed alone, one step each."""


def synthetic(layers: int, *, hidden: int = 64, sparse: bool = False) -> ModelConfig:
    """A Qwen3 shape of almost nothing: narrow, with a vocabulary of 512."""
    return ModelConfig(
        name=f"synthetic-{'sparse' if sparse else 'dense'}-{layers}x{hidden}",
        family="qwen3_moe" if sparse else "qwen3",
        layers=layers,
        hidden=hidden,
        heads=4,
        kv_heads=2,
        head_dim=32,
        intermediate=2 * hidden,
        vocab=512,
        max_positions=2048,
        rope_theta=10_000.0,
        norm_eps=1e-6,
        tied=True,
        qk_norm=True,
        experts=Experts(count=4, per_token=2, intermediate=hidden) if sparse else None,
    )


class Steps:
    """Steps of the synthetic models: as with probes, a few at every visit."""

    def __init__(self, bench: Bench) -> None:
        # Wide enough for threads to share the products, and for weights to leave the inner caches.
        wide = [] if bench.quick else [synthetic(8, hidden=width) for width in (128, 256, 512)]
        wide += [] if bench.quick else [synthetic(6, hidden=256, sparse=True)]
        # What a host does for each operator adds up over the layers of deep models.
        wide += [synthetic(28)] if bench.queued and not bench.quick else []
        few, many = (1, 3) if bench.quick else (2, 10)
        shapes = [synthetic(layers, sparse=sparse) for sparse in (False, True) for layers in (few, many)]
        self._engines = [Engine(bench, config) for config in shapes + wide]
        self._visits: list[list[StepSample]] = []

    def visit(self) -> None:
        """Run every composition once more."""
        self._visits.append([sample for engine in self._engines for sample in engine.samples()])

    def samples(self, visits: Sequence[int]) -> list[StepSample]:
        """Seconds of each composition, of these visits."""
        return [
            replace(same[0], seconds=typical([sample.seconds for sample in same], visits))
            for same in zip(*self._visits, strict=True)
        ]


class Engine:
    """The real executor and scheduler on random weights of one shape."""

    def __init__(self, bench: Bench, config: ModelConfig) -> None:
        self.bench, self.config = bench, config
        self._recorder = _Recorder(executor(bench, config))

    def loop(self) -> EngineLoop:
        """The engine's loop on wall time, nothing in it yet."""
        return engine(self.config, self._recorder)

    @property
    def pieces(self) -> tuple[tuple[int, int], ...]:
        """New and cached tokens of each sequence in the latest step."""
        return self._recorder.pieces

    def samples(self) -> Iterator[StepSample]:
        """A sample of full batches decoding for each round, and one of each prompt."""
        for each in ROUNDS if not self.bench.quick else ROUNDS[:2]:
            yield _decodes(self.config, self._recorder, each)
        for prompt in PROMPTS if not self.bench.quick else PROMPTS[:2]:
            yield _prompts(self.config, self._recorder, prompt)


def executor(bench: Bench, config: ModelConfig) -> TorchExecutor:
    """The real executor on random weights, with a cache of moderate size."""
    model = random_model(config, ops=bench.ops, device=str(bench.device))
    device = str(bench.device)
    cache = PagedCache(config, blocks=BLOCKS, dtype=bench.kv_dtype, device=device, spare=spare_blocks(device))
    made = TorchExecutor(model, cache)
    made.prepare()
    return made


class _Recorder:
    """An executor that remembers what each batch held."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self.pieces: tuple[tuple[int, int], ...] = ()

    def execute(self, batch: Batch) -> StepResult:
        self.pieces = tuple((piece.length, piece.start) for piece in batch.pieces)
        return self.inner.execute(batch)


def engine(config: ModelConfig, executor: Executor) -> EngineLoop:
    """An engine loop on wall time with an empty scheduler; prompts are never shared."""
    limits = SchedulerConfig(
        blocks=BLOCKS,
        block_tokens=BLOCK_TOKENS,
        max_context_tokens=config.max_positions,
        max_step_tokens=2048,
        prefix_caching=False,
    )
    return EngineLoop(Scheduler(limits), executor, WallClock())


def _decodes(config: ModelConfig, recorder: _Recorder, each: Round) -> StepSample:
    loop = engine(config, recorder)
    for index in range(each.batch):
        prompt = [(7 * index + i) % config.vocab for i in range(each.prompt)]
        loop.add(_request(f"r{index}", prompt, each.output))
    seconds: dict[tuple[tuple[int, int], ...], float] = {}
    while loop.has_work:
        took_s = _timed(loop)
        seconds[recorder.pieces] = took_s
    decodes = [(pieces, s) for pieces, s in seconds.items() if all(new == 1 for new, _ in pieces)]
    # Contexts grow by one a step, which is nothing here: the median step stands for all.
    middle = decodes[len(decodes) // 2][0]
    return StepSample(config=config, pieces=middle, seconds=statistics.median(s for _, s in decodes))


def _prompts(config: ModelConfig, recorder: _Recorder, prompt: int) -> StepSample:
    readings = []
    for _ in range(4):
        loop = engine(config, recorder)
        loop.add(_request("r", [i % config.vocab for i in range(prompt)], 1))
        readings.append(_timed(loop))
    return StepSample(config=config, pieces=((prompt, 0),), seconds=statistics.median(readings[1:]))


def _request(name: str, prompt: Sequence[int], output: int) -> Request:
    """A request as the gateway hands over a load generator's: greedy, to the asked length."""
    return Request(id=name, prompt=prompt, output_tokens=output, ignore_eos=True, sampling=GREEDY)


def _timed(loop: EngineLoop) -> float:
    begun = time.perf_counter()
    loop.step()
    return time.perf_counter() - begun
