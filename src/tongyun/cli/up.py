"""`tongyun up`: measure this machine, plan on it, serve, load, and lay prediction beside measurement.

The server is a process of its own (`tongyun serve`), as it would be in earnest; the load
comes from this one. What is predicted is predicted before the first request leaves.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tongyun.errors import InputError, ServiceError

if TYPE_CHECKING:
    from tongyun.cloud.load import LoadRun
    from tongyun.cloud.sched.scheduler import SchedulerConfig
    from tongyun.cloud.workload import Arrival
    from tongyun.codesign.fidelity import Compared
    from tongyun.codesign.plan import Answer
    from tongyun.codesign.predict import Deployment, Prediction
    from tongyun.model.config import ModelConfig
    from tongyun.specs import ChipSpec

USE = 0.6
"""Share of the predicted capacity that the load asks for unless a rate is given."""
LOAD_S = 30.0
"""How long the load lasts unless a number of requests is given."""
FEWEST, MOST = 20, 300
KV_SHARE = 0.25
"""Share of the machine's memory that the KV cache may take."""
ADDRESS = re.compile(r"at (http://\S+)/v1")


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of the server; None where the prediction decides."""

    isl: int
    osl: int
    rate_per_s: float | None
    requests: int | None
    seed: int

    def arrivals(self, capacity_per_s: float) -> list[Arrival]:
        """Poisson arrivals, at a share of `capacity_per_s` unless a rate was given."""
        from tongyun.cloud.workload import Arrivals, Lengths, Process, Workload, sample

        rate = self.rate_per_s or USE * capacity_per_s
        count = self.requests or min(max(FEWEST, round(LOAD_S * rate)), MOST)
        return sample(
            Workload(
                arrivals=Arrivals(process=Process.POISSON, rate_per_s=rate),
                prompt=Lengths.fixed(self.isl),
                output=Lengths.fixed(self.osl),
                requests=count,
                seed=self.seed,
            )
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One `up`: what was asked, planned, predicted and measured."""

    deployment: Deployment
    answer: Answer
    capacity_per_s: float
    arrivals: list[Arrival]
    prediction: Prediction
    run: LoadRun
    machine: Mapping[str, object]
    """What the calibration says of where it was made."""
    pace: float
    """How much slower the processors were meanwhile than when nothing disturbs them."""

    @property
    def compared(self) -> tuple[Compared, ...]:
        from tongyun.codesign.fidelity import compare

        return compare(self.prediction.report, self.run.report)


