"""End to end on H100: TTFT and TPOT beside 810 measured deployments.

Rows are those of `silicon_sample.csv` in the package aiconfigurator-core (Apache-2.0), of which
only the H100 rows are read: a fixed number of users, each asking again when answered.
Each row is played with the production scheduler and priced steps of the engine it was
measured with; rows too long to play are answered by the planner's formulas, TPOT only.
Nothing was fitted to these rows. What they leave open is taken as the engines' defaults:
8192 tokens a step, KV in bf16, `ROUNDS` requests for each user.

    python benchmarks/plan_h100.py --rows silicon_sample.csv [--every 5]
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tongyun.codesign.played import play_users
from tongyun.codesign.space import Question
from tongyun.codesign.steady import steady
from tongyun.errors import TongyunError
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision
from tongyun.model.shard import Shard
from tongyun.specs import find_chip, find_model

SYSTEM = "h100_sxm"
STEP_TOKENS = 8192
ROUNDS = 4
LONGEST = 400_000
"""Output tokens of a play beyond which the formulas answer instead."""
TYPES = {"": "bf16", "fp8": "fp8", "fp8_block": "fp8_block", "nvfp4": "mxfp4"}
BARS = {"TPOT": 12.0, "TTFT": 25.0}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured deployment."""

    id: str
    engine: str
    question: Question
    shard: Shard
    users: int
    ttft_s: float
    tpot_s: float


def rows(path: Path, left_out: Counter[str]) -> Iterator[Row]:
    """The H100 rows that can be asked; the others are counted by reason."""
    with path.open(encoding="utf-8", newline="") as file:
        for raw in csv.DictReader(file):
            if raw["system"] != SYSTEM:
                continue
            if raw["mode"] != "agg":
                left_out["disaggregated"] += 1
                continue
            try:
                yield _row(raw)
            except TongyunError as error:
                left_out[f"{raw['model_path']}: {str(error).split(';')[0][:60]}"] += 1


def _row(raw: dict[str, str]) -> Row:
    name = raw["model_path"].removesuffix("-FP8")
    config, full = find_model(name)
    question = Question(
        model=ModelConfig.from_hf(config, name=full),
        chip=find_chip("h100"),
        chips=int(raw["tp_size"]) * int(raw["pp_size"]) * _count(raw["attention_dp_size"]),
        isl=int(raw["isl"]),
        osl=int(raw["osl"]),
        precision=Precision.of(TYPES[raw["gemm_quant_mode"]]),
        engine=raw["backend"],
    )
    has_experts = question.model.experts is not None
    shard = Shard(
        tp=int(raw["tp_size"]),
        pp=int(raw["pp_size"]),
        ep=_count(raw["moe_ep_size"]) if has_experts else 1,
        dp=_count(raw["attention_dp_size"]),
    )
    return Row(
        id=raw["id"],
        engine=raw["backend"],
        question=question,
        shard=shard,
        users=int(raw["batch_size"]),
        ttft_s=float(raw["silicon_ttft_ms"]) / 1e3,
        tpot_s=float(raw["silicon_tpot_ms"]) / 1e3,
    )


def _count(text: str) -> int:
    return max(1, int(text or 1))


def predict(row: Row) -> dict[str, float]:
    """Seconds by name; TTFT only where the row was played."""
    question = row.question
    if ROUNDS * row.users * question.osl <= LONGEST:
        played = play_users(question, row.shard, row.users, STEP_TOKENS, ROUNDS)
        return {"TTFT": played.ttft_s, "TPOT": played.tpot_s}
    batch = np.full(1, row.users / row.shard.dp / row.shard.pp)
    state = steady(question, question.at(), row.shard, batch, np.full(1, float(STEP_TOKENS)))
    return {"TPOT": float(state.tpot_s[0])}


def report(errors: dict[tuple[str, str], list[float]]) -> bool:
    """Print the distribution of relative errors; whether the bars hold over all rows of an engine."""
    print(f"{'':6}{'engine':10}{'rows':>6}{'MAPE':>8}{'median':>8}{'p90':>8}{'bias':>8}  bar")
    holds = True
    for (what, engine), values in sorted(errors.items()):
        e = 100 * np.asarray(values)
        mape = float(np.abs(e).mean())
        bar = BARS[what]
        holds &= mape <= bar
        print(
            f"{what:6}{engine:10}{len(e):6d}{mape:7.1f}%{np.median(np.abs(e)):7.1f}%"
            f"{np.quantile(np.abs(e), 0.9):7.1f}%{np.median(e):+7.1f}%  {bar:.0f} % "
            f"{'met' if mape <= bar else 'not met'}"
        )
    return holds


def installed() -> Path | None:
    """The table in an installed aiconfigurator-core."""
    spec = importlib.util.find_spec("aiconfigurator_core")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "systems" / "silicon_sample.csv"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=Path, default=installed(), help="silicon_sample.csv")
    parser.add_argument("--every", type=int, default=1, help="take every n-th row")
    parser.add_argument("--list", type=Path, help="write each row's figures to this CSV")
    given = parser.parse_args()
    if given.rows is None:
        print("install aiconfigurator-core, or name its table with --rows", file=sys.stderr)
        return 2
    left_out: Counter[str] = Counter()
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    by_model: dict[tuple[str, str], list[float]] = defaultdict(list)
    listed: list[list[object]] = []
    for row in list(rows(given.rows, left_out))[:: given.every]:
        try:
            found = predict(row)
        except TongyunError as error:
            left_out[str(error)[:80]] += 1
            continue
        for what, measured in (("TTFT", row.ttft_s), ("TPOT", row.tpot_s)):
            if what in found and measured > 0:
                error = found[what] / measured - 1
                errors[what, row.engine].append(error)
                by_model[what, f"{row.question.model.name.split('/')[1][:16]}/{row.engine}"].append(error)
                q = row.question
                cells = (row.id, row.engine, q.model.name, q.isl, q.osl, row.users, str(row.shard))
                listed.append([*cells, what, measured, found[what], error])
    holds = report(errors)
    for (what, model), values in sorted(by_model.items()):
        e = 100 * np.asarray(values)
        print(f"{what:6}{model:28}{len(e):5d}{np.abs(e).mean():8.1f}% bias {np.median(e):+.1f}%")
    print("left out:", ", ".join(f"{count} {why}" for why, count in left_out.items()) or "nothing")
    if given.list:
        with given.list.open("w", newline="") as file:
            csv.writer(file).writerows(listed)
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
