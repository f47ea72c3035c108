"""Explained steps: they add up to what was priced, and say what binds."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest

from tongyun.cli.explained import tables
from tongyun.codesign.explain import BOUNDS, Explanation, explain
from tongyun.codesign.plan import Plan, plan
from tongyun.codesign.space import Question
from tongyun.codesign.steady import load_at, memory_bytes, steady
from tongyun.cost import step_cost
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision
from tongyun.model.shard import Shard
from tongyun.model.steps import step
from tongyun.specs import find_chip, find_model
from tongyun.units import Source

CASES: list[tuple[str, str, str, Shard, float]] = [
    ("Qwen/Qwen3-8B", "h20", "bf16", Shard(), 16),
    ("Qwen/Qwen3-32B", "h200", "fp8", Shard(tp=4, pp=3), 7),
    ("Qwen/Qwen3-235B-A22B", "zhenwu-810e", "bf16", Shard(tp=4, ep=16, dp=4), 16),
    ("deepseek-ai/DeepSeek-V3", "h20", "fp8", Shard(tp=2, pp=2, ep=8, dp=4), 20),
    ("openai/gpt-oss-120b", "mi300x", "mxfp4", Shard(tp=2), 32),
]
NAMES = [case[0] for case in CASES]


def laid_out(
    model: str, chip: str, dtype: str, shard: Shard, batch: float
) -> tuple[Question, Plan, Explanation]:
    question = Question(
        model=ModelConfig.from_hf(find_model(model)[0], name=model),
        chip=find_chip(chip),
        chips=shard.ranks,
        isl=3000,
        osl=400,
        precision=Precision.of(dtype),
    )
    found = Plan(
        shard=shard, batch=int(batch) * shard.dp * shard.pp, step_tokens=1024, replicas=1, idle_chips=0
    )
    return question, found, explain(question, found)


def grid(found: Plan) -> tuple[Any, Any]:
    shard = found.shard
    return np.array([found.batch / (shard.dp * shard.pp)]), np.array([float(found.step_tokens)])


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_lines_add_up_to_the_step_to_the_last_bit(case: Any) -> None:
    question, found, told = laid_out(*case)
    load = load_at(question, *grid(found))
    chip = question.chip.at()
    for shape, laid in ((load.decode, told.decode), (load.mixed, told.prefill)):
        cost = step_cost(question.model, shape, chip, found.shard, question.precision, stage=told.stage)
        assert laid.seconds == float(np.asarray(cost.seconds).reshape(-1)[0])
        total = 0.0
        for line in laid.lines:
            total += line.seconds
        assert total == laid.seconds
        assert sum(line.share for line in laid.lines) == pytest.approx(1, rel=1e-12)
        assert sum(laid.by_bound().values()) == pytest.approx(laid.seconds, rel=1e-12)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_tpot_and_memory_are_those_of_the_plan(case: Any) -> None:
    question, found, told = laid_out(*case)
    state = steady(question, question.chip.at(), found.shard, *grid(found))
    assert sum(told.tpot_s.values()) == pytest.approx(float(state.tpot_s[0]), rel=1e-12)
    assert found.shard.pp * told.step_s == pytest.approx(float(state.tpot_s[0]), rel=1e-12)
    assert told.use == float(state.prefill_use[0])
    assert float(told.memory.total[0]) == memory_bytes(question, found.shard, *grid(found))[0]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_bytes_and_flops_are_the_operators(case: Any) -> None:
    question, found, told = laid_out(*case)
    shape = load_at(question, *grid(found)).decode
    operators = step(question.model, shape, found.shard, question.precision, stage=told.stage)

    def total(field: str) -> float:
        return sum(op.repeat * float(np.asarray(getattr(op, field)).reshape(-1)[0]) for op in operators)

    lines = told.decode.lines
    kept = sum(line.weight_bytes + line.kv_bytes + line.activation_bytes for line in lines)
    assert kept == pytest.approx(total("moved_bytes"), rel=1e-12)
    assert sum(line.weight_bytes for line in lines) == pytest.approx(total("weight_bytes"), rel=1e-12)
    assert sum(line.flops for line in lines) == pytest.approx(total("flops"), rel=1e-12)
    assert sum(line.link_bytes for line in lines) == pytest.approx(total("payload_bytes"), rel=1e-12)
    assert all(line.kv_bytes >= 0 and line.activation_bytes >= 0 for line in lines)
    assert any(line.kv_bytes > 0 for line in lines)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_nothing_beats_the_roofline_and_every_line_has_a_source(case: Any) -> None:
    for laid in (laid_out(*case)[2].decode, laid_out(*case)[2].prefill):
        for line in laid.lines:
            assert line.bound in BOUNDS
            assert line.sources
            if line.bound == "host":
                assert line.of_roofline is None
                continue
            assert line.of_roofline is not None and 0 < line.of_roofline <= 1
            assert Source.ANALYTIC in line.sources
            if line.bound == "link":
                assert line.link_bytes > 0 and line.flops == 0


def test_kv_read_in_a_decode_step_is_the_cache() -> None:
    question, found, told = laid_out("Qwen/Qwen3-8B", "h20", "bf16", Shard(), 16)
    per_token = 2 * 8 * 128 * 36 * 2
    cached = question.isl + question.osl / 2 + 1
    assert sum(line.kv_bytes for line in told.decode.lines) == pytest.approx(16 * cached * per_token)
    assert found.batch == 16


def test_a_long_prompt_is_bound_by_compute_and_a_small_batch_by_memory() -> None:
    _, _, told = laid_out("Qwen/Qwen3-32B", "h200", "bf16", Shard(tp=8), 2)
    by_name = {line.name: line for line in told.decode.lines}
    assert by_name["dense_up"].bound == "memory"
    assert by_name["attention_norm"].bound == "launch"
    # Two tokens' activations are on the other side before the call itself has begun.
    assert by_name["attention_sum"].bound == "launch"
    in_prefill = {line.name: line for line in told.prefill.lines}
    assert in_prefill["dense_up"].bound == "compute"
    assert in_prefill["attention_sum"].bound == "link"


def test_the_best_plan_can_be_explained() -> None:
    question, _, _ = laid_out("Qwen/Qwen3-8B", "h20", "bf16", Shard(), 16)
    best = plan(question).best
    assert best is not None
    assert sum(explain(question, best.plan).tpot_s.values()) == pytest.approx(best.figures.tpot_s, rel=1e-9)


def test_exchanges_beyond_a_domain_say_which_way_they_go() -> None:
    wide = laid_out("deepseek-ai/DeepSeek-V3", "h100", "fp8", Shard(tp=2, ep=32, dp=16), 16)[2]
    for laid in (wide.decode, wide.prefill):
        crossings = {line.name: line for line in laid.lines if line.crossing is not None}
        assert set(crossings) == {"dispatch", "combine"}
        for line in crossings.values():
            way = line.crossing
            assert way is not None
            quicker = min(way.forwarded_s, way.direct_s)
            assert quicker <= line.seconds < 1.1 * quicker + 58 * 30e-6
            # Groups 4 of 8, two to a node of four: 22/7 nodes are picked, few of them without an expert.
            assert 2.8 < way.domains < 22 / 7
            assert way.network_bytes < line.link_bytes and way.domain_bytes < line.link_bytes
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    for part in tables(wide):
        console.print(part)
    assert "once to each of 2.93 domains" in re.sub(r"\s+", " ", console.export_text())
    near = laid_out("deepseek-ai/DeepSeek-V3", "h200", "fp8", Shard(ep=8, dp=8), 16)[2]
    assert all(line.crossing is None for line in (*near.decode.lines, *near.prefill.lines))
