"""End to end on H100: TTFT and TPOT beside measured deployments, printed for each engine.

A fixed number of users, each asking again when answered, is played step by step the way each engine
schedules (`codesign/engines.toml`) on the prices of its kernels, under the load that
`plan_h100_rows.py` says each row was measured with. Every row is predicted with times of its engine
that were fitted without its family (`plan_h100_fit.py` says what a family is); kernel prices were fitted
to no row. What is shipped in `engines.toml` is fitted to all rows, printed by `--fit`, and judged by none.

Nine rows name a number of users they were not measured with (a slip of the script that made them, see
`plan_h100_rows.py`). They are fitted to nowhere and reported apart: with the users they name, and with the
load the script made.

    python benchmarks/plan_h100.py --rows silicon_sample.csv [--peer ENV/bin/python] [--every 5] [--fit]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from plan_h100_fit import BARS, GRID, Fit, Fits, Grouping, Tables, family, predict, table, whole_model
from plan_h100_rows import Row, contradicted, installed, read
from tongyun.errors import TongyunError
from tongyun.specs import find_model

Predicted = dict[str, dict[str, float]]
"""Mean seconds by row and figure."""


def feasible(rows: Iterable[Row], tables: Tables, left_out: Counter[str]) -> list[Row]:
    """Those that fit; the others are counted by reason."""
    found = []
    for row in rows:
        try:
            tables.at(row, 0.0)
            found.append(row)
        except TongyunError as error:
            left_out[str(error)[:80]] += 1
    return found


def held_out(rows: Iterable[Row], tables: Tables, fits: dict[str, Fit], group: Grouping) -> Predicted:
    """Each row with what was fitted without its group; none where that has no row of its engine."""
    found = {}
    for row in rows:
        fit = fits[group(row)]
        if fit.knows(row):
            found[row.raw["id"]] = predict(tables.at(row, fit.skew), fit.habits(row))
    return found


def predict_lost(row: Row, fit: Fit) -> dict[str, float]:
    """A row whose load was one of several: each figure under the load that the other figure tells of.

    So no figure chooses the load it is judged by. Both grow with the load, so that one nearly tells the
    other: this shows what the row is rather than how well it is predicted.
    """
    felt = {load: predict(table(row, fit.skew, load), fit.habits(row)) for load in row.loads}
    said, seats = {}, {}
    for what, other in (("TTFT", "TPOT"), ("TPOT", "TTFT")):
        seen = row.measured[other]
        load = min(felt, key=lambda load: abs(np.log(felt[load][other] / seen)))
        said[what], seats[what] = felt[load][what], load.seats
    figures = ", ".join(
        f"{what} {1e3 * row.measured[what]:.2f}, {1e3 * said[what]:.2f} with {seats[what]} seats"
        for what in said
    )
    print(f"  {row.group}, {row.question.isl} + {row.question.osl}, tp {row.shard.tp}: {figures}")
    return said


def show(fits: Fits) -> None:
    """What is fitted to all rows, the times as engines.toml ships them, and what the folds have."""
    chosen, folds = fits.all(), fits.without(family).values()
    print(f"skew of experts {chosen.skew:g}; without a family: {_values(fold.skew for fold in folds)}")
    for name, times in chosen.times.items():
        print(name)
        for at, field in enumerate(GRID):
            values = _values(fold.times[name][at] for fold in folds)
            print(f"  {field} = {times[at]:g}; without a family: {values}")


def _values(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(set(values)))


def ask_peer(python: str, rows: Sequence[Row]) -> Predicted:
    """What aiconfigurator says of the same rows, in its own environment.

    It takes versions outside its list of supported ones only where the variable allows it.
    """
    script = str(Path(__file__).with_name("plan_h100_peer.py"))
    with TemporaryDirectory() as folder:
        configs = {}
        for model in {row.raw["model_path"] for row in rows}:
            config, _ = find_model(model.removesuffix("-FP8"))
            place = Path(folder) / model.replace("/", "--")
            place.mkdir()
            (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
            configs[model] = str(place)
        asked = json.dumps({"rows": [row.raw for row in rows], "configs": configs})
        env = os.environ | {"AIC_ALLOW_UNLISTED_VERSIONS": "1"}
        done = subprocess.run(
            [python, script], input=asked, capture_output=True, text=True, check=False, env=env
        )
    if done.returncode:
        raise SystemExit(f"the peer failed: {done.stderr.strip().splitlines()[-1:]}")
    said = json.loads(done.stdout)
    return {id: {"TTFT": ttft / 1e3, "TPOT": tpot / 1e3} for id, (ttft, tpot) in said.items()}


def line(name: str, what: str, rows: Sequence[Row], said: Predicted) -> None:
    """The distribution of one figure's relative errors over the rows that were answered."""
    pairs = [(said[row.raw["id"]][what], row.measured[what]) for row in rows if row.raw["id"] in said]
    if not pairs:
        return
    e = np.asarray([100 * (ours / theirs - 1) for ours, theirs in pairs])
    size = np.abs(e)
    ranks = "".join(f"{np.quantile(size, at):8.1f}" for at in (0.5, 0.75, 0.9))
    print(
        f"{what:6}{name:46}{len(e):5d}{size.mean():8.1f}{ranks}{size.max():9.1f}{np.median(e):+8.1f}", end=""
    )


