"""Measured H100 deployments, and how each was measured.

Rows are those of `silicon_sample.csv` in the package aiconfigurator-core (Apache-2.0). A row names
engine, model, cut and users, but not how the load was made. From the name of its source we infer which
of two public scripts made it:

    eval       aiconfigurator's own harness: equal lengths; 10 requests a user (repository
               ai-dynamo/aiconfigurator before c0c44d9, eval/benchmarks/genai_perf_runner.py), later
               20 (generator/config/backend_templates/benchmark/bench_run.sh.j2). The files it writes
               for vLLM and TensorRT-LLM allow users + isl + 1500 tokens a step (95ddf24,
               generator/rule_plugin). SGLang's own default is 8192 (--chunked-prefill-size).
    inferencex SemiAnalysisAI/InferenceX: lengths uniform from 0.8 to 1, 10 requests a user
               (full-sweep-tmpl.yml), 8192 tokens a step, steps planned ahead (ad4f6a4,
               benchmarks/*_h100_*.sh; from vLLM 0.14 on by default)

What keys and values may take is a share of memory: vLLM's own default and InferenceX's script say 0.9 of
all. TensorRT-LLM takes a share of what weights and a step leave, 0.7 in the script that ran the first
harness (tools/automation/launch_eval.sh), 0.8 in its later files (generator/config/backend_templates). SGLang
keeps so many MiB for steps and graphs, by version, where nothing is asked (srt/server_args.py of
0.5.1.post1 and 0.5.8.post1), and no file asks.

The second script had a slip: from d22bf9c (21 November 2025) to 4e135fd (8 December) its Docker form for
gpt-oss-120b on H100 asked with `--max-concurrency 512`, while the engine had `--max-num-seqs=$CONC` and
questions were 10 · CONC. A result is filed under the former (utils/process_result.py), so that
rows of these days name 512 users and what CONC was is lost: one of those of nvidia-master.yaml.

Checkpoints in fp8 with one scale a tensor are NVIDIA's, which keep KV in fp8 too, and InferenceX
asks for that; block-scaled ones are the model maker's, with KV in bf16. No row says so. What speaks for
it: 64 users of 4096 + 512 tokens on one chip, Qwen3-32B, would need 77 GB of keys and values in bf16.
"""

from __future__ import annotations

import csv
import importlib.util
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tongyun.codesign.space import Question
from tongyun.codesign.users import Room, Users
from tongyun.errors import TongyunError
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision
from tongyun.model.shard import Shard
from tongyun.specs import find_chip, find_model

SYSTEM = "h100_sxm"
STEP_TOKENS = 8192
TYPES = {"": "bf16", "fp8": "fp8", "fp8_block": "fp8_block", "nvfp4": "mxfp4"}
SLIP = ("2025-11-21", "2025-12-08")
"""Days between which one of InferenceX's scripts asked with `SLIPPED` users."""
SLIPPED = 512
BOARD_MIB = 81559
"""An H100's memory, as nvidia-smi reports it."""
VISIBLE_BYTES = 79.1 * 2**30
"""Of that, as CUDA reports it."""
CONTEXT_BYTES = 0.5 * 2**30
"""What CUDA itself takes of that for a process (assumed)."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured deployment."""

    raw: dict[str, str]
    question: Question
    shard: Shard
    users: Users
    loads: tuple[Users, ...]
    """What it may have been measured with, one of them, where `users` is known to be wrong; else none."""
    step_tokens: int
    room: Room
    engine: str
    """A name of `engines.toml`."""
    measured: dict[str, float]
    """Mean seconds, TTFT and TPOT."""

    @property
    def group(self) -> str:
        raw = self.raw
        return f"{raw['backend']} {raw['backend_version'] or '?'} {self.question.model.name.split('/')[-1]}"

    @property
    def load(self) -> tuple[object, ...]:
        """What must be equal in rows that differ in users alone, versions aside."""
        q, raw = self.question, self.raw
        return raw["backend"], q.model.name, q.isl, q.osl, str(self.shard), raw["gemm_quant_mode"]


