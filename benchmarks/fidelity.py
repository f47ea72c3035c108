"""How well a served load is predicted on this machine: models × load levels, every figure with its error.

    python benchmarks/fidelity.py [--model NAME_OR_DIRECTORY ...] [--levels 0.85 ...] [--seconds 60] [--json]

Without `--model`: the model that comes with Tongyun, and random weights in the shape of
Qwen3-0.6B. The machine is calibrated first unless it is already; the prediction of a level
is made before its first request leaves. Levels are shares of the predicted capacity, which
is itself held against a measurement: what the server ends per second under more than it
can do. How fast the processors run is sampled all the while, in the calibration and under
each load, without a look at what is measured: where others slow them down, the calibration
measures again, for `--patience` seconds in all. A level is put on in slices of `--slice`
seconds, until in `--seconds` of them the processors were as fast as when serving was calibrated,
or `--tries` slices are over. Those slices make the row together; where there are none, the one
whose pace was nearest does, and the row says so.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console

from tongyun.cli.calibrate import calibrated
from tongyun.cli.up import Load, deploy, find, put, served
from tongyun.cloud.engine.calibrate.measure import setting
from tongyun.cloud.engine.calibrate.pace import Pace, served_pace, undisturbed_s
from tongyun.cloud.latency import LatencyReport, RequestRecord, summarise
from tongyun.cloud.workload import Arrival
from tongyun.codesign.fidelity import Compared, compare, keep
from tongyun.report import column, quantity, table, to_json
from tongyun.specs import names

LEVELS = (0.3, 0.6, 0.85)
SHOWN = ("TTFT p50", "TTFT p99", "TPOT p50", "throughput")
RANDOM = "Qwen/Qwen3-0.6B"
ALIKE = 0.04


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One load, foreseen and sent."""

    predicted: tuple[RequestRecord, ...]
    measured: tuple[RequestRecord, ...]
    pace: float
    """How much slower the processors were meanwhile than when nothing disturbs them."""
    calibrated: float
    """The same, while serving was calibrated."""

    @property
    def off(self) -> float:
        """How far the pace was from the calibration's."""
        return abs(self.pace / self.calibrated - 1)

    @property
    def seconds(self) -> float:
        return summarise(self.measured).duration_s

    @property
    def figures(self) -> tuple[Compared, ...]:
        return compared([self])


def compared(slices: Sequence[Slice]) -> tuple[Compared, ...]:
    """The figures of all requests of some slices."""
    return compare(
        _report([one.predicted for one in slices]),
        _report([one.measured for one in slices]),
    )