def up(
    model: Annotated[
        str | None,
        typer.Option(help="A Qwen3 directory, or a hub id; default: the model that comes with it."),
    ] = None,
    random: Annotated[bool, typer.Option(help="Random weights for a catalogue model.")] = False,
    isl: Annotated[int, typer.Option(help="Prompt tokens of a request.")] = 128,
    osl: Annotated[int, typer.Option(help="Output tokens of a request.")] = 64,
    rate: Annotated[
        float | None, typer.Option(help="Requests a second; default: 60 % of the predicted capacity.")
    ] = None,
    requests: Annotated[int | None, typer.Option(help="Requests to send; default: 30 s of them.")] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and prompts.")] = 0,
    port: Annotated[int, typer.Option(help="Port to serve on; 0 takes a free one.")] = 8000,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine.")] = None,
    kernels: Annotated[str | None, typer.Option(help="torch, native or auto.")] = None,
    force: Annotated[bool, typer.Option(help="Measure the machine again first.")] = False,
    quick: Annotated[
        bool, typer.Option(help="A rough calibration in seconds; do not trust its figures.")
    ] = False,
    once: Annotated[bool, typer.Option("--once", "--exit", help="Stop after the table.")] = False,
    json: Annotated[bool, typer.Option("--json", help="For programs: SI units. Implies --once.")] = False,
) -> None:
    """Calibrate, plan, serve, load, compare; then keep serving until Ctrl-C."""
    _check(isl, osl, rate, requests)
    # A misspelt model is told before the machine is measured for a minute.
    directory, config = find(model, random=random)
    from tongyun.cli.calibrate import calibrated
    from tongyun.cloud.engine.calibrate.measure import setting
    from tongyun.cloud.engine.calibrate.pace import Pace, undisturbed_s

    chosen = setting(device=None, threads=threads, kernels=kernels, quick=quick)
    spec, _ = calibrated(chosen, force=force, quiet=json)
    load = Load(isl=isl, osl=osl, rate_per_s=rate, requests=requests, seed=seed)
    deployment = deploy(config, spec, isl + osl)
    begun = time.perf_counter()
    answer, capacity, arrivals, prediction = foresee(deployment, spec, load)
    machine = {} if spec.calibration is None else spec.calibration.machine
    if not json:
        _tell_plan(answer, deployment.limits.max_sequences, capacity, time.perf_counter() - begun)
    with served(directory, deployment, spec, port=port) as (url, server):
        with Pace(quickest_s=undisturbed_s(machine)) as pace:
            run = put(url, arrivals, seed=seed, quiet=json)
            felt = pace.read()
        outcome = Outcome(
            deployment=deployment,
            answer=answer,
            capacity_per_s=capacity,
            arrivals=arrivals,
            prediction=prediction,
            run=run,
            machine=machine,
            pace=felt,
        )
        _keep(outcome, load)
        _tell(outcome, as_json=json)
        if not (once or json):
            _stay(url, server)
    if outcome.run.report.failed:
        raise ServiceError(f"{outcome.run.report.failed} requests failed")


def _check(isl: int, osl: int, rate: float | None, requests: int | None) -> None:
    for flag, value, least in (("--isl", isl, 1), ("--osl", osl, 2), ("--requests", requests, 1)):
        if value is not None and value < least:
            raise InputError(f"{flag} {value}: accepted: {least} or more")
    if rate is not None and not 0 < rate < float("inf"):
        raise InputError(f"--rate {rate:g}: accepted: more than 0")


# ── what is served, and what is expected of it ───────────────────────────────────────


def find(model: str | None, *, random: bool) -> tuple[Path, ModelConfig]:
    """The model's directory and shape; with `random`, a checkpoint of random weights kept for next time."""
    from tongyun.model.config import ModelConfig

    if random:
        if model is None:
            raise InputError("--random needs --model, the catalogue name of a shape to fill")
        return _random(model)
    if model is None:
        from tongyun.model.bundled import DEFAULT, bundled_models

        if DEFAULT not in bundled_models():
            raise InputError(f"the model {DEFAULT} is not part of this copy; give --model")
        path = bundled_models()[DEFAULT]
        return path, ModelConfig.load(path)
    from tongyun.model.find import find_model

    path = find_model(model)
    return path, ModelConfig.load(path)


def _random(model: str) -> tuple[Path, ModelConfig]:
    from tongyun.model.config import ModelConfig
    from tongyun.model.tokenizer import write_byte_tokenizer
    from tongyun.model.weights import write_random_checkpoint
    from tongyun.specs import find_model
    from tongyun.store import home

    raw, name = find_model(model)
    config = ModelConfig.from_hf(raw, name=name, file=model)
    path = home() / "random" / name.replace("/", "--")
    done = path / "tokenizer.json"
    if not done.exists():
        write_random_checkpoint(path, config)
        write_byte_tokenizer(path)
    return path, replace(ModelConfig.load(path), name=name)


def deploy(config: ModelConfig, spec: ChipSpec, tokens: int) -> Deployment:
    """The engine's limits for requests of `tokens`: room for a full batch, or what memory allows."""
    from tongyun.codesign.predict import Deployment

    chip = spec.at()
    limits = _limits(config, spec, tokens)
    return Deployment(config=config, chip=chip, limits=limits)