def print_table(title: str, groups: dict[str, list[Row]], ours: Predicted, peer: Predicted) -> None:
    print(f"\n{title}; absolute error in %, bias is the median of signed errors")
    print(f"{'':6}{'':46}{'rows':>5}{'mean':>8}{'median':>8}{'p75':>8}{'p90':>8}{'max':>9}{'bias':>8}")
    for what, bar in BARS.items():
        for name, rows in groups.items():
            line(name, what, rows, ours)
            mean = np.mean([abs(ours[r.raw["id"]][what] / r.measured[what] - 1) for r in rows])
            print(f"   bar {bar:.0f} {'met' if 100 * mean <= bar else 'not met'}")
            answered = [row for row in rows if row.raw["id"] in peer]
            if answered:
                if len(answered) < len(rows):
                    line(f"  {name}, those the peer answers", what, answered, ours)
                    print()
                line(f"  {name}, aiconfigurator", what, answered, peer)
                print()


def grouped(rows: Iterable[Row], key: Grouping) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return dict(sorted(found.items()))


def by_engine(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {**grouped(rows, lambda row: row.raw["backend"]), "all engines": list(rows)}


def report(rows: Sequence[Row], tables: Tables, fits: Fits, peer: Predicted) -> Predicted:
    """Print the verdict and what lies behind it; what is said of every row, with the users it names."""
    by_family = fits.without(family)
    named = held_out(rows, tables, by_family, family)
    plain = [row for row in rows if not row.loads]
    print_table("Every row, fitted without its family (engine, model, tp)", by_engine(plain), named, peer)
    print_table("The same by engine, version and model", grouped(plain, lambda row: row.group), named, {})
    strict = held_out(plain, tables, fits.without(whole_model), whole_model)
    several = [row for row in plain if row.raw["id"] in strict]
    print_table("Fitted without its model, where the engine has others", by_engine(several), strict, {})
    inside = fits.all()
    said = held_out(plain, tables, dict.fromkeys(by_family, inside), family)
    print_table("Fitted to all rows, as shipped", by_engine(plain), said, {})
    print(f"\n{len(rows) - len(plain)} rows name a wrong number of users, which measurements contradict in")
    print(f"{len(contradicted(rows))}; measured and predicted ms with the load of the script, whose seats")
    print("the other figure tells:")
    lost = {row.raw["id"]: predict_lost(row, by_family[family(row)]) for row in rows if row.loads}
    print_table("First table with them, under the load of the script", by_engine(rows), named | lost, {})
    print_table("First table with them, users as named", by_engine(rows), named, {})
    return named


def keep(path: Path, rows: Sequence[Row], ours: Predicted, peer: Predicted) -> None:
    """Each row's figures in seconds, as CSV; ours with times fitted without its family."""
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(("id", "family", "figure", "measured_s", "tongyun_s", "aiconfigurator_s"))
        for row in rows:
            id = row.raw["id"]
            for what, value in row.measured.items():
                said = (ours.get(id, {}).get(what), peer.get(id, {}).get(what))
                out.writerow((id, family(row), what, value, *said))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rows", type=Path, default=installed(), help="silicon_sample.csv")
    parser.add_argument("--peer", help="Python of an environment with aiconfigurator")
    parser.add_argument("--every", type=int, default=5, help="ask the peer every n-th row; it takes a second")
    parser.add_argument("--fit", action="store_true", help="fit the times of engines.toml and print them")
    parser.add_argument("--list", type=Path, help="write each row's figures to this CSV")
    given = parser.parse_args()
    if given.rows is None:
        print("skipped: aiconfigurator-core is not installed; name its table with --rows")
        return 0
    left_out: Counter[str] = Counter()
    rows = list(read(given.rows, left_out))
    tables = Tables()
    rows = feasible(rows, tables, left_out)
    fits = Fits([row for row in rows if not row.loads], tables)
    if given.fit:
        show(fits)
        return 0
    if given.peer is None:
        print("aiconfigurator is not asked: --peer names its Python")
    peer = {} if given.peer is None else ask_peer(given.peer, rows[:: given.every])
    ours = report(rows, tables, fits, peer)
    print("left out:", ", ".join(f"{count} {why}" for why, count in left_out.items()) or "nothing")
    if given.list:
        keep(given.list, rows, ours, peer)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
