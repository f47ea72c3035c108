"""How well a served load is predicted on this machine: models × load levels, every figure with its error.

    python benchmarks/fidelity.py [--model NAME_OR_DIRECTORY ...] [--seconds 60] [--json]

Without `--model`: the model that comes with Tongyun, and random weights in the shape of
Qwen3-0.6B. The machine is calibrated first unless it is already; the prediction of a level
is made before its first request leaves. Levels are shares of the predicted capacity, which
is itself held against a measurement: what the server ends per second under more than it
can do. Before and after each level some of the calibration's own samples are taken again. A
level begins when the machine is as fast as when it was calibrated, or after `--patience`
seconds of waiting for that; one during which it was not is measured again, at most `--tries`
times, and says so if it never was.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console

from tongyun.cli.calibrate import calibrated
from tongyun.cli.up import Load, deploy, find, put, served
from tongyun.cloud.engine.calibrate.measure import setting
from tongyun.cloud.engine.calibrate.pace import pace
from tongyun.cloud.workload import Arrival
from tongyun.codesign.fidelity import Compared, compare, keep
from tongyun.report import column, quantity, table, to_json
from tongyun.specs import names

LEVELS = (0.3, 0.6, 0.85)
SHOWN = ("TTFT p50", "TTFT p99", "TPOT p50", "throughput")
RANDOM = "Qwen/Qwen3-0.6B"
STEADY = 0.06


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model at one level: all its figures both ways."""

    model: str
    level: str
    rate_per_s: float
    requests: int
    figures: tuple[Compared, ...]
    pace: tuple[float, float]
    """What the calibration's samples took just before and just after, over what they took then."""
    attempt: int

    @property
    def steady(self) -> bool:
        return all(map(_near, self.pace))


def _near(pace: float) -> bool:
    return abs(pace - 1) <= STEADY


def _steady(pace: Callable[[], float], patience_s: float) -> float:
    """The machine's pace once it is that of the calibration, or when patience has run out."""
    begun = time.monotonic()
    while not _near(now := pace()) and time.monotonic() - begun < patience_s:
        time.sleep(1.0)
    return now


def measure(model: str | None, args: argparse.Namespace) -> Iterator[Row]:
    """Capacity first, then each level, against one server."""
    here = setting(device=None, threads=args.threads, kernels=None, quick=False)
    spec, _ = calibrated(here)
    bench = here.bench()
    directory, config = find(model, random=model in names("models"))
    deployment = deploy(config, spec, args.isl + args.osl)
    capacity = deployment.capacity_per_s(args.isl, args.osl)
    with served(directory, deployment, spec, port=0) as (url, _):

        def level(name: str, rate_per_s: float, load: Callable[[int], list[Arrival]], first: int) -> Row:
            for attempt in range(1, args.tries + 1):
                # Other prompts each time: the server remembers the prefixes of those before.
                seed = args.seed + first + 100 * attempt
                arrivals = load(seed)
                predicted = deployment.predict(arrivals, seed=seed).report
                before = _steady(lambda: pace(bench, deployment.chip.calibration), args.patience)
                measured = put(url, arrivals, seed=seed, quiet=args.json).report
                row = Row(
                    model=config.name,
                    level=name,
                    rate_per_s=rate_per_s,
                    requests=len(arrivals),
                    figures=compare(predicted, measured),
                    pace=(before, pace(bench, deployment.chip.calibration)),
                    attempt=attempt,
                )
                print(f"{name}, try {attempt}: {_errors(row)}", file=sys.stderr)
                if row.steady:
                    break
            return row

        for number, share in enumerate(LEVELS):
            rate = share * capacity
            count = max(args.least, round(args.seconds * rate))

            def open_loop(seed: int, rate: float = rate, count: int = count) -> list[Arrival]:
                load = Load(isl=args.isl, osl=args.osl, rate_per_s=rate, requests=count, seed=seed)
                return load.arrivals(capacity)

            yield level(f"{share:.0%} of capacity", rate, open_loop, number)
        # Everything at once: what the server can do at most.
        count = min(args.most, max(args.least, round(args.seconds * capacity)))
        yield level("at once", capacity, lambda _: [Arrival(0.0, args.isl, args.osl)] * count, len(LEVELS))


def _errors(row: Row) -> str:
    """The errors of a row and the machine's pace, in a line."""
    errors = (f"{c.name} {c.error:+.1%}" for c in row.figures if c.name in SHOWN)
    return f"{', '.join(errors)}; machine {row.pace[0]:.2f}, {row.pace[1]:.2f}"


def show(rows: list[Row]) -> None:
    columns = [column("model", left=True), column("load", left=True), column("requests"), column("machine")]
    columns += [column(name) for name in SHOWN]
    lines = []
    for row in rows:
        by_name = {figure.name: figure for figure in row.figures}
        cells = [by_name[name] for name in SHOWN]
        lines.append(
            [
                row.model,
                row.level,
                f"{row.requests} at {row.rate_per_s:.3g}/s",
                f"{row.pace[0]:.2f}, {row.pace[1]:.2f}" + ("" if row.steady else " not steady"),
                *(
                    f"{quantity(c.predicted, c.unit)} | {quantity(c.measured, c.unit)} | {c.error:+.1%}"
                    for c in cells
                ),
            ]
        )
    caption = (
        "predicted (simulated on the calibrated machine) | measured (`tongyun serve`, same load) | error\n"
        "machine: what samples of the calibration took before and after, over what they took in it"
    )
    Console(width=170).print(table("Predicted and measured", columns, lines, caption=caption))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", help="directory, or catalogue name for random weights")
    parser.add_argument("--isl", type=int, default=128)
    parser.add_argument("--osl", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long each level lasts")
    parser.add_argument("--least", type=int, default=20, help="requests of a level, at least")
    parser.add_argument("--most", type=int, default=192, help="requests of the last row, at most")
    parser.add_argument("--tries", type=int, default=3, help="of a level while the machine is not steady")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for a steady machine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for model in args.model or [None, RANDOM]:
        for row in measure(model, args):
            keep(row.model, f"{row.level}, {args.isl}+{args.osl} tokens", row.figures)
            rows.append(row)
    if args.json:
        print(to_json(rows))
    else:
        show(rows)


if __name__ == "__main__":
    main()
