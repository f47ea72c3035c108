"""`tongyun serve MODEL`: the real engine behind the OpenAI-compatible endpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tongyun.cli.fleet import refuse_told, typed
from tongyun.cli.twin import twin_gateway
from tongyun.errors import InputError

if TYPE_CHECKING:
    from tongyun.cloud.engine.apart import EngineProcess
    from tongyun.cloud.engine.loop import EngineLoop
    from tongyun.cloud.engine.ppu_executor import PpuExecutor
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
        start_engine=_start(engines, router, migrate=options.migrate),
        api_key=options.api_key,
        body_bytes=options.body_bytes,
        classes=Classes(priorities=options.priorities),
    )


def _engines(options: ServeOptions, directory: Path) -> list[EngineProcess]:
    """A process for each replica, which begins to build it."""
    from tongyun.cloud.engine.apart import EngineProcess
    from tongyun.cloud.engine.carry import Windows
    from tongyun.model.config import ModelConfig

    count, build = options.replicas, partial(build_engine, options, directory)
    if not options.migrate:
        return [EngineProcess(build) for _ in range(count)]
    # Keys and values are of at most four bytes.
    windows = Windows(count, 4 * ModelConfig.load(directory).kv_elements * BLOCK_TOKENS)
    return [EngineProcess(build, (windows, index)) for index in range(count)]


def _apart(options: ServeOptions) -> Gateway:
    """The gateway, and what is left of this process kept off the cores that its engines need most."""
    from tongyun.cloud.engine.cores import stand_aside

    gateway = build_gateway(options)
    stand_aside(options.replicas)
    return gateway


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


def _start(engines: Sequence[EngineProcess], router: Router, *, migrate: bool) -> StartEngine:
    """What begins to run the engine behind the gateway: a process, or several that are one to it."""
    from tongyun.cloud.engine.replicas import Replicas
    from tongyun.cloud.sched.migrate import MigrationPolicy

    if len(engines) == 1:
        return engines[0].connect
    policy = MigrationPolicy() if migrate else None
    return partial(Replicas, [engine.connect for engine in engines], router, policy=policy)


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


def serve(
    context_: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="A Hugging Face model directory, or a hub id.", show_default=False)
    ] = None,
    fleet: Annotated[Path | None, typer.Option(help="With --twin: TOML file of a fleet.")] = None,
    twin: Annotated[
        bool, typer.Option("--twin", help="Answer with filler text at the pace of the simulated fleet.")
    ] = False,
    client_ms: Annotated[
        float, typer.Option(help="With --twin: what the client alone takes to a first token, in ms.")
    ] = 0.0,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one and prints it.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="TONGYUN_API_KEY", help="Key that /v1 asks for.", show_default=False)
    ] = None,
    name: Annotated[list[str] | None, typer.Option(help="Name clients use; may be repeated.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Most tokens of one request, prompt and answer.")
    ] = None,
    max_sequences: Annotated[int, typer.Option(help="Requests that run at the same time.")] = 64,
    max_step_tokens: Annotated[int, typer.Option(help="Tokens computed in one step.")] = 512,
    prefix_caching: Annotated[bool, typer.Option(help="Share KV blocks of equal prompt beginnings.")] = True,
    kv_gb: Annotated[float | None, typer.Option(help="Memory of the KV cache in GB.")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="f32 or bf16.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or ppu: the simulated chip.")] = "cpu",
    chip: Annotated[str, typer.Option(help="With --device ppu: a PPU of the catalogue, or a file.")] = CHIP,
    kernels: Annotated[str | None, typer.Option(help="torch, native or auto.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of one operation; else the cores, shared out.")
    ] = None,
    replicas: Annotated[int, typer.Option(help="Engines that share the requests, a process each.")] = 1,
    router: Annotated[
        str, typer.Option(help="Who is given a request: round-robin, least-load, prefix or freeness.")
    ] = ROUTER,
    migrate: Annotated[
        bool, typer.Option("--migrate", help="Move running requests from full replicas to free ones.")
    ] = False,
    drain_timeout: Annotated[float, typer.Option(help="Seconds that SIGTERM leaves to what runs.")] = 30.0,
    body_limit_mb: Annotated[float, typer.Option(help="Largest request body in MB.")] = 16.0,
    class_: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="NAME=PRIORITY", help="A class that requests may name; repeatable."),
    ] = None,
    class_aging: Annotated[
        float | None, typer.Option(help="Seconds of waiting worth a step of priority; else it is strict.")
    ] = None,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP endpoint until SIGTERM."""
    body_bytes = _amount("--body-limit-mb", body_limit_mb, 1e6)
    if twin or fleet is not None:
        if fleet is None or not twin:
            raise InputError("a twin needs both: --twin and --fleet, the TOML file of the fleet it is one of")
        refuse_told(typed(context_), OF_A_MODEL, "--twin runs no model")
        if not 0 <= client_ms < float("inf"):
            raise InputError(f"--client-ms {client_ms:g}: accepted: 0 or more")
        run_server(
            lambda key: twin_gateway(
                fleet,
                model,
                names=tuple(name or ()),
                api_key=key,
                body_bytes=body_bytes,
                client_s=client_ms / 1e3,
            ),
            api_key=api_key,
            host=host,
            port=port,
            drain_s=drain_timeout,
        )
        return
    refuse_told(typed(context_), ("client_ms",), "only a twin makes up for what its client takes")
    if model is None:
        raise InputError("MODEL is missing: a directory or a hub id; or --twin and --fleet")
    if device != PPU:
        refuse_told(typed(context_), ("chip",), "only --device ppu simulates a chip")
    if replicas == 1:
        refuse_told(typed(context_), ("router",), "--replicas 1 leaves nothing to choose")
    options = ServeOptions(
        model=model,
        names=tuple(name or ()),
        device=device,
        chip=chip,
        kernels=kernels,
        threads=threads,
        kv_dtype=kv_dtype,
        kv_bytes=None if kv_gb is None else _amount("--kv-gb", kv_gb, 1e9),
        context_tokens=context,
        max_sequences=max_sequences,
        max_step_tokens=max_step_tokens,
        prefix_caching=prefix_caching,
        body_bytes=body_bytes,
        priorities=_priorities(class_ or ()),
        aging_s=class_aging,
        replicas=replicas,
        router=router,
        migrate=migrate,
    )
    run_server(
        lambda key: _apart(replace(options, api_key=key)),
        api_key=api_key,
        host=host,
        port=port,
        drain_s=drain_timeout,
    )