def read(path: Path, left_out: Counter[str]) -> Iterator[Row]:
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
    config, full = find_model(raw["model_path"].removesuffix("-FP8"))
    kv = "fp8" if raw["gemm_quant_mode"] == "fp8" else "bf16"
    question = Question(
        model=ModelConfig.from_hf(config, name=full),
        chip=find_chip("h100"),
        chips=int(raw["tp_size"]) * int(raw["pp_size"]) * _count(raw["attention_dp_size"]),
        isl=int(raw["isl"]),
        osl=int(raw["osl"]),
        precision=Precision.of(TYPES[raw["gemm_quant_mode"]], kv),
        engine=raw["backend"],
    )
    has_experts = question.model.experts is not None
    shard = Shard(
        tp=int(raw["tp_size"]),
        pp=int(raw["pp_size"]),
        ep=_count(raw["moe_ep_size"]) if has_experts else 1,
        dp=_count(raw["attention_dp_size"]),
    )
    source = raw["silicon_data_source"]
    inferencex = "measured=" in source and "gtl_job_id" not in source
    plain = inferencex or raw["backend"] == "sglang"
    users = int(raw["batch_size"])
    return Row(
        raw=raw,
        question=question,
        shard=shard,
        users=Users(
            count=users,
            rounds=20 if "gtl_job_id" in source else 10,
            shortest=0.8 if inferencex else 1.0,
        ),
        loads=tuple(_loads(raw, source)),
        step_tokens=STEP_TOKENS if plain else users + question.isl + 1500,
        room=_room(raw, source),
        engine="vllm-async" if inferencex and raw["backend"] == "vllm" else raw["backend"],
        measured={what: float(raw[f"silicon_{what.lower()}_ms"]) / 1e3 for what in ("TTFT", "TPOT")},
    )


def _room(raw: dict[str, str], source: str) -> Room:
    """What is left for keys and values, as the engine reckons and the script asked."""
    free = VISIBLE_BYTES - CONTEXT_BYTES
    if raw["backend"] == "trtllm":
        return Room(usable_bytes=free, kv=0.8 if "gtl_job_id" in source else 0.7)
    if raw["backend"] == "vllm":
        return Room(usable_bytes=0.9 * VISIBLE_BYTES - CONTEXT_BYTES)
    ranks = int(raw["tp_size"]) * int(raw["pp_size"])
    if raw["backend_version"].startswith("0.5.1."):
        kept = (9.5 + ranks / 2) * 1024
    else:
        kept = 512 + 1.5 * STEP_TOKENS + 2 * (256 if ranks < 4 else 512) + ranks / 8 * 1024
    return Room(usable_bytes=(1 - kept / BOARD_MIB) * free, holds_step=False)


def _loads(raw: dict[str, str], source: str) -> Iterator[Users]:
    """All that may have been asked in the days of the slip; 10 · CONC questions at once, or 512 of them."""
    day = source.partition("measured=")[2][:10]
    slipped = raw["backend"] == "vllm" and "gpt-oss-120b" in raw["model_path"] and SLIP[0] <= day <= SLIP[1]
    if not slipped or int(raw["batch_size"]) != SLIPPED:
        return
    most = 16 if raw["isl"] == "8192" and raw["tp_size"] == "8" else 64
    for seats in (4, 8, 16, 32, 64):
        if seats <= most:
            count = min(SLIPPED, 10 * seats)
            yield Users(count=count, rounds=10 * seats / count, shortest=0.8, seats=seats)


def _count(text: str) -> int:
    return max(1, int(text or 1))


def contradicted(rows: Sequence[Row]) -> set[str]:
    """Ids of rows whose token takes under 3/4 of what it takes with fewer users, in two measurements or more.

    Told from measurements alone: the same engine, model, cut and lengths, versions aside. One slow
    measurement does not make those with more users wrong, hence two.
    """
    by_load: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        by_load.setdefault(row.load, []).append(row)
    found = set()
    for row in rows:
        fewer = (other for other in by_load[row.load] if other.users.count < row.users.count)
        seen = {other.measured["TPOT"] for other in fewer}
        if sum(row.measured["TPOT"] < 0.75 * other for other in seen) > 1:
            found.add(row.raw["id"])
    return found


def installed() -> Path | None:
    """The table in an installed aiconfigurator-core."""
    spec = importlib.util.find_spec("aiconfigurator_core")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "systems" / "silicon_sample.csv"
