"""Users who ask again when answered: what any engine's policy must keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tongyun.codesign.engines import Engine, Prompts, engine
from tongyun.codesign.space import Question
from tongyun.codesign.users import Felt, Room, Table, Users, play_users
from tongyun.cost import step_cost
from tongyun.errors import Infeasible, InputError
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision, StepShape
from tongyun.model.shard import Shard, slice_of
from tongyun.model.steps import kv_bytes, weight_bytes
from tongyun.specs import find_chip, find_model

MODEL = ModelConfig.from_hf(find_model("Qwen/Qwen3-8B")[0], name="Qwen/Qwen3-8B")
ENGINES = ("vllm", "vllm-async", "sglang", "trtllm")
BARE = {name: Engine(prompts=engine(name).prompts, plans_ahead=False) for name in ENGINES}
"""Their ways with prompts, with nothing around the kernels."""


def ask(kernels: str, isl: int = 1024, osl: int = 64) -> Question:
    return Question(
        model=MODEL,
        chip=find_chip("h100"),
        chips=1,
        isl=isl,
        osl=osl,
        precision=Precision.of("bf16"),
        engine=kernels.removesuffix("-async"),
    )


def play(q: Question, habits: Engine, users: int, rounds: int, budget: int = 8192, **kw: Any) -> Felt:
    return play_users(Table(q, Shard(), Users(count=users, rounds=rounds, **kw), budget), habits)


@given(
    st.sampled_from(ENGINES),
    st.integers(1, 24),
    st.integers(1, 5),
    st.sampled_from([128, 1000, 3000]),
    st.sampled_from([2048, 8192]),
)
@settings(max_examples=25, deadline=None)
def test_every_request_is_answered_once(name: str, users: int, rounds: int, isl: int, budget: int) -> None:
    felt = play(ask(name, isl=isl), engine(name), users, rounds, budget, shortest=0.8)
    assert len(felt.ttft_s) == len(felt.tpot_s) == users * rounds
    assert (felt.ttft_s > 0).all()
    assert (felt.tpot_s > 0).all()


@pytest.mark.parametrize("name", ENGINES)
def test_a_lone_user_feels_the_steps_alone(name: str) -> None:
    q = ask(name)
    felt = play(q, BARE[name], 1, 3)
    bare = replace(q.at(), step_host_s=0.0)
    prompt = step_cost(MODEL, StepShape.prefilling(q.isl), bare).seconds
    token = step_cost(MODEL, StepShape.decoding(1, q.isl + q.osl / 2), bare).seconds
    # Between the sizes priced a step is linear, which bounds how far it is off.
    assert felt.ttft_s == pytest.approx(float(prompt), rel=0.05)
    assert felt.tpot_s == pytest.approx(float(token), rel=1e-6)


@pytest.mark.parametrize("field", ["step_s", "sequence_s", "prompt_layer_s", "request_s", "token_s"])
@pytest.mark.parametrize("name", ENGINES)
def test_a_slower_engine_never_serves_a_lone_user_sooner(name: str, field: str) -> None:
    q = ask(name, isl=128)
    quick, slow = play(q, BARE[name], 1, 3), play(q, replace(BARE[name], **{field: 2e-3}), 1, 3)
    assert (slow.ttft_s >= quick.ttft_s).all()
    assert (slow.tpot_s >= quick.tpot_s * (1 - 1e-9)).all()
    assert slow.ttft_s.sum() + slow.tpot_s.sum() > quick.ttft_s.sum() + quick.tpot_s.sum()


def test_planning_ahead_lets_a_question_wait_one_step_more() -> None:
    q = ask("vllm", isl=4096, osl=256)
    late = replace(BARE["vllm"], request_s=1e-4)
    waits = [play(q, replace(late, plans_ahead=ahead), 8, 8).ttft_s[-32:].mean() for ahead in (False, True)]
    prompt = float(step_cost(MODEL, StepShape.prefilling(q.isl), q.at()).seconds)
    assert waits[1] > waits[0]
    assert waits[1] - waits[0] < 2 * prompt


def test_a_front_end_that_cannot_keep_up_sets_the_pace_of_tokens() -> None:
    q = ask("trtllm", isl=128, osl=256)
    slow = replace(BARE["trtllm"], token_s=5e-3)
    felt = play(q, slow, 32, 2)
    assert felt.tpot_s.mean() == pytest.approx(32 * 5e-3, rel=0.15)


@pytest.mark.parametrize("name", ENGINES)
def test_ten_times_more_users_than_seats_are_answered_in_ten_waves(name: str) -> None:
    """All ask at once: the mean first token waits for (0 + 1 + … + 9) / 10 whole answers."""
    q = ask(name, isl=128, osl=512)
    felt = play(q, BARE[name], 40, 1, seats=4)
    answer_s = felt.tpot_s.mean() * (q.osl - 1)
    assert felt.ttft_s.mean() == pytest.approx(4.5 * answer_s, rel=0.05)
    assert felt.tpot_s.mean() == pytest.approx(play(q, BARE[name], 4, 10).tpot_s.mean(), rel=0.05)


@given(st.sampled_from(ENGINES), st.integers(1, 24), st.integers(1, 30))
@settings(max_examples=20, deadline=None)
def test_fewer_seats_lose_no_request_and_more_than_users_change_nothing(
    name: str, users: int, seats: int
) -> None:
    q, habits = ask(name, isl=512), engine(name)
    bounded, free = play(q, habits, users, 2, seats=seats), play(q, habits, users, 2)
    assert len(bounded.ttft_s) == len(free.ttft_s) == 2 * users
    if seats >= users:
        assert np.array_equal(bounded.ttft_s, free.ttft_s) and np.array_equal(bounded.tpot_s, free.tpot_s)


def test_questions_need_not_be_a_multiple_of_users() -> None:
    assert len(Users(count=512, rounds=1.25).lengths(100, 0)) == 640


def test_lengths_are_the_same_in_every_run_and_within_their_bounds() -> None:
    users = Users(count=50, rounds=10, shortest=0.8)
    lengths = users.lengths(1000, 0)
    assert lengths == users.lengths(1000, 0)
    assert 800 <= min(lengths) < 820 and 980 < max(lengths) <= 1000
    assert np.mean(lengths) == pytest.approx(users.mean(1000), rel=0.02)


@pytest.mark.parametrize("name", ENGINES)
def test_no_token_is_faster_than_a_lone_users(name: str) -> None:
    alone = play(ask(name), BARE[name], 1, 1)
    crowded = play(ask(name), BARE[name], 16, 4)
    assert (crowded.tpot_s >= alone.tpot_s.min() * (1 - 1e-9)).all()
    assert crowded.ttft_s.min() >= alone.ttft_s.min() * (1 - 1e-9)


def test_prompts_first_keeps_rounds_in_step_and_mixing_spreads_them() -> None:
    def later_over_first(name: str) -> float:
        felt = play(ask(name, isl=4096, osl=256), BARE[name], 16, 8)
        first, later = felt.ttft_s[:16], felt.ttft_s[64:]
        return float(np.mean(later) / np.mean(first))

    assert later_over_first("sglang") == pytest.approx(1.0, rel=0.01)
    assert later_over_first("vllm") < 0.7


def test_prompts_first_does_not_stall_a_token_but_for_other_prompts() -> None:
    """Its mean token between bursts costs a decode step and a share of the prompts behind."""
    q = ask("sglang", isl=4096, osl=256)
    felt = play(q, BARE["sglang"], 16, 2)
    bare = replace(q.at(), step_host_s=0.0)
    decode = float(step_cost(MODEL, StepShape.decoding(16, q.isl + q.osl / 2), bare).seconds)
    waited = (felt.ttft_s.max() - felt.ttft_s.mean()) / (q.osl - 1)
    assert felt.tpot_s.mean() == pytest.approx(decode + waited, rel=0.01)


def test_an_unknown_engine_is_refused_with_the_near_names() -> None:
    with pytest.raises(InputError, match="did you mean vllm"):
        engine("vlm")


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
        play(question, Engine(prompts=Prompts.MIXED, plans_ahead=False), 4, 1)


def test_seats_come_out_of_the_room_an_engine_leaves() -> None:
    """A share of what is left, or a step's tensors kept beside it: 10 GB over weights are so many seats."""
    q = replace(ask("vllm", isl=1000, osl=24), precision=Precision.of("bf16"))
    weights = weight_bytes(MODEL, Shard(), q.precision)
    each = float(kv_bytes(MODEL, 1024, q.precision, slice_of(MODEL, Shard())))

    def seats(**kw: Any) -> int:
        room = Room(usable_bytes=weights + 10e9, **kw)
        return Table(q, Shard(), Users(count=500, rounds=1), 2048, room).most

    assert seats(holds_step=False) == int(10e9 / each)
    assert seats(holds_step=False, kv=0.7) == int(7e9 / each)
    assert int(7e9 / each) < seats() < int(10e9 / each)
