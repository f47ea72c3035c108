"""End to end on H100: TTFT and TPOT beside measured deployments, printed for each engine.

Rows are those of `silicon_sample.csv` in the package aiconfigurator-core (Apache-2.0), of which
only the H100 rows that do not split prefill from decoding are read: a fixed number of users, each
asking again when answered. Each is played step by step with the engine's policy for prompts
(`codesign/users.py`) and the prices of its kernels. No price was fitted to these rows.

What the rows leave open is taken as: 8192 tokens a step, KV in bf16, all users beginning at once,
ten requests a user. That last number decides how much the first burst weighs, most of all in TTFT; it is
common in serving benchmarks, but it was chosen with the errors for 1, 2, 4 and 8 in sight, and one
choice for all engines. Only SGLang is the same for any. So read the others as how well
the form fits, not as a blind prediction.

    python benchmarks/plan_h100.py --rows silicon_sample.csv [--every 5] [--rounds 10]
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tongyun.codesign.space import Question
from tongyun.codesign.users import play_users
from tongyun.errors import TongyunError
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision
from tongyun.model.shard import Shard
from tongyun.specs import find_chip, find_model

SYSTEM = "h100_sxm"
STEP_TOKENS = 8192
TYPES = {"": "bf16", "fp8": "fp8", "fp8_block": "fp8_block", "nvfp4": "mxfp4"}
BARS = {"TPOT": 12.0, "TTFT": 25.0}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured deployment."""

    id: str
    engine: str
    version: str
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
        version=raw["backend_version"],
        question=question,
        shard=shard,
        users=int(raw["batch_size"]),
        ttft_s=float(raw["silicon_ttft_ms"]) / 1e3,
        tpot_s=float(raw["silicon_tpot_ms"]) / 1e3,
    )


def _count(text: str) -> int:
    return max(1, int(text or 1))


def predict(row: Row, rounds: int) -> dict[str, float]:
    """Mean seconds by name."""
    felt = play_users(row.question, row.shard, row.users, STEP_TOKENS, rounds)
    return {"TTFT": float(felt.ttft_s.mean()), "TPOT": float(felt.tpot_s.mean())}


def report(errors: dict[tuple[str, str], list[float]]) -> None:
    """Print the distribution of relative errors, and whether the bar holds over all rows of an engine."""
    print(f"{'':6}{'engine':10}{'rows':>6}{'MAPE':>8}{'median':>8}{'p90':>8}{'bias':>8}  bar")
    for (what, engine), values in sorted(errors.items()):
        e = 100 * np.asarray(values)
        mape = float(np.abs(e).mean())
        bar = BARS[what]
        print(
            f"{what:6}{engine:10}{len(e):6d}{mape:7.1f}%{np.median(np.abs(e)):7.1f}%"
            f"{np.quantile(np.abs(e), 0.9):7.1f}%{np.median(e):+7.1f}%  {bar:.0f} % "
            f"{'met' if mape <= bar else 'not met'}"
        )


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
    parser.add_argument("--rounds", type=int, default=10, help="requests of each user")
    parser.add_argument("--list", type=Path, help="write each row's figures to this CSV")
    given = parser.parse_args()
    if given.rows is None:
        print("skipped: aiconfigurator-core is not installed; name its table with --rows")
        return 0
    left_out: Counter[str] = Counter()
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    by_model: dict[tuple[str, str], list[float]] = defaultdict(list)
    listed: list[list[object]] = []
    for row in list(rows(given.rows, left_out))[:: given.every]:
        try:
            found = predict(row, given.rounds)
        except TongyunError as error:
            left_out[str(error)[:80]] += 1
            continue
        model = row.question.model.name.split("/")[-1]
        for what, measured in (("TTFT", row.ttft_s), ("TPOT", row.tpot_s)):
            error = found[what] / measured - 1
            errors[what, row.engine].append(error)
            by_model[what, f"{row.engine} {row.version or '?'} {model}"].append(error)
            q = row.question
            cells = (row.id, row.engine, q.model.name, q.isl, q.osl, row.users, str(row.shard))
            listed.append([*cells, what, measured, found[what], error])
    report(errors)
    print("\nby engine, version and model")
    for (what, name), values in sorted(by_model.items()):
        e = 100 * np.asarray(values)
        mape, median = np.abs(e).mean(), np.median(np.abs(e))
        print(f"{what:6}{name:46}{len(e):5d}{mape:8.1f}%{median:8.1f}%  bias {np.median(e):+.1f}%")
    print("left out:", ", ".join(f"{count} {why}" for why, count in left_out.items()) or "nothing")
    if given.list:
        with given.list.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(listed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
