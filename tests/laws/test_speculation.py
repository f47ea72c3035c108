"""Drafted tokens and cached prefixes: what they can gain, and what they never can."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tongyun.codesign.explain import explain
from tongyun.codesign.plan import plan
from tongyun.codesign.space import Question
from tongyun.codesign.steady import Steady, memory_bytes, steady
from tongyun.errors import InputError
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Kind, Precision, Sequences, StepShape
from tongyun.model.shard import Shard
from tongyun.model.steps import step
from tongyun.specs import find_chip, find_model
from tongyun.units import Source

MODELS = {
    "Qwen/Qwen3-32B": Shard(tp=4),
    "Qwen/Qwen3-235B-A22B": Shard(tp=4, ep=8, dp=2),
    "deepseek-ai/DeepSeek-V3": Shard(tp=2, pp=2, ep=8, dp=4),
}
models = st.sampled_from(sorted(MODELS))
groups = st.sampled_from([1.0, 4.0, 33.0, 120.0])


def ask(model: str, **changes: object) -> Question:
    config = ModelConfig.from_hf(find_model(model)[0], name=model)
    given = {
        "model": config,
        "chip": find_chip("h200"),
        "chips": 16,
        "isl": 3000,
        "osl": 400,
        "precision": Precision.of("fp8"),
    }
    return Question(**{**given, **changes})  # type: ignore[arg-type]


def state(question: Question, group: float = 16.0, budget: float = 4096.0) -> Steady:
    shard = MODELS[question.model.name]
    return steady(question, question.at(), shard, np.array([group]), np.array([budget]))


@given(models, groups, st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_drafts_that_are_never_right_gain_nothing(model: str, group: float, drafted: int) -> None:
    plain = state(ask(model), group)
    wrong = state(ask(model, draft_tokens=drafted, acceptance=0.0), group)
    assert wrong.tpot_s[0] > plain.tpot_s[0]
    assert wrong.tokens_per_s[0] < plain.tokens_per_s[0]
    assert wrong.ttft_s[0] >= plain.ttft_s[0]


@given(models, groups, st.integers(1, 5), st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted))
@settings(max_examples=25, deadline=None)
def test_better_drafts_give_tokens_sooner(
    model: str, group: float, drafted: int, shares: list[float]
) -> None:
    less, more = (state(ask(model, draft_tokens=drafted, acceptance=a), group) for a in shares)
    if more.prefill_use[0] < 1:
        assert more.tpot_s[0] <= less.tpot_s[0] * (1 + 1e-12)
        assert more.tokens_per_s[0] >= less.tokens_per_s[0] * (1 - 1e-12)


@given(st.integers(0, 16), st.floats(0, 0.99))
def test_tokens_of_a_step_are_the_closed_form(drafted: int, acceptance: float) -> None:
    question = ask("Qwen/Qwen3-32B", draft_tokens=drafted, acceptance=acceptance)
    closed = (1 - acceptance ** (drafted + 1)) / (1 - acceptance)
    assert question.step_tokens == pytest.approx(closed)
    assert replace(question, acceptance=1.0).step_tokens == drafted + 1


@pytest.mark.parametrize("model", MODELS)
def test_a_verifying_step_multiplies_what_its_positions_do(model: str) -> None:
    """Verifying k + 1 positions takes the products of so many, and passes the cache once."""
    config, shard = ask(model).model, MODELS[model]
    many = StepShape(decode=Sequences(new=4, context=3000, count=8), sampled=32)
    single = [StepShape(decode=Sequences(new=1, context=3000 + i, count=8), sampled=8) for i in range(4)]

    def total(shape: StepShape, field: str, kind: Kind) -> float:
        operators = step(config, shape, shard)
        return float(sum(op.repeat * getattr(op, field) for op in operators if op.kind is kind))

    for kind in (Kind.ATTENTION, Kind.MATMUL):
        alone = sum(total(shape, "flops", kind) for shape in single)
        assert total(many, "flops", kind) == pytest.approx(alone, rel=1e-12)
    assert total(many, "read_bytes", Kind.ATTENTION) < 0.5 * sum(
        total(shape, "read_bytes", Kind.ATTENTION) for shape in single
    )


def test_the_draft_module_is_held_and_its_cost_is_told() -> None:
    plain = ask("deepseek-ai/DeepSeek-V3", precision=Precision.of("fp8"), ttft_s=5.0, tpot_s=0.1)
    drafting = replace(plain, draft_tokens=2, acceptance=0.8)
    shard, group, budget = MODELS[plain.model.name], np.array([16.0]), np.array([4096.0])
    assert memory_bytes(drafting, shard, group, budget)[0] > memory_bytes(plain, shard, group, budget)[0]
    best = plan(drafting).best
    assert best is not None
    found = explain(drafting, best.plan)
    assert sum(found.tpot_s.values()) == pytest.approx(best.figures.tpot_s, rel=1e-9)
    last = best.plan.shard.pp - 1
    assert found.stage != last or any(line.name.startswith("draft_") for line in found.decode.lines)


def test_a_module_the_model_does_not_have_is_assumed() -> None:
    own = state(ask("deepseek-ai/DeepSeek-V3", draft_tokens=1, acceptance=0.8))
    assumed = state(ask("Qwen/Qwen3-32B", draft_tokens=1, acceptance=0.8))
    assert Source.ASSUMED in assumed.sources
    assert ask("deepseek-ai/DeepSeek-V3").model.mtp_layers > 0 and own.sources


# ── prefixes ─────────────────────────────────────────────────────────────────────────


@given(models, groups, st.lists(st.floats(0, 0.99), min_size=2, max_size=2).map(sorted))
@settings(max_examples=25, deadline=None)
def test_more_hits_are_never_slower(model: str, group: float, shares: list[float]) -> None:
    less, more = (state(ask(model, prefix_hit=share), group) for share in shares)
    assert more.ttft_s[0] <= less.ttft_s[0] * (1 + 1e-9)
    assert more.tpot_s[0] <= less.tpot_s[0] * (1 + 1e-9)
    assert more.tokens_per_s[0] >= less.tokens_per_s[0] * (1 - 1e-9)


def test_hits_are_attended_to_and_hold_memory() -> None:
    cold, warm = ask("Qwen/Qwen3-32B"), ask("Qwen/Qwen3-32B", prefix_hit=0.9)
    shard, group, budget = Shard(tp=4), np.array([16.0]), np.array([4096.0])
    kv = [memory_bytes(question, shard, group, budget)[0] for question in (cold, warm)]
    # A step takes more of the shorter prompts at once, so that no fewer sequences are held.
    assert kv[1] >= kv[0]
    short = state(replace(cold, isl=300, osl=400))
    assert state(warm).tpot_s[0] > short.tpot_s[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prefix_hit": 1.0}, "prefix_hit must be a share"),
        ({"prefix_hit": -0.1}, "prefix_hit must be a share"),
        ({"acceptance": 1.5}, "acceptance must be a probability"),
        ({"draft_tokens": 17}, "draft_tokens must be from 0 to 16"),
    ],
)
def test_shares_that_make_no_sense_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        ask("Qwen/Qwen3-32B", **changes)
