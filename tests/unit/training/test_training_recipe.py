"""A recipe is read whole or refused by file, key and accepted values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tongyun.cloud.training.recipe import Recipe, Stage
from tongyun.errors import SpecError

BUNDLED = Path(__file__).parents[3] / "recipes" / "stdlib-moe.toml"


def test_the_bundled_recipe_is_a_model_of_at_most_16_mb() -> None:
    recipe = Recipe.load(BUNDLED)
    shape, vocab = recipe.model, recipe.tokenizer.vocab
    heads = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim * shape.hidden
    experts = shape.experts * (3 * shape.expert_intermediate + 1) * shape.hidden
    parameters = vocab * shape.hidden + shape.layers * (heads + experts)
    assert 2 * parameters < 15e6, "1 MB of the 16 is left for the tokenizer and the config"
    assert len(recipe.data.held_out) == len(set(recipe.data.held_out)) >= 10


def test_every_value_arrives(recipe: Recipe) -> None:
    assert recipe.training.steps == 12
    assert recipe.training.stages == (Stage(start=0.0, sequence=16), Stage(start=0.5, sequence=32))
    assert recipe.optimizer.other_betas == (0.9, 0.95), "left out, so the default"
    config = recipe.model_config
    assert (config.layers, config.vocab, config.tied, config.eos_token_ids) == (2, 320, True, (0, 2))
    assert config.experts is not None
    assert (config.experts.count, config.experts.per_token) == (4, 2)


@pytest.mark.parametrize(
    ("old", "new", "key", "problem"),
    [
        ("warmup = 0.1", "warmpu = 0.1", "training.warmpu", "did you mean warmup"),
        ("hidden = 32", "hidden = 32.5", "model.hidden", "whole number"),
        ("hidden = 32", "hidden = true", "model.hidden", "whole number"),
        ("hidden = 32", "hidden = -1", "model.hidden", "above 0"),
        ("vocab = 320", "", "tokenizer.vocab", "missing"),
        ("vocab = 320", "vocab = 100_000", "tokenizer.vocab", "65536"),
        ("vocab = 320", "vocab = 20", "tokenizer.vocab", "at least 300"),
        ('source = "directory"', 'source = "stdlb"', "data.source", "stdlib"),
        ('path = "code"', "", "data.path", "needed"),
        ("kv_heads = 2", "kv_heads = 3", "model.kv_heads", "divide heads"),
        ("experts_per_token = 2", "experts_per_token = 5", "model.experts_per_token", "at most"),
        ("micro_tokens = 128", "micro_tokens = 100", "training.micro_tokens", "divide"),
        ("warmup = 0.1", "warmup = 1.1", "training.warmup", "from 0 to 1"),
        ("from = 0.5", "from = 1.5", "training.stages", "below 1"),
        ("from = 0.5", "start = 0.5", "training.stages[1].start", "from"),
        ("sequence = 32", "sequence = 128", "training.stages[1].sequence", "max_positions"),
        ("warmup = 0.1", "warmup = nan", "training.warmup", "finite"),
        ("matrix_lr = 0.02", "matrix_lr = -0.02", "optimizer.matrix_lr", "above 0"),
        ("matrix_lr = 0.02", "matrix_lr = inf", "optimizer.matrix_lr", "finite"),
        ("matrix_lr = 0.02", "other_betas = [0.9]", "optimizer.other_betas", "2 values"),
        ("stride = 32", "stride = 65", "evaluation.stride", "context"),
        ('held_out = ["pkg/held.py"]', "held_out = []", "data.held_out", "at least one"),
        ('held_out = ["pkg/held.py"]', "held_out = [1]", "data.held_out[0]", "text"),
        ("[tokenizer]", "[tokeniser]", "tokeniser", "did you mean tokenizer"),
        ("seed = 3", "seed = ", "", "TOML"),
        ("seed = 3", "seed = -3", "seed", "0 or more"),
    ],
)
def test_a_wrong_recipe_names_file_and_key(
    write: Callable[[str], Path], recipe_text: str, old: str, new: str, key: str, problem: str
) -> None:
    assert old in recipe_text
    file = write(recipe_text.replace(old, new))
    with pytest.raises(SpecError, match=r"recipe\.toml") as caught:
        Recipe.load(file)
    assert caught.value.key == key
    assert problem in caught.value.problem
    assert caught.value.exit_code == 2


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nothing\.toml: no such recipe"):
        Recipe.load(tmp_path / "nothing.toml")