def run_server(
    build: Callable[[str | None], Gateway], *, api_key: str | None, host: str, port: int, drain_s: float
) -> None:
    """Bind, `build` with the key stripped, announce the URL on stdout, and serve until a signal."""
    from tongyun.cloud.gateway.app import build_app
    from tongyun.cloud.gateway.server import bind, run, url_of

    key = None if api_key is None else api_key.strip()
    if key == "":
        # An unset variable in a script must not open the server to everybody.
        raise InputError("--api-key is empty; leave it (and TONGYUN_API_KEY) out to serve without a key")
    if drain_s < 0:
        raise InputError(f"--drain-timeout {drain_s:g}: accepted: 0 or more seconds")
    # The port comes first: loading a model for a minute to find it taken would be unkind.
    with bind(host, port) as sock:
        url = url_of(sock)
        gateway = build(key)
        served = gateway.served

        def announce() -> None:
            typer.echo(f"{served.names[0]}: context {served.context_tokens} tokens, at {url}/v1")

        run(build_app(gateway), sock, drain_s=drain_s, on_ready=announce)


OF_A_MODEL = (
    "context",
    "max_sequences",
    "max_step_tokens",
    "prefix_caching",
    "kv_gb",
    "kv_dtype",
    "device",
    "chip",
    "kernels",
    "threads",
    "replicas",
    "router",
    "migrate",
    "class_",
    "class_aging",
)
"""Flags that a twin has no use for: its fleet file says what there is."""


def _priorities(told: Iterable[str]) -> dict[str, int]:
    """Priorities by class, of `NAME=PRIORITY` each."""
    priorities: dict[str, int] = {}
    for one in told:
        name, _, number = one.partition("=")
        try:
            priority = int(number)
        except ValueError:
            name, priority = "", 0
        if not name or name in priorities:
            raise InputError(f"--class {one}: accepted: NAME=PRIORITY, a whole number, each name once")
        priorities[name] = priority
    return priorities


def _amount(flag: str, value: float, unit: float) -> int:
    if not 0 < value < float("inf"):
        raise InputError(f"{flag} {value:g}: accepted: more than 0")
    return int(value * unit)
