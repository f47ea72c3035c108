"""What a measured deployment is judged by must not know it: the folds of `benchmarks/plan_h100_fit.py`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from plan_h100_fit import Fit, Fits, Tables, family, predict
from plan_h100_rows import Row
from tongyun.codesign.space import Question
from tongyun.codesign.users import Room, Users
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision
from tongyun.model.shard import Shard
from tongyun.specs import find_chip, find_model

MODELS = ("Qwen/Qwen3-8B", "Qwen/Qwen3-30B-A3B")


def row(model: str, tp: int, users: int) -> Row:
    question = Question(
        model=ModelConfig.from_hf(find_model(model)[0], name=model),
        chip=find_chip("h100"),
        chips=tp,
        isl=256,
        osl=32,
        precision=Precision.of("bf16"),
        engine="trtllm",
    )
    return Row(
        raw={"id": f"{model} {tp} {users}", "backend": "trtllm", "backend_version": "1"},
        question=question,
        shard=Shard(tp=tp),
        users=Users(count=users, rounds=2),
        loads=(),
        step_tokens=2048,
        room=Room(usable_bytes=80e9),
        engine="trtllm",
        measured={"TTFT": 0.05, "TPOT": 0.01},
    )


ROWS = [row(model, tp, users) for model in MODELS for tp in (2, 4) for users in (2, 4)]
TABLES = Tables()
TRUE = Fit(skew=1.0, times={"trtllm": (1e-3, 3e-5, 6e-4, 2e-3, 4e-5)})


@pytest.fixture(scope="module")
def made() -> list[Row]:
    """Rows measured on an engine that is what the play says, with times and a skew of the grid."""
    return [replace(one, measured=predict(TABLES.at(one, TRUE.skew), TRUE.habits(one))) for one in ROWS]


def test_times_that_made_the_rows_are_found_without_any_family(made: list[Row]) -> None:
    folds = Fits(made, TABLES).without(family)
    assert set(folds) == {f"trtllm {model.split('/')[-1]}, tp {tp}" for model in MODELS for tp in (2, 4)}
    for one in made:
        fold = folds[family(one)]
        said = predict(TABLES.at(one, fold.skew), fold.habits(one))
        assert said == pytest.approx(one.measured, rel=0.1)


def test_a_family_is_predicted_alike_whatever_was_measured_of_it(made: list[Row]) -> None:
    name = family(made[0])

    def slower(is_held_out: bool) -> Fit:
        """What is fitted without the family after it, or all others, were measured twice as slow."""
        rows = [
            replace(one, measured={what: 2 * value for what, value in one.measured.items()})
            if (family(one) == name) is is_held_out
            else one
            for one in made
        ]
        return Fits(rows, TABLES).without(family)[name]

    assert slower(True) == Fits(made, TABLES).without(family)[name]
    assert slower(True) != slower(False)
