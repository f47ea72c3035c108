"""The loop learns, and an interruption changes nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tongyun.cloud.training.loop import Point, Run, read_curve, stage_at
from tongyun.cloud.training.prepare import Prepared, prepare
from tongyun.cloud.training.recipe import Recipe
from tongyun.errors import InputError, ServiceError


def begin(recipe: Recipe, prepared: Prepared, directory: Path) -> Run:
    return Run(recipe, prepared.tokens, directory, prepared.digest)


def quiet(point: Point) -> None:
    """Nobody watches."""


def losses(run: Run) -> list[tuple[float, float, float | None]]:
    return [(point.loss, point.balance, point.held_out_loss) for point in run.curve]


def test_resumed_equals_uninterrupted_bit_for_bit(recipe: Recipe, tmp_path: Path) -> None:
    prepared = prepare(recipe)
    whole = begin(recipe, prepared, tmp_path / "whole")
    whole.train(quiet)

    first = begin(recipe, prepared, tmp_path / "parts")
    first.train(quiet, until=5)
    second = begin(recipe, prepared, tmp_path / "parts")
    second.restore()
    assert second.step == 5
    second.train(quiet)

    assert losses(second) == losses(whole)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


class Pulled(Exception):
    """Somebody pulled the plug."""


def test_a_run_killed_between_checkpoints_goes_on_from_the_last_one(recipe: Recipe, tmp_path: Path) -> None:
    prepared = prepare(recipe)
    whole = begin(recipe, prepared, tmp_path / "whole")
    whole.train(quiet, until=8)

    def pull(point: Point) -> None:
        if point.step == 4:
            raise Pulled

    killed = begin(recipe, prepared, tmp_path / "killed")
    with pytest.raises(Pulled):
        killed.train(pull)
    assert [file.name for file in (tmp_path / "killed").iterdir() if "partial" in file.name] == []
    resumed = begin(recipe, prepared, tmp_path / "killed")
    resumed.restore()
    assert resumed.step == 3, "a checkpoint is written every three steps"
    resumed.train(quiet, until=8)
    assert losses(resumed) == losses(whole)


def test_the_loss_falls_and_every_step_is_in_the_curve(recipe: Recipe, tmp_path: Path) -> None:
    run = begin(recipe, prepare(recipe), tmp_path)
    seen: list[int] = []
    run.train(lambda point: seen.append(point.step))
    assert seen == list(range(12))
    assert run.curve[-1].loss < run.curve[0].loss - 1.0
    held_out = [point.held_out_loss for point in run.curve]
    assert [i for i, loss in enumerate(held_out) if loss is not None] == [3, 7, 11]
    assert [point.sequence for point in run.curve] == [16] * 6 + [32] * 6
    written = read_curve(tmp_path / "curve.csv")
    assert [p.tokens for p in written] == [256 * (i + 1) for i in range(12)]
    assert written[-1].loss == pytest.approx(run.curve[-1].loss, rel=1e-4)
    run.train(lambda point: pytest.fail("a finished run does not go on"))


def test_micro_batches_only_change_the_rounding(recipe: Recipe, tmp_path: Path) -> None:
    prepared = prepare(recipe)
    training = dataclasses.replace(recipe.training, micro_tokens=256, balance=0.0)
    parts = dataclasses.replace(recipe, training=dataclasses.replace(training, micro_tokens=64))
    runs = [begin(r, prepared, tmp_path) for r in (dataclasses.replace(recipe, training=training), parts)]
    for run in runs:
        run.train(quiet, until=1)
    assert runs[0].curve[0].loss == pytest.approx(runs[1].curve[0].loss, rel=1e-5)


def test_a_checkpoint_of_other_data_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    prepared = prepare(recipe)
    begin(recipe, prepared, tmp_path).train(quiet, until=1)
    other = Run(recipe, prepared.tokens, tmp_path, "another digest")
    with pytest.raises(InputError, match="made by another recipe"):
        other.restore()


def test_a_damaged_checkpoint_is_named(recipe: Recipe, tmp_path: Path) -> None:
    run = begin(recipe, prepare(recipe), tmp_path)
    run.checkpoint.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=r"checkpoint\.pt: cannot be read"):
        run.restore()


def test_a_loss_that_is_not_a_number_stops_the_run(recipe: Recipe, tmp_path: Path) -> None:
    run = begin(recipe, prepare(recipe), tmp_path)
    with torch.no_grad():
        run.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ServiceError, match="step 0: the loss is nan"):
        run.train(quiet)
    assert not run.checkpoint.exists(), "a broken model is never saved"


def test_stages_begin_where_the_recipe_says(recipe: Recipe) -> None:
    assert [stage_at(step, recipe)[0].sequence for step in (0, 5, 6, 11)] == [16, 16, 32, 32]
    assert stage_at(8, recipe)[1] == 6
