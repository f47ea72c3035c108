"""Bits per byte: every token once, with context, divided by bytes of text."""

from __future__ import annotations

import math

import pytest
import torch

from tongyun.cloud.training.evaluate import Score, score, total, windows
from tongyun.cloud.training.finish import complete
from tongyun.cloud.training.forward import new_model
from tongyun.cloud.training.prepare import prepare
from tongyun.cloud.training.recipe import Recipe


@pytest.mark.parametrize("length", [1, 2, 9, 10, 11, 12, 57])
@pytest.mark.parametrize(("context", "stride"), [(10, 10), (10, 4), (10, 1), (1, 1)])
def test_every_target_is_scored_once_with_the_context_promised(
    length: int, context: int, stride: int
) -> None:
    scored: list[int] = []
    for start, stop, first in windows(length, context, stride):
        assert 0 < stop - start <= context
        assert start <= first < stop
        for target in range(first + 1, stop + 1):
            before = target - start
            assert before >= min(target, context - stride + 1)
            scored.append(target)
    assert scored == list(range(1, length))


def test_a_model_that_knows_nothing_needs_log2_of_its_vocabulary_a_token(recipe: Recipe) -> None:
    prepared = prepare(recipe)
    model = new_model(recipe.model_config, seed=1)
    with torch.no_grad():
        model.norm.weight.zero_()
    (document,) = prepared.corpus.held_out
    scores = score(model, [document], prepared.bpe, context=64, stride=32)
    (result,) = scores.values()
    (row,) = prepared.bpe.encode_all([document.text])
    assert result.tokens == len(row) + 1, "all of the text's tokens and its end"
    assert result.bytes == len(document.text.encode()) > len(document.text)
    assert result.bits_per_byte == pytest.approx(math.log2(320) * (len(row) + 1) / result.bytes, rel=1e-4)


def test_longer_windows_only_change_what_is_seen_before(recipe: Recipe) -> None:
    prepared = prepare(recipe)
    model = new_model(recipe.model_config, seed=1)
    strides = [
        score(model, prepared.corpus.held_out, prepared.bpe, context=64, stride=stride) for stride in (64, 16)
    ]
    tokens = [total(scores.values()).tokens for scores in strides]
    assert tokens[0] == tokens[1]


def test_totals_weigh_by_bytes() -> None:
    parts = [
        Score(nats=math.log(2) * 10, tokens=5, bytes=10),
        Score(nats=math.log(2) * 90, tokens=20, bytes=30),
    ]
    assert total(parts).bits_per_byte == pytest.approx(2.5)
    assert total(parts).loss == pytest.approx(math.log(2) * 4)


def test_completions_are_repeatable_and_stop_at_the_limit(recipe: Recipe) -> None:
    bpe = prepare(recipe).bpe
    model = new_model(recipe.model_config, seed=1)

    def sample(seed: int) -> str:
        return complete(model, bpe, "def ", 12, 1.0, torch.Generator().manual_seed(seed))

    assert sample(1) == sample(1) != sample(2)
    assert complete(model, bpe, "def ", 12) == complete(model, bpe, "def ", 12)
    assert complete(model, bpe, "def " * 100, 12) == "", "no token beyond the last position"
