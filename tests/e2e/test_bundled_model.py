"""The model that comes with Tongyun: small enough, loadable by others, and it knows Python."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

from tongyun.cloud.training.bpe import Bpe
from tongyun.cloud.training.corpus import compressed_bits_per_byte, gather
from tongyun.cloud.training.evaluate import score
from tongyun.cloud.training.finish import complete
from tongyun.cloud.training.forward import causal
from tongyun.cloud.training.loop import read_curve
from tongyun.cloud.training.recipe import Recipe
from tongyun.model.bundled import DEFAULT, bundled_models
from tongyun.model.find import find_model
from tongyun.model.qwen3 import Qwen3
from tongyun.model.tokenizer import Tokenizer
from tongyun.model.weights import load_model, weight_bytes

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "stdlib-moe"


@pytest.fixture(scope="module")
def directory() -> Path:
    return bundled_models()[DEFAULT]


@pytest.fixture(scope="module")
def model(directory: Path) -> Qwen3:
    return load_model(directory)


def test_it_is_found_by_name_and_at_most_16_mb(directory: Path) -> None:
    assert find_model(DEFAULT) == directory
    assert sum(file.stat().st_size for file in directory.iterdir()) <= 16e6


def test_it_is_what_the_recipe_describes(model: Qwen3, directory: Path) -> None:
    recipe = Recipe.load(ROOT / "recipes" / "stdlib-moe.toml")
    record = json.loads((RESULTS / "record.json").read_text())
    assert vars(model.config) | {"name": ""} == vars(recipe.model_config) | {"name": ""}
    assert 2 * record["parameters"] == weight_bytes(model), "two bytes each"
    assert record["bits_per_byte_of"].keys() == set(recipe.data.held_out)
    curve = read_curve(RESULTS / "curve.csv")
    assert [point.step for point in curve] == list(range(recipe.training.steps))
    assert curve[-1].tokens == record["trained_tokens"]
    assert Tokenizer(directory).eos_ids == (0, 2)


def test_it_needs_fewer_bits_than_a_compressor_for_text_it_never_saw(model: Qwen3, directory: Path) -> None:
    recipe = Recipe.load(ROOT / "recipes" / "stdlib-moe.toml")
    corpus = gather(recipe)
    (document,) = (d for d in corpus.held_out if d.name == "queue.py")
    bpe = Bpe.load(directory)
    (result,) = score(model, [document], bpe, context=1024, stride=512).values()
    assert result.bits_per_byte < compressed_bits_per_byte([document])["xz"]
    record = json.loads((RESULTS / "record.json").read_text())
    if record["corpus_digest"] == corpus.digest:
        assert result.bits_per_byte == pytest.approx(record["bits_per_byte_of"]["queue.py"], rel=1e-3)


@pytest.mark.parametrize("head", ["for i in range(", "class TestCase(", "try:\n    import"])
def test_it_continues_python(model: Qwen3, directory: Path, head: str) -> None:
    """The first whole lines of what it says parse as Python, once an open block has a body."""
    text = head + complete(model, Bpe.load(directory), head, 48)
    assert any(_parses("\n".join(text.split("\n")[:lines])) for lines in range(1, 5)), text


def _parses(text: str) -> bool:
    closings = ("", "\n    pass", "\n        pass", "\nexcept Exception:\n    pass")
    for closing in closings:
        try:
            ast.parse(text + closing)
        except SyntaxError:
            continue
        return True
    return False


def test_transformers_agrees_on_every_next_token(model: Qwen3, directory: Path) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.tensor(
        Tokenizer(directory).encode("import os\n\n\ndef main(args):\n    for name in args:\n")
    )
    with torch.no_grad():
        ours = model.logits(model(tokens, torch.arange(len(tokens)), causal(len(tokens))))
        theirs = reference(tokens[None]).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_chat_ends_where_the_assistant_speaks(directory: Path) -> None:
    tokenizer = Tokenizer(directory)
    tokens = tokenizer.chat([{"role": "user", "content": "def add(a, b):"}])
    assert tokens[0] == 1
    assert tokenizer.token_text(tokens[-1]) == "\n"


def test_the_model_card_quotes_the_record() -> None:
    record = json.loads((RESULTS / "record.json").read_text())
    card = (ROOT / "docs" / "model-card.md").read_text(encoding="utf-8")
    quoted = {
        f"{record['parameters']:,} parameters",
        f"**{record['bits_per_byte']:.2f}**",
        f"{record['compressors']['gzip']:.2f}",
        f"{record['compressors']['xz']:.2f}",
        f"{record['training_s'] / 60:.0f} minutes",
    }
    assert not [figure for figure in quoted if figure not in card]
