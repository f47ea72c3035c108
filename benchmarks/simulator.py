"""How many requests a second the simulated engine plays, by leaps and step by step.

    python benchmarks/simulator.py [--requests 1000] [--qps 6.45] [--repeat 5] [--json]
    python benchmarks/simulator.py --trace mooncake_conversation.jsonl [--json]

Llama-3.1-8B on one A100, Poisson arrivals, conversation-like lengths (lognormal, mean 1,155
prompt and 211 output tokens, the means of the public Azure conversation trace of 2023).
Seconds are those of the simulation alone, tables filled anew each time; the process's own
start is printed beside it. All ways must agree on every record, or nothing is printed.
`recorded` takes the run down over time as well, as `tongyun simulate` does.

With `--trace`: all of it on Qwen3-235B-A22B in fp8 on 64 H200, four replicas of eight chips that
prefill and four that decode, from reading the file to the last record.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tongyun.cli.fleet import read_fleet
from tongyun.cloud.engine.simulated import LeapingExecutor, SimulatedExecutor
from tongyun.cloud.engine.step_table import StepTable
from tongyun.cloud.instance import Simulated
from tongyun.cloud.record import Recorder
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.router import find_router
from tongyun.cloud.sched.scheduler import SchedulerConfig
from tongyun.cloud.simulate import simulate
from tongyun.cloud.trace import read_trace
from tongyun.cloud.workload import Arrivals, Distribution, Lengths, Process, Workload, requests, sample
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision
from tongyun.report import column, table, to_json
from tongyun.specs import find_chip, find_model

MODEL, CHIP = "meta-llama/Llama-3.1-8B", "a100"
LIMITS = SchedulerConfig(
    blocks=24_000,
    block_tokens=16,
    max_context_tokens=8192,
    max_sequences=128,
    max_step_tokens=512,
    prefix_caching=False,
)
"""KV of 8 B bf16 in 80 GB (16 GB weights, 131 kB a token): 384,000 tokens take 50 GB."""

POOLS = """
name = "mooncake-hour"
model = "Qwen/Qwen3-235B-A22B"
chip = "h200"
dtype = "fp8"

[[pool]]
role = "prefill"
replicas = 4
tp = 4
ep = 8
dp = 2
step_tokens = 2048

[[pool]]
role = "decode"
replicas = 4
tp = 4
ep = 8
dp = 2
step_tokens = 2048
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to simulate: requests and steps a second."""

    way: str
    seconds: float
    requests_per_s: float
    steps: int


def load(args: argparse.Namespace, vocabulary: int) -> list[Request]:
    """The requests, the same for both ways."""
    workload = Workload(
        arrivals=Arrivals(process=Process.POISSON, rate_per_s=args.qps),
        prompt=Lengths(distribution=Distribution.LOGNORMAL, mean=1155, variation=1.0, low=4, high=7000),
        output=Lengths(distribution=Distribution.LOGNORMAL, mean=211, variation=0.8, low=2, high=1000),
        requests=args.requests,
        seed=0,
    )
    return list(requests(sample(workload), vocabulary=vocabulary, seed=0))


def measure(args: argparse.Namespace) -> list[Row]:
    raw, name = find_model(MODEL)
    config = ModelConfig.from_hf(raw, name=name, file=name)
    played = load(args, config.vocab)
    rows, seen = [], {}
    ways = (
        ("by leaps", LeapingExecutor),
        ("by leaps, recorded", LeapingExecutor),
        ("by steps", SimulatedExecutor),
    )
    for way, kind in ways:
        seconds = []
        for _ in range(args.repeat if kind is LeapingExecutor else 1):
            recorder = Recorder()
            tape = recorder.pool("mixed", 1, LIMITS.blocks)[0] if "recorded" in way else None
            begun = time.perf_counter()
            price = StepTable(
                config,
                find_chip(CHIP).at(),
                Precision(),
                max_step_tokens=LIMITS.max_step_tokens,
                max_context_tokens=LIMITS.max_context_tokens,
            )
            seen[way] = simulate(played, LIMITS, kind(price, vocabulary=config.vocab), tape=tape)
            if tape is not None:
                recorder.recording(seen[way].records)
            seconds.append(time.perf_counter() - begun)
        took = statistics.median(seconds)
        rows.append(
            Row(way=way, seconds=took, requests_per_s=args.requests / took, steps=seen[way].stats.steps)
        )
    for one in seen.values():
        _agree(seen["by leaps"], one)
    return rows


def replay(trace: Path) -> Row:
    """A trace on the pools; prompts the model cannot take are refused and counted as played."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "fleet.toml"
        file.write_text(POOLS)
        begun = time.perf_counter()
        spec, fleet = read_fleet(file)
        arrivals = read_trace(trace)
        played = fleet.play(arrivals, find_router(spec.router), chip=fleet.question.chip.at())
        took = time.perf_counter() - begun
    return Row(
        way=f"{played.report.succeeded:,} of {len(arrivals):,} served",
        seconds=took,
        requests_per_s=len(arrivals) / took,
        steps=sum(one.steps for one in played.engines),
    )


def _agree(ours: Simulated, theirs: Simulated) -> None:
    if ours != theirs:
        raise SystemExit("the two simulations differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--qps", type=float, default=6.45)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--trace", type=Path, help="play this on pools of 64 H200 instead")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = measure(args) if args.trace is None else [replay(args.trace)]
    memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if args.json:
        print(to_json({"rows": rows, "memory_mb": memory_mb}))
        return
    columns = [column("way", left=True), column("seconds"), column("requests/s"), column("steps")]
    lines = [[r.way, f"{r.seconds:.3f}", f"{r.requests_per_s:,.0f}", f"{r.steps:,}"] for r in rows]
    title = f"{args.requests} requests at {args.qps}/s, {MODEL} on one {CHIP}"
    caption = "records of all ways are equal to the last bit; "
    if args.trace is not None:
        title, caption = f"{args.trace.name} on 64 H200 in two pools", ""
    caption += f"peak memory {memory_mb:.0f} MB"
    Console(width=110).print(table(title, columns, lines, caption=caption))


if __name__ == "__main__":
    main()
