"""What the openai client measures on a twin, beside what the simulation of its fleet predicted.

    python benchmarks/twin.py [--seconds 30] [--cell NAME ...] [--json]

For each fleet and load: `tongyun simulate`'s prediction first, then `tongyun serve --twin` in a
process of its own, and the openai client in another (`openai_load.py`), which sends the same
lengths at the same moments. Bars: p50 within 3 %, p99 within 10 %. The client's own work, and
HTTP, are no part of a fleet's time: how much they take is measured first, at a gateway whose engine
answers at once, and told the twin (`--client-ms`). `--as-it-is` tells it nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tongyun.cli.fleet import read_fleet
from tongyun.cloud.latency import Percentiles
from tongyun.cloud.sched.router import find_router
from tongyun.cloud.workload import (
    Arrivals,
    Distribution,
    Lengths,
    Process,
    Workload,
    sample,
)
from tongyun.report import column, table, to_json
from tongyun.units import MS

CLIENT = Path(__file__).parent / "openai_load.py"
INSTANT = Path(__file__).parents[1] / "tests" / "e2e" / "fake_server.py"
BARS = {"p50": 0.03, "p99": 0.10}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A fleet under a load. Lengths are lognormal, with these means."""

    name: str
    fleet: str
    rate_per_s: float
    prompt: int
    output: int


