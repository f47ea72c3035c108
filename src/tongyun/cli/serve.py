"""`tongyun serve MODEL`: the real engine behind the OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tongyun.cli.engines import CHIP, PPU, ROUTER, ServeOptions, build_gateway
from tongyun.cli.fleet import refuse_told, typed
from tongyun.cli.twin import twin_gateway
from tongyun.errors import InputError

if TYPE_CHECKING:
    from tongyun.cloud.engine.keeper import Upkeep
    from tongyun.cloud.gateway.app import Gateway


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
    hang_after: Annotated[
        float | None,
        typer.Option(
            help="Seconds without a sign of life in which a replica with work is killed and started again; "
            "60 with --replicas or --restarts, else never."
        ),
    ] = None,
    restarts: Annotated[
        int | None,
        typer.Option(
            help="Times in a row that a replica which ended is started again; "
            "5 with --replicas or --hang-after, else 0."
        ),
    ] = None,
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
    else:
        refuse_told(
            typed(context_), ("hang_after", "restarts"), "a simulated chip's step takes as long as it takes"
        )
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
        upkeep=upkeep_of(replicas, hang_after, restarts),
    )
    run_server(
        lambda key: _apart(replace(options, api_key=key)),
        api_key=api_key,
        host=host,
        port=port,
        drain_s=drain_timeout,
    )


def _apart(options: ServeOptions) -> Gateway:
    """The gateway, and what is left of this process kept off the cores that its engines need most."""
    from tongyun.cloud.engine.cores import stand_aside

    gateway = build_gateway(options)
    stand_aside(options.replicas)
    return gateway


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

        def announce() -> None:
            for one in gateway.models:
                typer.echo(f"{one.names[0]}: context {one.context_tokens} tokens, at {url}/v1")

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
    "hang_after",
    "restarts",
    "class_",
    "class_aging",
)
"""Flags that a twin has no use for: its fleet file says what there is."""


def upkeep_of(replicas: int, hang_after_s: float | None, restarts: int | None) -> Upkeep | None:
    """What is told of it, and defaults for the rest; None for one engine of which nothing is told."""
    from tongyun.cloud.engine.keeper import Upkeep

    if replicas == 1 and hang_after_s is None and restarts is None:
        return None
    usual = Upkeep()
    if hang_after_s is None:
        hang_after_s = usual.hang_after_s
    # Below, a busy machine looks like an engine that hangs.
    if not 1 <= hang_after_s < float("inf"):
        raise InputError(f"--hang-after {hang_after_s:g}: accepted: 1 or more seconds")
    if restarts is None:
        restarts = usual.restarts
    if restarts < 0:
        raise InputError(f"--restarts {restarts}: accepted: 0 or more")
    return Upkeep(hang_after_s=hang_after_s, restarts=restarts)


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