def _report(runs: Sequence[tuple[RequestRecord, ...]]) -> LatencyReport:
    seconds = sum(summarise(run).duration_s for run in runs)
    return summarise([record for run in runs for record in run], duration_s=seconds)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model at one level: all its figures both ways."""

    model: str
    level: str
    rate_per_s: float
    slices: tuple[Slice, ...]
    """Those that were told by their pace."""
    tries: int

    @property
    def requests(self) -> int:
        return sum(len(one.measured) for one in self.slices)

    @property
    def figures(self) -> tuple[Compared, ...]:
        return compared(self.slices)

    @property
    def pace(self) -> float:
        return statistics.fmean(one.pace for one in self.slices)

    @property
    def alike(self) -> bool:
        return all(one.off <= ALIKE for one in self.slices)


def as_dict(row: Row) -> dict[str, object]:
    """For `--json`, in SI."""
    return {
        "model": row.model,
        "level": row.level,
        "rate_per_s": row.rate_per_s,
        "requests": row.requests,
        "figures": row.figures,
        "pace": row.pace,
        "calibrated_pace": row.slices[0].calibrated,
        "slices": len(row.slices),
        "tries": row.tries,
        "alike": row.alike,
    }


def measure(model: str | None, args: argparse.Namespace) -> Iterator[Row]:
    """Capacity first, then each level, against one server."""
    here = setting(device=None, threads=args.threads, kernels=None, quick=False)
    spec, _ = calibrated(here, patience_s=args.patience)
    machine = {} if spec.calibration is None else spec.calibration.machine
    directory, config = find(model, random=model in names("models"))
    deployment = deploy(config, spec, args.isl + args.osl)
    capacity = deployment.capacity_per_s(args.isl, args.osl)
    with (
        served(directory, deployment, spec, port=0) as (url, _),
        Pace(quickest_s=undisturbed_s(machine)) as pace,
    ):

        def sliced(load: Callable[[int], list[Arrival]], seed: int) -> Slice:
            arrivals = load(seed)
            predicted = deployment.predict(arrivals, seed=seed).records
            pace.read()
            measured = put(url, arrivals, seed=seed, quiet=args.json).records
            return Slice(
                predicted=predicted, measured=measured, pace=pace.read(), calibrated=served_pace(machine)
            )

        def level(name: str, rate_per_s: float, load: Callable[[int], list[Arrival]], first: int) -> Row:
            tries: list[Slice] = []
            alike: list[Slice] = []
            while len(tries) < args.tries and sum(one.seconds for one in alike) < args.seconds:
                # Other prompts each time: the server remembers the prefixes of those before.
                tries.append(sliced(load, args.seed + first + 100 * len(tries)))
                alike = [one for one in tries if one.off <= ALIKE]
                print(f"{name}, {len(tries)}: {_errors(tries[-1])}", file=sys.stderr)
            told = alike or [min(tries, key=lambda one: one.off)]
            return Row(
                model=config.name, level=name, rate_per_s=rate_per_s, slices=tuple(told), tries=len(tries)
            )

        for number, share in enumerate(args.levels):
            rate = share * capacity
            count = max(args.least, round(args.slice * rate))

            def open_loop(seed: int, rate: float = rate, count: int = count) -> list[Arrival]:
                load = Load(isl=args.isl, osl=args.osl, rate_per_s=rate, requests=count, seed=seed)
                return load.arrivals(capacity)

            yield level(f"{share:.0%} of capacity", rate, open_loop, number)
        # Everything at once: what the server can do at most.
        count = min(args.most, max(args.least, round(args.slice * capacity)))
        burst = [Arrival(0.0, args.isl, args.osl)] * count
        yield level("at once", capacity, lambda _: burst, len(args.levels))


def _errors(one: Slice) -> str:
    """The errors of a slice and the machine's pace, in a line."""
    errors = (f"{c.name} {c.error:+.1%}" for c in one.figures if c.name in SHOWN)
    return f"{', '.join(errors)}; machine {one.pace:.2f}, calibrated at {one.calibrated:.2f}"


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
                f"{row.pace:.2f}, {len(row.slices)} of {row.tries}" + ("" if row.alike else ", not alike"),
                *(
                    f"{quantity(c.predicted, c.unit)} | {quantity(c.measured, c.unit)} | {c.error:+.1%}"
                    for c in cells
                ),
            ]
        )
    caption = (
        "predicted (simulated on the calibrated machine) | measured (`tongyun serve`, same load) | error\n"
        "machine: how much slower the processors were meanwhile than undisturbed; "
        f"{rows[0].slices[0].calibrated:.2f} when serving was calibrated; slices taken, of those tried"
    )
    Console(width=170).print(table("Predicted and measured", columns, lines, caption=caption))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", help="directory, or catalogue name for random weights")
    parser.add_argument("--isl", type=int, default=128)
    parser.add_argument("--osl", type=int, default=64)
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS, help="shares of capacity")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long each level lasts")
    parser.add_argument("--slice", type=float, default=15.0, help="seconds of one load of a level")
    parser.add_argument("--least", type=int, default=20, help="requests of a slice, at least")
    parser.add_argument("--most", type=int, default=192, help="requests of the last row, at most")
    parser.add_argument("--tries", type=int, default=8, help="slices of a level, at most")
    parser.add_argument(
        "--patience", type=float, default=0.0, help="seconds for calibrating again what was disturbed"
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
        print(to_json([as_dict(row) for row in rows]))
    else:
        show(rows)


if __name__ == "__main__":
    main()
