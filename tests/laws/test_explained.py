"""Any legal cut and load: explained steps add up to what was priced, whoever explains them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tongyun.codesign.explain import explain
from tongyun.codesign.plan import Plan
from tongyun.codesign.space import Question
from tongyun.codesign.steady import load_at, steady
from tongyun.cost import step_cost
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision
from tongyun.model.shard import Shard, broken_rule
from tongyun.specs import find_chip, find_model

MODELS = ("Qwen/Qwen3-8B", "Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V3", "openai/gpt-oss-20b")
SHARDS = [
    Shard(tp=tp, pp=pp, ep=ep, dp=dp)
    for tp in (1, 2, 4)
    for pp in (1, 2)
    for dp in (1, 4)
    for ep in (1, 4, 8)
]


@given(
    st.sampled_from(MODELS),
    st.sampled_from(["h20", "a100", "zhenwu-810e", "tpu-v6e"]),
    st.sampled_from(SHARDS),
    st.integers(1, 200),
    st.sampled_from([512, 2048]),
    st.integers(16, 3000),
)
@settings(max_examples=60, deadline=None)
def test_lines_add_up_whatever_the_plan(
    model: str, chip: str, shard: Shard, group: int, budget: int, isl: int
) -> None:
    config = ModelConfig.from_hf(find_model(model)[0], name=model)
    if broken_rule(config, shard) is not None:
        return
    question = Question(
        model=config,
        chip=find_chip(chip),
        chips=shard.ranks,
        isl=isl,
        osl=100,
        precision=Precision.of("bf16"),
    )
    found = Plan(shard=shard, batch=group * shard.dp * shard.pp, step_tokens=budget, replicas=1, idle_chips=0)
    told = explain(question, found)
    batch, tokens = np.array([float(group)]), np.array([float(budget)])
    load = load_at(question, batch, tokens)
    for shape, laid in ((load.decode, told.decode), (load.mixed, told.prefill)):
        cost = step_cost(config, shape, question.chip.at(), shard, question.precision, stage=told.stage)
        assert laid.seconds == float(np.asarray(cost.seconds).reshape(-1)[0])
        assert sum(line.seconds for line in laid.lines) == pytest.approx(laid.seconds, rel=1e-12)
        assert all(line.of_roofline is None or line.of_roofline <= 1 for line in laid.lines)
    state = steady(question, question.chip.at(), shard, batch, tokens)
    assert sum(told.tpot_s.values()) == pytest.approx(float(state.tpot_s[0]), rel=1e-12)