def _limits(config: ModelConfig, spec: ChipSpec, tokens: int) -> SchedulerConfig:
    from tongyun.cli.engines import ServeOptions
    from tongyun.cloud.sched.scheduler import SchedulerConfig

    usual = ServeOptions(model="")
    block_tokens = 16
    if tokens > config.max_positions:
        raise InputError(f"--isl + --osl = {tokens}: {config.name} has {config.max_positions} positions")
    # One more request than run at once, so that what the prefix cache keeps does not evict.
    wanted = (usual.max_sequences + 1) * -(-tokens // block_tokens)
    room = int(KV_SHARE * spec.memory.capacity.value / _block_bytes(config, spec, block_tokens))
    blocks = max(wanted, -(-config.max_positions // block_tokens)) if room >= wanted else room
    blocks = min(blocks, room)
    return SchedulerConfig(
        blocks=blocks,
        block_tokens=block_tokens,
        max_context_tokens=min(config.max_positions, blocks * block_tokens),
        max_sequences=usual.max_sequences,
        max_step_tokens=usual.max_step_tokens,
        prefix_caching=usual.prefix_caching,
    )


def _block_bytes(config: ModelConfig, spec: ChipSpec, block_tokens: int) -> int:
    from tongyun.chip.calibrated import engine_precision
    from tongyun.model.steps import kv_bytes_per_token

    assert spec.calibration is not None
    return block_tokens * kv_bytes_per_token(config, engine_precision(spec.calibration))


def foresee(
    deployment: Deployment, spec: ChipSpec, load: Load
) -> tuple[Answer, float, list[Arrival], Prediction]:
    """Plan on this one machine, find its capacity, and predict the load."""
    from tongyun.chip.calibrated import engine_precision
    from tongyun.codesign.plan import plan
    from tongyun.codesign.space import Question

    assert spec.calibration is not None
    question = Question(
        model=deployment.config,
        chip=spec,
        chips=1,
        isl=load.isl,
        osl=load.osl,
        precision=engine_precision(spec.calibration),
    )
    capacity = deployment.capacity_per_s(load.isl, load.osl)
    arrivals = load.arrivals(capacity)
    return plan(question), capacity, arrivals, deployment.predict(arrivals, seed=load.seed)


# ── the server and the load ──────────────────────────────────────────────────────────


@contextmanager
def served(
    directory: Path, deployment: Deployment, spec: ChipSpec, *, port: int
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server process with the deployment's limits, its address once it takes requests; ended afterwards."""
    server = subprocess.Popen(_command(directory, deployment, spec, port), stdout=subprocess.PIPE, text=True)
    try:
        yield _address(server), server
    finally:
        if server.poll() is None:
            server.terminate()
        server.wait()


def _command(directory: Path, deployment: Deployment, spec: ChipSpec, port: int) -> list[str]:
    assert spec.calibration is not None
    machine, limits = spec.calibration.machine, deployment.limits
    each = _block_bytes(deployment.config, spec, limits.block_tokens)
    return [
        *(sys.executable, "-m", "tongyun", "serve", str(directory)),
        *("--name", deployment.config.name, "--port", str(port), "--device", str(machine["device"])),
        *("--threads", str(machine["engine_threads"]), "--kernels", str(machine["ops"])),
        # Half a block more, so that rounding cannot lose one.
        *("--kv-gb", repr((limits.blocks + 0.5) * each / 1e9), "--kv-dtype", str(machine["kv"])),
        *("--context", str(limits.max_context_tokens)),
        *("--max-sequences", str(limits.max_sequences), "--max-step-tokens", str(limits.max_step_tokens)),
    ]


def _address(server: subprocess.Popen[str]) -> str:
    """The address the server announces; its end before that is our end too."""
    assert server.stdout is not None
    for line in server.stdout:
        if found := ADDRESS.search(line):
            return found[1]
    raise ServiceError(f"the server ended with {server.wait()} before it took requests")


def put(url: str, arrivals: list[Arrival], *, seed: int, quiet: bool) -> LoadRun:
    """Send the load, with a progress bar unless `quiet`."""
    from tongyun.cli.bench import watched
    from tongyun.cloud.engine.cores import aside
    from tongyun.cloud.load import LoadOptions, measure
    from tongyun.cloud.probe import Target

    target, options = Target(url=url), LoadOptions(seed=seed)
    with aside():
        if quiet:
            return measure(target, arrivals, options)
        with watched(len(arrivals)) as observer:
            return measure(target, arrivals, options, observer)


def _keep(outcome: Outcome, load: Load) -> None:
    from tongyun.codesign.fidelity import keep

    level = f"{USE:.0%} of capacity" if load.rate_per_s is None else f"{load.rate_per_s:g}/s"
    keep(outcome.deployment.config.name, f"{level}, {load.isl}+{load.osl} tokens", outcome.compared)


def _stay(url: str, server: subprocess.Popen[str]) -> None:
    typer.echo(f"serving at {url}/v1 until Ctrl-C")
    try:
        server.wait()
    except KeyboardInterrupt:
        typer.echo("stopping", err=True)
        return
    raise ServiceError(f"the server ended with {server.returncode}")


# ── what is shown ────────────────────────────────────────────────────────────────────


def _tell_plan(answer: Answer, most: int, capacity_per_s: float, seconds: float) -> None:
    """The best plan of those that run at most so many requests at once, as the server will."""
    from tongyun.report import number

    offers = [offer for offer in answer.pareto if offer.plan.batch <= most]
    if offers:
        best = max(offers, key=lambda offer: offer.figures.tok_s_per_chip)
        typer.echo(
            f"plan: batch {best.plan.batch}, {number(best.figures.tok_s_per_chip)} tokens/s at most; "
            f"{number(capacity_per_s)} requests/s of this load at capacity ({seconds:.1f} s)"
        )


def _tell(outcome: Outcome, *, as_json: bool) -> None:
    from tongyun.cloud.engine.calibrate.pace import served_pace
    from tongyun.report import column, console, quantity, source_tag, table, to_json
    from tongyun.units import Source

    if as_json:
        typer.echo(to_json(as_dict(outcome)))
        return
    rows = [
        [c.name, quantity(c.predicted, c.unit), quantity(c.measured, c.unit), f"{c.error:+.1%}"]
        for c in outcome.compared
    ]
    columns = (column("figure", left=True), column("predicted"), column("measured"), column("error"))
    measured = source_tag(Source.MEASURED)
    source = (
        f"{source_tag(Source.SIMULATED)} beside {measured}"
        f"\nprocessors: {outcome.pace:.2f} times as slow as undisturbed meanwhile, "
        f"{served_pace(outcome.machine):.2f} when serving was calibrated, {measured}"
    )
    title = f"{outcome.deployment.config.name} on this machine, {len(outcome.arrivals)} requests"
    console().print(table(title, columns, rows, caption=source))


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """Everything for `--json`, in SI."""
    calibration = outcome.deployment.chip.calibration
    first, last = outcome.arrivals[0], outcome.arrivals[-1]
    best = outcome.answer.best
    return {
        "model": outcome.deployment.config.name,
        "machine": dict(outcome.machine),
        "calibrated": calibration.when if calibration else None,
        "plan": None if best is None else {"plan": best.plan, "figures": best.figures},
        "capacity_requests_per_s": outcome.capacity_per_s,
        "load": {
            "requests": len(outcome.arrivals),
            "rate_per_s": len(outcome.arrivals) / last.time_s if last.time_s else None,
            "isl": first.prompt_tokens,
            "osl": first.output_tokens,
        },
        "predicted": {c.name: c.predicted for c in outcome.compared},
        "measured": {c.name: c.measured for c in outcome.compared},
        "error": {c.name: c.error for c in outcome.compared},
        "failed": outcome.run.report.failed,
        "pace": outcome.pace,
        "sources": {"predicted": "simulated", "measured": "measured", "pace": "measured"},
    }
