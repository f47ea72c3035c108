"""The engines behind `tongyun serve MODEL`, each in a process of its own, and the gateway before them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tongyun.errors import InputError

if TYPE_CHECKING:
    from tongyun.cloud.engine.keeper import Upkeep
    from tongyun.cloud.engine.loop import EngineLoop
    from tongyun.cloud.engine.ppu_executor import PpuExecutor
    from tongyun.cloud.engine.process import EngineProcess
    from tongyun.cloud.engine.torch_executor import TorchExecutor
    from tongyun.cloud.gateway.app import Gateway
    from tongyun.cloud.gateway.ports import StartEngine
    from tongyun.cloud.sched.router import Router
    from tongyun.cloud.sched.scheduler import SchedulerConfig


PPU, CHIP = "ppu", "zhenwu-810e"
"""The device that is a simulated chip."""
ROUTER = "least-load"
BLOCK_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What decides how a model is served; the command line's flags by other names."""

    model: str
    names: tuple[str, ...] = ()
    """What clients may call it; empty: the hub id or the directory's name."""
    device: str = "cpu"
    chip: str = CHIP
    """The PPU that is simulated where the device is `ppu`."""
    kernels: str | None = None
    threads: int | None = None
    kv_dtype: str | None = None
    kv_bytes: int | None = None
    kv_blocks: int | None = None
    """Blocks of the cache, where a replica takes another's place: other memory is free by then."""
    context_tokens: int | None = None
    """None: as much as the model was made for and the cache can hold."""
    max_sequences: int = 64
    max_step_tokens: int = 512
    prefix_caching: bool = True
    api_key: str | None = None
    body_bytes: int = 16 * 2**20
    priorities: Mapping[str, int] = field(default_factory=dict)
    """Of the classes that requests may name."""
    aging_s: float | None = None
    """See `SchedulerConfig.aging_s`."""
    replicas: int = 1
    """Engines, each a process with the whole model."""
    router: str = ROUTER
    migrate: bool = False
    """Whether running requests move between the engines."""
    upkeep: Upkeep | None = None
    """When a replica that ended or hangs is replaced; None: never."""


def build_gateway(options: ServeOptions) -> Gateway:
    """Begin to load the model, in a process for each replica, and put the gateway together; nothing runs."""
    from tongyun.cloud.gateway.app import Gateway
    from tongyun.cloud.gateway.ask import Served
    from tongyun.cloud.gateway.classes import Classes
    from tongyun.model.config import ModelConfig
    from tongyun.model.find import find_model
    from tongyun.model.tokenizer import Tokenizer
    from tongyun.model.vocabulary import Vocabulary

    directory = find_model(options.model)
    router = _router(options)
    engines = _engines(options, directory)
    try:
        tokenizer, vocabulary = Tokenizer(directory), Vocabulary.load(directory)
        # A request has to run wherever it is sent: the caches of like engines may differ in what was free.
        context_tokens = min([engine.ready().max_context_tokens for engine in engines])
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    served = Served(
        names=options.names or (_name(options.model, directory),),
        context_tokens=context_tokens,
        vocab=ModelConfig.load(directory).vocab,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        created=int(time.time()),
    )
    return Gateway(
        served=served,
        start_engine=_start(engines, router, options),
        api_key=options.api_key,
        body_bytes=options.body_bytes,
        classes=Classes(priorities=options.priorities),
    )


def _engines(options: ServeOptions, directory: Path) -> list[EngineProcess]:
    """A process for each replica, which begins to build it."""
    from tongyun.cloud.engine.carry import Windows
    from tongyun.cloud.engine.process import EngineProcess
    from tongyun.model.config import ModelConfig

    count, build = options.replicas, partial(build_engine, options, directory)
    begin = partial(
        EngineProcess,
        build,
        beat_s=None if options.upkeep is None else options.upkeep.beat_s,
        like=partial(_like, options, directory),
    )
    if not options.migrate:
        return [begin() for _ in range(count)]
    # Keys and values are of at most four bytes.
    windows = Windows(count, 4 * ModelConfig.load(directory).kv_elements * BLOCK_TOKENS)
    return [begin((windows, index)) for index in range(count)]


def _like(options: ServeOptions, directory: Path, limits: SchedulerConfig) -> Callable[[], EngineLoop]:
    """What builds an engine in the place of one that had these limits."""
    same = replace(options, kv_blocks=limits.blocks, context_tokens=limits.max_context_tokens)
    return partial(build_engine, same, directory)


