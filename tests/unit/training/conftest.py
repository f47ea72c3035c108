"""A recipe small enough to train in a second, and the files it is trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tongyun.cloud.training.recipe import Recipe

RECIPE = """
name = "small"
seed = 3
[data]
source = "directory"
path = "code"
exclude = ["tests", "_gen*"]
held_out = ["pkg/held.py"]
[tokenizer]
vocab = 320
[model]
layers = 2
hidden = 32
heads = 4
kv_heads = 2
head_dim = 8
experts = 4
experts_per_token = 2
expert_intermediate = 16
max_positions = 64
[training]
tokens = 3072
batch_tokens = 256
micro_tokens = 128
stages = [{ from = 0.0, sequence = 16 }, { from = 0.5, sequence = 32 }]
warmup = 0.1
decay = 0.5
evaluate_every = 4
checkpoint_every = 3
[optimizer]
matrix_lr = 0.02
[evaluation]
context = 64
stride = 32
quick_tokens = 128
prompts = ["def total(self, "]
prompt_tokens = 5
"""


def module(name: str) -> str:
    """Some Python that differs from module to module."""
    lines = [f'"""Module {name}: naïve sums."""', "", f"class {name.title()}:"]
    for i in range(30):
        lines += [f"    def method_{name}_{i}(self, value):", f"        return self.total(value + {i})", ""]
    return "\n".join(lines)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a recipe beside a folder of code and returns its path."""
    texts = {"b.py": "b", "a.py": "a", "pkg/held.py": "held", "pkg/kept.py": "kept"}
    texts |= {"tests/test_a.py": "tested", "_generated.py": "generated"}
    for name, word in texts.items():
        file = tmp_path / "code" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(module(word), encoding="utf-8")
    (tmp_path / "code" / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "code" / "empty.py").write_text("\n")

    def put(text: str = RECIPE) -> Path:
        file = tmp_path / "recipe.toml"
        file.write_text(text, encoding="utf-8")
        return file

    return put


@pytest.fixture
def recipe(write: Callable[..., Path]) -> Recipe:
    return Recipe.load(write(RECIPE))


@pytest.fixture
def recipe_text() -> str:
    return RECIPE
