"""How well a served load is predicted on this machine: models × load levels, every figure with its error.

    python benchmarks/fidelity.py [--model NAME_OR_DIRECTORY ...] [--seconds 60] [--json]

Without `--model`: the model that comes with Tongyun, and random weights in the shape of
Qwen3-0.6B. The machine is calibrated first unless it is already; the prediction of a level
is made before its first request leaves. Levels are shares of the predicted capacity, which
is itself held against a measurement: what the server ends per second under more than it
can do. How fast the processors run is sampled all the while, in the calibration and under
each load, without a look at what is measured: where others slow them down, the calibration
measures again, for `--patience` seconds in all; and a level is measured again, up to `--tries`
times, if they were not as fast as when serving was calibrated. The row is the try whose pace
was nearest to that, and says if none was near.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console

from tongyun.cli.calibrate import calibrated
from tongyun.cli.up import Load, deploy, find, put, served
from tongyun.cloud.engine.calibrate.measure import setting
from tongyun.cloud.engine.calibrate.pace import LOOP, SERVED_PACE, Pace
from tongyun.cloud.workload import Arrival
from tongyun.codesign.fidelity import Compared, compare, keep
from tongyun.report import column, quantity, table, to_json
from tongyun.specs import names

LEVELS = (0.3, 0.6, 0.85)
SHOWN = ("TTFT p50", "TTFT p99", "TPOT p50", "throughput")
RANDOM = "Qwen/Qwen3-0.6B"
ALIKE = 0.04


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model at one level: all its figures both ways."""

    model: str
    level: str
    rate_per_s: float
    requests: int
    figures: tuple[Compared, ...]
    pace: float
    """How much slower the processors were meanwhile than when nothing disturbs them."""
    tries: int
    calibrated: float
    """The same, while serving was calibrated."""

    @property
    def off(self) -> float:
        """How far the pace was from the calibration's."""
        return abs(self.pace / self.calibrated - 1)

    @property
    def alike(self) -> bool:
        return self.off <= ALIKE


def measure(model: str | None, args: argparse.Namespace) -> Iterator[Row]:
    """Capacity first, then each level, against one server."""
    here = setting(device=None, threads=args.threads, kernels=None, quick=False)
    spec, _ = calibrated(here, patience_s=args.patience)
    machine = {} if spec.calibration is None else spec.calibration.machine
    quickest_s = float(machine[LOOP]) if LOOP in machine else None
    directory, config = find(model, random=model in names("models"))
    deployment = deploy(config, spec, args.isl + args.osl)
    capacity = deployment.capacity_per_s(args.isl, args.osl)
    with served(directory, deployment, spec, port=0) as (url, _), Pace(quickest_s=quickest_s) as pace:

        def level(name: str, rate_per_s: float, load: Callable[[int], list[Arrival]], first: int) -> Row:
            rows: list[Row] = []
            while len(rows) < args.tries and not (rows and rows[-1].alike):
                # Other prompts each time: the server remembers the prefixes of those before.
                seed = args.seed + first + 100 * len(rows)
                arrivals = load(seed)
                predicted = deployment.predict(arrivals, seed=seed).report
                pace.read()
                measured = put(url, arrivals, seed=seed, quiet=args.json).report
                row = Row(
                    model=config.name,
                    level=name,
                    rate_per_s=rate_per_s,
                    requests=len(arrivals),
                    figures=compare(predicted, measured),
                    pace=pace.read(),
                    tries=len(rows) + 1,
                    calibrated=float(machine.get(SERVED_PACE, 1.0)),
                )
                print(f"{name}, try {row.tries}: {_errors(row)}", file=sys.stderr)
                rows.append(row)
            return min(rows, key=lambda row: row.off)

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
    return f"{', '.join(errors)}; machine {row.pace:.2f}"


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
                f"{row.pace:.2f}, try {row.tries}" + ("" if row.alike else ", not alike"),
                *(
                    f"{quantity(c.predicted, c.unit)} | {quantity(c.measured, c.unit)} | {c.error:+.1%}"
                    for c in cells
                ),
            ]
        )
    caption = (
        "predicted (simulated on the calibrated machine) | measured (`tongyun serve`, same load) | error\n"
        "machine: how much slower the processors were meanwhile than undisturbed; "
        f"{rows[0].calibrated:.2f} when serving was calibrated"
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
    parser.add_argument(
        "--tries", type=int, default=5, help="of a level, if the machine was not as fast as when calibrated"
    )
    parser.add_argument(
        "--patience", type=float, default=120.0, help="seconds for calibrating again what was disturbed"
    )
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
