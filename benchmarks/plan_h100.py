"""End to end on H100: TTFT and TPOT beside measured deployments, printed for each engine.

A fixed number of users, each asking again when answered, is played step by step the way each engine
schedules (`codesign/engines.toml`) on the prices of its kernels, under the load that
`plan_h100_rows.py` says each row was measured with. Five times an engine were fitted, to rows of
dense models with tp 2 and 8 of one campaign; every other row is held out, though not blind: the form of
the play was chosen with all of them in sight (docs/benchmarks.md). Kernel prices were fitted to none.

Nine rows name a number of users they were not measured with (a slip of the script that made them, see
`plan_h100_rows.py`); five of them contradict other rows, which is told from measurements alone. The
table is printed with the users they name, with the load the script made, and without them.

    python benchmarks/plan_h100.py --rows silicon_sample.csv [--peer ENV/bin/python] [--every 5] [--fit]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from plan_h100_rows import Row, contradicted, installed, read
from tongyun.codesign.engines import Engine, engine
from tongyun.codesign.users import Table, play_users
from tongyun.errors import TongyunError
from tongyun.specs import find_model

BARS = {"TTFT": 25.0, "TPOT": 12.0}
GRID = {
    "step_s": (0.0, 2.5e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3),
    "sequence_s": (0.0, 1e-5, 2e-5, 3e-5, 4e-5, 6e-5),
    "prompt_layer_s": (0.0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1.2e-3),
    "request_s": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.2e-2),
    "token_s": (0.0, 2e-5, 4e-5, 6e-5, 8e-5, 1e-4),
}
"""Values tried for each time, one after the other, until none helps."""

Predicted = dict[str, dict[str, float]]
"""Mean seconds by row and figure."""


def price(rows: Iterable[Row], left_out: Counter[str]) -> dict[str, Table]:
    """Priced once for all ways of playing them."""
    found = {}
    for row in rows:
        try:
            found[row.raw["id"]] = Table(row.question, row.shard, row.users, row.step_tokens)
        except TongyunError as error:
            left_out[str(error)[:80]] += 1
    return found


def predict(row: Row, table: Table, habits: Engine) -> dict[str, float]:
    felt = play_users(table, habits)
    return {"TTFT": float(felt.ttft_s.mean()), "TPOT": float(felt.tpot_s.mean())}


def measured(row: Row) -> dict[str, float]:
    return {"TTFT": row.ttft_s, "TPOT": row.tpot_s}


def predict_lost(row: Row) -> dict[str, float]:
    """A row whose load was one of several: each figure under the load that the other figure tells of.

    So no figure chooses the load it is judged by. Both grow with the load, so that one nearly tells the
    other: this shows what the row is rather than how well it is predicted.
    """
    habits = engine(row.engine)
    tables = {load: Table(row.question, row.shard, load, row.step_tokens) for load in row.loads}
    felt = {load: predict(row, table, habits) for load, table in tables.items()}
    said, seats = {}, {}
    for what, other in (("TTFT", "TPOT"), ("TPOT", "TTFT")):
        seen = measured(row)[other]
        load = min(felt, key=lambda load: abs(np.log(felt[load][other] / seen)))
        said[what], seats[what] = felt[load][what], load.seats
    figures = ", ".join(
        f"{what} {1e3 * measured(row)[what]:.2f}, {1e3 * said[what]:.2f} with {seats[what]} seats"
        for what in said
    )
    print(f"  {row.group}, {row.question.isl} + {row.question.osl}, tp {row.shard.tp}: {figures}")
    return said


def fit(rows: Sequence[Row], tables: dict[str, Table]) -> None:
    """Print the five times of each engine with the least mean error, each over its bar, on fitted rows."""
    for name in sorted({row.engine for row in rows if row.fitted}):
        chosen = [row for row in rows if row.fitted and row.engine == name and row.raw["id"] in tables]

        def miss(habits: Engine, chosen: Sequence[Row] = chosen) -> float:
            errors = [
                100 * abs(value / measured(row)[what] - 1) / BARS[what]
                for row in chosen
                for what, value in predict(row, tables[row.raw["id"]], habits).items()
            ]
            return float(np.mean(errors))

        starts = ({field: values[at] for field, values in GRID.items()} for at in (0, len(GRID) // 2, -1))
        best, least = min((descend(replace(engine(name), **s), miss) for s in starts), key=lambda f: f[1])
        print(f"{name}: {len(chosen)} rows, mean error over the bar {least:.3f}")
        print("\n".join(f"  {field} = {getattr(best, field):g}" for field in GRID))


def descend(start: Engine, miss: Callable[[Engine], float]) -> tuple[Engine, float]:
    """The nearest values of the grid from which no single change helps."""
    best, least = start, miss(start)
    while True:
        before = least
        for field, values in GRID.items():
            for value in values:
                tried = replace(best, **{field: value})
                if tried != best and (missed := miss(tried)) < least:
                    best, least = tried, missed
        if least == before:
            return best, least


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
    pairs = [(said[row.raw["id"]][what], measured(row)[what]) for row in rows if row.raw["id"] in said]
    if not pairs:
        return
    e = np.asarray([100 * (ours / theirs - 1) for ours, theirs in pairs])
    size = np.abs(e)
    ranks = "".join(f"{np.quantile(size, at):8.1f}" for at in (0.5, 0.75, 0.9))
    print(
        f"{what:6}{name:46}{len(e):5d}{size.mean():8.1f}{ranks}{size.max():9.1f}{np.median(e):+8.1f}", end=""
    )


def table(title: str, groups: dict[str, list[Row]], ours: Predicted, peer: Predicted) -> None:
    print(f"\n{title}; absolute error in %, bias is the median of signed errors")
    print(f"{'':6}{'':46}{'rows':>5}{'mean':>8}{'median':>8}{'p75':>8}{'p90':>8}{'max':>9}{'bias':>8}")
    for what, bar in BARS.items():
        for name, rows in groups.items():
            line(name, what, rows, ours)
            mean = np.mean([abs(ours[r.raw["id"]][what] / measured(r)[what] - 1) for r in rows])
            print(f"   bar {bar:.0f} {'met' if 100 * mean <= bar else 'not met'}")
            answered = [row for row in rows if row.raw["id"] in peer]
            if answered:
                if len(answered) < len(rows):
                    line(f"  {name}, those the peer answers", what, answered, ours)
                    print()
                line(f"  {name}, aiconfigurator", what, answered, peer)
                print()


def grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return dict(sorted(found.items()))


def by_engine(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {**grouped(rows, lambda row: row.raw["backend"]), "all engines": list(rows)}


def report(rows: Sequence[Row], named: Predicted, peer: Predicted) -> None:
    """`named`: what we say of each row with the users it names."""
    rows = [row for row in rows if row.raw["id"] in named]
    against = contradicted(rows)
    plain = [row for row in rows if not row.loads]
    table("All rows, with the users they name", by_engine(rows), named, peer)
    print(f"\n{len(against)} rows contradict others:", grouped_count(rows, against) or "none")
    kept = [row for row in rows if row.raw["id"] not in against]
    table("Without those", by_engine(kept), named, peer)
    print(f"\n{len(rows) - len(plain)} rows name a wrong number of users; measured and predicted ms with the")
    print("load of the script, whose seats the other figure tells:")
    ours = named | {row.raw["id"]: predict_lost(row) for row in rows if row.loads}
    table("All rows, those with the load of the script", by_engine(rows), ours, peer)
    table("Without those", by_engine(plain), ours, peer)
    table("Of these the rows fitted to", by_engine([r for r in plain if r.fitted]), ours, peer)
    table("And those held out", by_engine([r for r in plain if not r.fitted]), ours, peer)
    everything = grouped(rows, lambda row: row.group)
    table("All rows by engine, version and model, those with the load of the script", everything, ours, {})


def grouped_count(rows: Sequence[Row], ids: set[str]) -> str:
    counts = Counter(row.group for row in rows if row.raw["id"] in ids)
    return ", ".join(f"{count} {group}" for group, count in counts.items())


def keep(path: Path, rows: Sequence[Row], ours: Predicted, peer: Predicted) -> None:
    """Each row's figures in seconds, as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(("id", "fitted", "figure", "measured_s", "tongyun_s", "aiconfigurator_s"))
        for row in rows:
            id = row.raw["id"]
            for what, value in measured(row).items():
                said = (ours.get(id, {}).get(what), peer.get(id, {}).get(what))
                out.writerow((id, row.fitted, what, value, *said))


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
    if given.fit:
        fit(rows, price((row for row in rows if row.fitted), left_out))
        return 0
    tables = price(rows, left_out)
    ours = {
        row.raw["id"]: predict(row, tables[row.raw["id"]], engine(row.engine))
        for row in rows
        if row.raw["id"] in tables
    }
    if given.peer is None:
        print("aiconfigurator is not asked: --peer names its Python")
    peer = {} if given.peer is None else ask_peer(given.peer, rows[:: given.every])
    report(rows, ours, peer)
    print("left out:", ", ".join(f"{count} {why}" for why, count in left_out.items()) or "nothing")
    if given.list:
        keep(given.list, rows, ours, peer)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
