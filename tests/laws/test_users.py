"""Users who ask again when answered: what any engine's policy must keep."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tongyun.codesign.space import Question
from tongyun.codesign.users import play_users
from tongyun.cost import step_cost
from tongyun.errors import Infeasible
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision, StepShape
from tongyun.model.shard import Shard
from tongyun.specs import find_chip, find_model

MODEL = ModelConfig.from_hf(find_model("Qwen/Qwen3-8B")[0], name="Qwen/Qwen3-8B")
ENGINES = ("vllm", "sglang", "trtllm")


def ask(engine: str, isl: int = 1024, osl: int = 64) -> Question:
    return Question(
        model=MODEL,
        chip=find_chip("h100"),
        chips=1,
        isl=isl,
        osl=osl,
        precision=Precision.of("bf16"),
        engine=engine,
    )


@given(
    st.sampled_from(ENGINES),
    st.integers(1, 24),
    st.integers(1, 5),
    st.sampled_from([128, 1000, 3000]),
    st.sampled_from([2048, 8192]),
)
@settings(max_examples=25, deadline=None)
def test_every_request_is_answered_once(engine: str, users: int, rounds: int, isl: int, budget: int) -> None:
    felt = play_users(ask(engine, isl=isl), Shard(), users, budget, rounds)
    assert len(felt.ttft_s) == len(felt.tpot_s) == users * rounds
    assert (felt.ttft_s > 0).all()
    assert (felt.tpot_s > 0).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_lone_user_feels_the_steps_alone(engine: str) -> None:
    q = ask(engine)
    felt = play_users(q, Shard(), 1, 8192, 3)
    prompt = step_cost(MODEL, StepShape.prefilling(q.isl), q.at()).seconds
    token = step_cost(MODEL, StepShape.decoding(1, q.isl + q.osl / 2), q.at()).seconds
    # Between the sizes priced a step is linear, which bounds how far it is off.
    assert felt.ttft_s == pytest.approx(float(prompt), rel=0.05)
    assert felt.tpot_s == pytest.approx(float(token), rel=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_token_is_faster_than_a_lone_users(engine: str) -> None:
    alone = play_users(ask(engine), Shard(), 1, 8192, 1)
    crowded = play_users(ask(engine), Shard(), 16, 8192, 4)
    assert (crowded.tpot_s >= alone.tpot_s.min() * (1 - 1e-9)).all()
    assert crowded.ttft_s.min() >= alone.ttft_s.min() * (1 - 1e-9)


def test_prompts_first_keeps_rounds_in_step_and_mixing_spreads_them() -> None:
    def later_over_first(engine: str) -> float:
        felt = play_users(ask(engine, isl=4096, osl=256), Shard(), 16, 8192, 8)
        first, later = felt.ttft_s[:16], felt.ttft_s[64:]
        return float(np.mean(later) / np.mean(first))

    assert later_over_first("sglang") == pytest.approx(1.0, rel=0.01)
    assert later_over_first("vllm") < 0.7


def test_prompts_first_does_not_stall_a_token_but_for_other_prompts() -> None:
    """Its mean token between bursts costs a decode step and a share of the prompts behind."""
    q = ask("sglang", isl=4096, osl=256)
    felt = play_users(q, Shard(), 16, 8192, 2)
    decode = float(step_cost(MODEL, StepShape.decoding(16, q.isl + q.osl / 2), q.at()).seconds)
    waited = (felt.ttft_s.max() - felt.ttft_s.mean()) / (q.osl - 1)
    assert felt.tpot_s.mean() == pytest.approx(decode + waited, rel=0.01)


def test_no_room_for_a_request_is_said() -> None:
    large = ModelConfig.from_hf(find_model("Qwen/Qwen3-235B-A22B")[0], name="Qwen/Qwen3-235B-A22B")
    question = Question(
        model=large,
        chip=find_chip("h100"),
        chips=1,
        isl=128,
        osl=16,
        precision=Precision.of("bf16"),
    )
    with pytest.raises(Infeasible, match="no room for one request"):
        play_users(question, Shard(), 4, 8192, 1)