def _router(options: ServeOptions) -> Router:
    """Who chooses among the replicas, once it is certain that there can be so many."""
    from tongyun.cloud.sched.router import find_router

    if options.replicas < 1:
        raise InputError(f"--replicas {options.replicas}: accepted: 1 or more")
    if options.migrate and options.replicas < 2:
        raise InputError(
            "--migrate: requests move from one replica to another; accepted with --replicas 2 or more"
        )
    if options.replicas > 1 and options.device == PPU:
        raise InputError(
            "--replicas: several simulated chips would take this machine's cores from each other, "
            "and their paces say nothing; accepted with --device ppu: 1"
        )
    return find_router(options.router)


def _start(engines: Sequence[EngineProcess], router: Router, options: ServeOptions) -> StartEngine:
    """What begins to run the engine behind the gateway: a process, or those that are one to it."""
    from tongyun.cloud.engine.keeper import Keeper
    from tongyun.cloud.engine.replicas import Replicas
    from tongyun.cloud.sched.migrate import MigrationPolicy

    upkeep = options.upkeep
    if len(engines) == 1 and upkeep is None:
        return engines[0].connect
    policy = MigrationPolicy() if options.migrate else None
    keep = None if upkeep is None else partial(Keeper, processes=engines, upkeep=upkeep)
    return partial(Replicas, [engine.connect for engine in engines], router, policy=policy, keep=keep)


def build_engine(options: ServeOptions, directory: Path) -> EngineLoop:
    """Load the model and give it a scheduler: what runs in the engine's process."""
    from tongyun.cloud.engine.clock import WallClock
    from tongyun.cloud.engine.loop import EngineLoop
    from tongyun.cloud.sched.scheduler import Scheduler
    from tongyun.model.tokenizer import Tokenizer, eos_ids

    executor, blocks = _executor(options, directory)
    cache, config = executor.cache, executor.model.config
    context_tokens = _context(options, config.max_positions, blocks * cache.block_tokens)
    limits = _limits(options, blocks, cache.block_tokens, context_tokens)
    eos = frozenset(eos_ids(directory) or Tokenizer(directory).eos_ids)
    return EngineLoop(Scheduler(limits), executor, WallClock(), eos_token_ids=eos)


def _executor(options: ServeOptions, directory: Path) -> tuple[TorchExecutor | PpuExecutor, int]:
    """What runs the model, and how many KV blocks requests may have."""
    if options.device == PPU:
        from tongyun.cloud.engine.ppu_executor import PpuOptions, check_ppu, open_ppu_executor

        check_ppu(options.kernels, options.kv_dtype)
        simulated = open_ppu_executor(
            directory,
            PpuOptions(
                chip=options.chip,
                sequences=options.max_sequences,
                step_tokens=options.max_step_tokens,
                context_tokens=options.context_tokens,
                kv_bytes=options.kv_bytes,
            ),
        )
        return simulated, simulated.blocks
    from tongyun.cloud.engine.torch_executor import ExecutorOptions, open_executor

    executor = open_executor(
        directory,
        ExecutorOptions(
            device=options.device,
            kernels=options.kernels,
            threads=options.threads,
            kv_dtype=options.kv_dtype,
            kv_bytes=options.kv_bytes,
            kv_blocks=options.kv_blocks,
            block_tokens=BLOCK_TOKENS,
            sharers=options.replicas,
        ),
    )
    return executor, executor.cache.blocks


def _name(model: str, directory: Path) -> str:
    """A hub id is a name already; of a path only the last part is for clients to see."""
    return directory.resolve().name if Path(model).expanduser().is_dir() else model


def _context(options: ServeOptions, positions: int, cached: int) -> int:
    """Tokens of one request: the model's positions, or fewer where asked for or where the cache ends."""
    asked = options.context_tokens
    if asked is None:
        return min(positions, cached)
    if not 2 <= asked <= min(positions, cached):
        raise InputError(
            f"--context {asked}: accepted: 2 … {min(positions, cached)} "
            f"(the model has {positions} positions, the KV cache holds {cached} tokens)"
        )
    return asked


def _limits(options: ServeOptions, blocks: int, block_tokens: int, context_tokens: int) -> SchedulerConfig:
    from tongyun.cloud.sched.scheduler import SchedulerConfig

    return SchedulerConfig(
        blocks=blocks,
        block_tokens=block_tokens,
        max_context_tokens=context_tokens,
        max_sequences=options.max_sequences,
        max_step_tokens=options.max_step_tokens,
        prefix_caching=options.prefix_caching,
        aging_s=options.aging_s,
    )