MIXED = """
name = "four-of-two"
model = "Qwen/Qwen3-32B"
chip = "h200"

[[pool]]
replicas = 4
tp = 2
step_tokens = 2048
"""
POOLS = """
name = "prefill-and-decode"
model = "Qwen/Qwen3-32B"
chip = "h200"

[[pool]]
role = "prefill"
replicas = 1
tp = 4
step_tokens = 4096

[[pool]]
role = "decode"
replicas = 2
tp = 2
"""
ALONE = """
name = "alone"
model = "Qwen/Qwen3-8B"
chip = "a100"

[[pool]]
replicas = 1
step_tokens = 512
"""
CELLS = (
    Cell(name="8 × H200, light", fleet=MIXED, rate_per_s=2.0, prompt=3000, output=150),
    Cell(name="8 × H200, busy", fleet=MIXED, rate_per_s=6.0, prompt=3000, output=150),
    Cell(name="8 × H200, pools", fleet=POOLS, rate_per_s=4.0, prompt=3000, output=150),
    Cell(name="A100, near its limit", fleet=ALONE, rate_per_s=4.0, prompt=1500, output=100),
)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One percentile both ways."""

    name: str
    predicted_s: float
    measured_s: float
    bar: float

    @property
    def error(self) -> float:
        return self.measured_s / self.predicted_s - 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """A cell with its figures; `lag_s` is how late the client itself was, at its 99th percentile."""

    cell: str
    requests: int
    figures: tuple[Figure, ...]
    lag_s: float


def lengths(mean: int) -> Lengths:
    return Lengths(distribution=Distribution.LOGNORMAL, mean=mean, variation=0.6, low=8, high=4 * mean)


def measure(cell: Cell, seconds: float, seed: int, client_s: float) -> Row:
    workload = Workload(
        arrivals=Arrivals(process=Process.POISSON, rate_per_s=cell.rate_per_s),
        prompt=lengths(cell.prompt),
        output=lengths(cell.output),
        requests=round(cell.rate_per_s * seconds),
        seed=seed,
    )
    arrivals = sample(workload)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "fleet.toml"
        file.write_text(cell.fleet)
        spec, fleet = read_fleet(file)
        predicted = fleet.play(arrivals, find_router(spec.router), chip=fleet.question.chip.at(), seed=seed)
        with twin(file, client_s) as url:
            felt = sent(url, spec.model, [(*one[:3],) for one in arrivals], seed)
    for arrival, (*_, counted) in zip(arrivals, felt, strict=True):
        if counted != [arrival.prompt_tokens, arrival.output_tokens]:
            raise SystemExit(f"{arrival.prompt_tokens} + {arrival.output_tokens} tokens became {counted}")
    report = predicted.report
    measured = {
        "TTFT": (report.ttft_s, [ttft for _, ttft, *_ in felt]),
        "TPOT": (report.tpot_s, [(e2e - ttft) / (n - 1) for _, ttft, e2e, (_, n) in felt if n > 1]),
        "end to end": (report.latency_s, [e2e for _, _, e2e, _ in felt]),
    }
    return Row(
        cell=cell.name,
        requests=len(arrivals),
        figures=tuple(
            Figure(
                name=f"{name} {point}",
                predicted_s=getattr(expected, point),
                measured_s=getattr(Percentiles.of(values), point),
                bar=bar,
            )
            for name, (expected, values) in measured.items()
            for point, bar in BARS.items()
        ),
        lag_s=Percentiles.of([lag for lag, *_ in felt]).p99,  # type: ignore[union-attr]
    )


@contextmanager
def twin(file: Path, client_s: float) -> Iterator[str]:
    """`tongyun serve --twin` in a process of its own; yields the URL once it takes requests."""
    command = [sys.executable, "-m", "tongyun", "serve", "--twin", "--fleet", str(file), "--port", "0"]
    command += ["--client-ms", f"{client_s / MS:.2f}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().rsplit(" ", 1)[-1].strip()
        finally:
            server.terminate()
            server.wait()


def sent(url: str, model: str, load: list[tuple[float, int, int]], seed: int) -> list[list[Any]]:
    """A load (moment, prompt tokens, output tokens) through the openai client in a process of its own."""
    rng = random.Random(seed)
    told = {
        "url": url,
        "model": model,
        "requests": [[moment_s, text(prompt, rng), output] for moment_s, prompt, output in load],
    }
    done = subprocess.run(
        [sys.executable, str(CLIENT)], input=json.dumps(told), stdout=subprocess.PIPE, text=True, check=True
    )
    felt: list[list[Any]] = json.loads(done.stdout)
    return felt


def floor_s() -> float:
    """The client's median time to the first token where the engine takes half a millisecond."""
    command = [sys.executable, str(INSTANT), "0", "1", "0.0005"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        felt = sent(f"{url}/v1", "fake", [(i / 10, 3000, 5) for i in range(40)], 0)
        server.terminate()
        server.communicate()
    return statistics.median(ttft_s for _, ttft_s, *_ in felt)


def text(tokens: int, rng: random.Random) -> str:
    """Unlike any other, of so many words, each a token to the twin's stand-in for a tokenizer.

    Text, because the openai client takes tens of milliseconds to look through a list of ids.
    """
    return "".join(" " + "".join(rng.choices("abcdefghijklmnop", k=5)) for _ in range(tokens))


def show(rows: list[Row], floor: float, told_s: float) -> None:
    columns = [column("fleet and load", left=True), column("figure", left=True)]
    columns += [column(name) for name in ("predicted ms", "measured ms", "error", "bar", "")]
    lines = [
        [
            f"{row.cell}, {row.requests} requests" if not i else "",
            one.name,
            f"{one.predicted_s / MS:.2f}",
            f"{one.measured_s / MS:.2f}",
            f"{one.error:+.2%}",
            f"{one.bar:.0%}",
            "met" if abs(one.error) <= one.bar else "NOT MET",
        ]
        for row in rows
        for i, one in enumerate(row.figures)
    ]
    late = ", ".join(f"{row.lag_s / MS:.1f}" for row in rows)
    caption = (
        f"predicted: simulated; measured: the openai client, which itself left {late} ms late (p99), "
        f"and needs {floor / MS:.1f} ms to the first token of an engine that answers at once "
        f"({'told the twin' if told_s else 'not told the twin'})"
    )
    Console(width=120).print(table("The twin beside its simulation", columns, lines, caption=caption))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="how long each load lasts")
    parser.add_argument("--cell", action="append", help="only these, by a part of their names")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--as-it-is", action="store_true", help="do not tell the twin what the client takes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    wanted = [cell for cell in CELLS if not args.cell or any(part in cell.name for part in args.cell)]
    floor = floor_s()
    told_s = 0.0 if args.as_it_is else floor
    rows = [measure(cell, args.seconds, args.seed, told_s) for cell in wanted]
    if args.json:
        print(to_json({"rows": rows, "floor_s": floor}))
    else:
        show(rows, floor, told_s)


if __name__ == "__main__":
    main()
