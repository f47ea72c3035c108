"""How well a served load is predicted on this machine: models × load levels, every figure with its error.

    python benchmarks/fidelity.py [--model NAME_OR_DIRECTORY ...] [--seconds 60] [--json]

Without `--model`: the model that comes with Tongyun, and random weights in the shape of
Qwen3-0.6B. The machine is calibrated first unless it is already; the prediction of a level
is made before its first request leaves. Levels are shares of the predicted capacity, which
is itself held against a measurement: what the server ends per second under more than it
can do.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console

from tongyun.cli.calibrate import calibrated
from tongyun.cli.up import Load, deploy, find, put, served
from tongyun.cloud.engine.calibrate.measure import setting
from tongyun.cloud.workload import Arrival
from tongyun.codesign.fidelity import Compared, compare, keep
from tongyun.codesign.predict import Deployment
from tongyun.report import column, quantity, table, to_json
from tongyun.specs import names

LEVELS = (0.3, 0.6, 0.85)
OVERLOAD = 2.0
SHOWN = ("TTFT p50", "TTFT p99", "TPOT p50", "throughput")
RANDOM = "Qwen/Qwen3-0.6B"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model at one level: all its figures both ways."""

    model: str
    level: str
    rate_per_s: float
    requests: int
    figures: tuple[Compared, ...]


def measure(model: str | None, args: argparse.Namespace) -> Iterator[Row]:
    """Capacity first, then each level, against one server."""
    spec, _ = calibrated(setting(device=None, threads=args.threads, kernels=None, quick=False))
    directory, config = find(model, random=model in names("models"))
    deployment = deploy(config, spec, args.isl + args.osl)
    capacity = deployment.capacity_per_s(args.isl, args.osl)
    with served(directory, deployment, spec, port=0) as (url, _):
        for number, level in enumerate(LEVELS):
            # Other prompts at each level: the server remembers the prefixes of those before.
            seed = args.seed + number
            load = Load(
                isl=args.isl,
                osl=args.osl,
                rate_per_s=level * capacity,
                requests=max(args.least, round(args.seconds * level * capacity)),
                seed=seed,
            )
            arrivals = load.arrivals(capacity)
            predicted = deployment.predict(arrivals, seed=seed).report
            measured = put(url, arrivals, seed=seed, quiet=args.json).report
            yield Row(
                model=config.name,
                level=f"{level:.0%} of capacity",
                rate_per_s=level * capacity,
                requests=len(arrivals),
                figures=compare(predicted, measured),
            )
        yield _saturated(deployment, url, capacity, args)


def _saturated(deployment: Deployment, url: str, capacity: float, args: argparse.Namespace) -> Row:
    """Everything at once: what the server can do at most."""
    seed = args.seed + len(LEVELS)
    count = min(args.most, max(args.least, round(args.seconds * capacity)))
    arrivals = [Arrival(0.0, args.isl, args.osl)] * count
    predicted = deployment.predict(arrivals, seed=seed).report
    measured = put(url, arrivals, seed=seed, quiet=args.json).report
    return Row(
        model=deployment.config.name,
        level="at once",
        rate_per_s=capacity,
        requests=count,
        figures=compare(predicted, measured),
    )


def show(rows: list[Row]) -> None:
    columns = [column("model", left=True), column("load", left=True), column("requests")]
    columns += [column(f"{name}, predicted | measured | error") for name in SHOWN]
    lines = []
    for row in rows:
        by_name = {figure.name: figure for figure in row.figures}
        cells = [by_name[name] for name in SHOWN]
        lines.append(
            [
                row.model,
                row.level,
                f"{row.requests} at {row.rate_per_s:.3g}/s",
                *(
                    f"{quantity(c.predicted, c.unit)} | {quantity(c.measured, c.unit)} | {c.error:+.1%}"
                    for c in cells
                ),
            ]
        )
    caption = "predicted: simulated on the calibrated machine; measured: `tongyun serve` under the same load"
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
