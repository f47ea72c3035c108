"""A skewed load on two engines, with requests that move between them and without.

    python benchmarks/moving.py [--router R] [--seconds 30] [--rate 4] [--kv-gb 0.01] [--rounds 2]

Every other request is long and, by round robin, one engine's, whose KV cache it soon fills; the other engine
has the short ones; another router has its own way. `tongyun serve stdlib-moe --replicas 2 --router R` is
sent the same arrivals without and with `--migrate`, in turns. Then the pause of a request that was
moved is set beside a decode step, and beside what computing it again would take: the time to the first token
of a prompt as long as what was moved, on an idle server.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from rich.console import Console

from tongyun.cloud.latency import Percentiles, RequestRecord
from tongyun.cloud.load import LoadOptions, measure
from tongyun.cloud.probe import Target
from tongyun.cloud.workload import Arrival
from tongyun.model.bundled import bundled_models
from tongyun.model.config import ModelConfig
from tongyun.report import column, number, table
from tongyun.units import MS

MODEL = "stdlib-moe"
MIGRATE = "--migrate"
SHORT = 8
LONG = (300, 800)
PROMPT = (50, 150)


@dataclass
class Felt:
    """What one way of serving came to, over all rounds."""

    records: list[RequestRecord] = field(default_factory=list)
    counted: dict[str, float] = field(default_factory=dict)
    """Of `/metrics`, what happened during the loads."""
    moved: int = 0
    """Tokens of a request that was moved, on average."""
    recompute_s: float = 0.0

    def add(self, before: dict[str, float], after: dict[str, float]) -> None:
        for name, value in after.items():
            self.counted[name] = self.counted.get(name, 0.0) + value - before.get(name, 0.0)


def arrivals(seconds: float, rate_per_s: float, seed: int) -> list[Arrival]:
    """Poisson; long and short ones in turn."""
    rng, found, moment_s = random.Random(seed), [], 0.0
    while (moment_s := moment_s + rng.expovariate(rate_per_s)) < seconds:
        output = SHORT if len(found) % 2 else rng.randint(*LONG)
        found.append(Arrival(moment_s, rng.randint(*PROMPT), output))
    return found


@contextmanager
def served(kv_gb: float, router: str, *flags: str) -> Iterator[str]:
    """Two engines behind a gateway; yields the URL once it takes requests."""
    command = [sys.executable, "-m", "tongyun", "serve", MODEL, "--port", "0", "--replicas", "2"]
    command += ["--router", router, "--kv-gb", str(kv_gb), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().rsplit(" ", 1)[-1].strip().removesuffix("/v1")
        finally:
            server.terminate()
            server.wait()


def metrics(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    pairs = (line.rpartition(" ") for line in lines if line.startswith("tongyun_"))
    return {name.removeprefix("tongyun_"): float(value) for name, _, value in pairs}


def first_token_s(url: str, tokens: int) -> float:
    """Median time to the first token of a prompt that long, one after the other."""
    load = [Arrival(0.25 * i, tokens, 1) for i in range(10)]
    report = measure(Target(url=f"{url}/v1"), load, LoadOptions(warmup_requests=2)).report
    assert report.ttft_s is not None
    return report.ttft_s.p50


def run(felt: Felt, load: Sequence[Arrival], *how: Any) -> None:
    with served(*how) as url:
        # Opens connections, and makes the operations ready.
        measure(Target(url=f"{url}/v1"), [Arrival(0.0, 100, 50)] * 8, LoadOptions())
        before = metrics(url)
        felt.records += measure(Target(url=f"{url}/v1"), load, LoadOptions(warmup_requests=2)).records
        felt.add(before, metrics(url))
        if felt.counted.get("move_downtime_seconds_count"):
            moves = felt.counted["move_downtime_seconds_count"]
            token_bytes = 4 * ModelConfig.load(bundled_models()[MODEL]).kv_elements
            felt.moved = round(felt.counted["moved_bytes_total"] / moves / token_bytes)
            felt.recompute_s = first_token_s(url, felt.moved)


def show(ways: dict[str, Felt], args: argparse.Namespace) -> None:
    columns = [column("", left=True), *(column(name) for name in ways)]
    rows = [["requests ended", *(str(sum(one.ok for one in felt.records)) for felt in ways.values())]]
    figures = {
        "TTFT": lambda one: one.ttft_s,
        "TPOT": lambda one: one.tpot_s,
        "end to end": lambda one: one.latency_s,
    }
    for name, figure in figures.items():
        told = [Percentiles.of(map(figure, felt.records)) for felt in ways.values()]
        for point in ("p50", "p99"):
            cells = (number(getattr(one, point) / MS) for one in told if one is not None)
            rows.append([f"{name} ms {point}", *cells])
    for name, key in {
        "preemptions": "preemptions_total",
        "requests moved while decoding": 'moves_total{outcome="migrated"}',
        "  while they waited": 'moves_total{outcome="rescheduled"}',
        "  called off": 'moves_total{outcome="called off"}',
        "  computed again": 'moves_total{outcome="recomputed"}',
    }.items():
        rows.append([name, *(f"{felt.counted.get(key, 0):.0f}" for felt in ways.values())])
    load = f"{args.rounds} × {args.seconds:g} s, {args.rate:g} requests/s"
    caption = f"measured; {args.router}, {load}, {args.kv_gb:g} GB of KV each"
    Console(width=110).print(table("", columns, rows))
    print(caption)
    felt = ways[MIGRATE]
    moves = felt.counted["move_downtime_seconds_count"]
    if not moves:
        print("nothing moved while it decoded")
        return
    pause_s = felt.counted["move_downtime_seconds_sum"] / moves
    step_s = felt.counted["engine_busy_seconds_total"] / felt.counted["engine_steps_total"]
    print(
        f"pause of a move, mean of {moves:.0f}: {pause_s / MS:.2f} ms,"
        f" {pause_s / step_s:.2f} steps of {step_s / MS:.2f} ms;\n"
        f"{felt.moved} tokens, the mean of these, computed again on an idle engine:"
        f" {felt.recompute_s / MS:.1f} ms (measured)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="how long each load lasts")
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second, long and short")
    parser.add_argument("--kv-gb", type=float, default=0.01, help="KV cache of each engine")
    parser.add_argument("--router", default="round-robin")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    ways = {"without": Felt(), MIGRATE: Felt()}
    for turn in range(args.rounds):
        load = arrivals(args.seconds, args.rate, args.seed + turn)
        for name, felt in ways.items():
            run(felt, load, args.kv_gb, args.router, *([name] if name == MIGRATE else []))
    show(ways, args)


if __name__ == "__main__":
    main()
