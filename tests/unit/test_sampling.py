"""Sampling follows its options, and a row never depends on the rows beside it."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from tongyun.errors import RequestError
from tongyun.model.options import SamplingOptions
from tongyun.model.sampling import Draw, Drawn, sample, uniform

VOCAB = 50


def logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def draw(
    options: SamplingOptions,
    *,
    position: int = 0,
    seed: int = 11,
    prompt: tuple[int, ...] = (),
    produced: tuple[int, ...] = (),
) -> Draw:
    history = prompt + produced or (0,) * position
    return Draw(options=options, seed=seed, history=history, prompt_tokens=len(history) - len(produced))


def many(row: torch.Tensor, options: SamplingOptions, count: int = 4000) -> Counter[int]:
    drawn = sample(row.expand(count, -1).clone(), [draw(options, position=i) for i in range(count)])
    return Counter(drawn.tokens)


def test_greedy_is_argmax() -> None:
    x = logits(5)
    drawn = sample(x.clone(), [draw(SamplingOptions(temperature=0.0))] * 5)
    assert drawn.tokens == x.argmax(-1).tolist()
    assert drawn.scores == {}


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(),
        SamplingOptions(temperature=0.5),
        SamplingOptions(top_k=7),
        SamplingOptions(top_p=0.7),
        SamplingOptions(min_p=0.1),
        SamplingOptions(temperature=1.5, min_p=0.02, top_k=12, top_p=0.8),
    ],
)
def test_frequencies_match_the_filtered_distribution(options: SamplingOptions) -> None:
    """χ² of 4000 draws against the distribution written out in NumPy, at the 99.9 % level."""
    row = logits(1, seed=5)
    expected = _distribution(row[0].double().numpy(), options)
    seen = many(row, options)
    assert all(expected[token] > 0 for token in seen)
    held = [t for t in range(VOCAB) if expected[t] * 4000 >= 5]
    statistic = sum((seen[t] - 4000 * expected[t]) ** 2 / (4000 * expected[t]) for t in held)
    degrees = max(1, len(held) - 1)
    # Wilson and Hilferty's approximation of the χ² quantile; 3.09 is the normal quantile of 99.9 %.
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3
    assert statistic < limit


def _distribution(row: np.ndarray, options: SamplingOptions) -> np.ndarray:
    p = np.exp(row / options.temperature)
    p /= p.sum()
    p[p < options.min_p * p.max()] = 0
    order = np.argsort(-p)
    if options.top_k:
        p[order[options.top_k :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= options.top_p]] = 0
    return p / p.sum()


def test_top_p_deeper_than_the_first_look() -> None:
    """A flat distribution needs far more than the first few hundred sorted tokens."""
    flat = torch.zeros(1, 5000)
    tokens = many(flat, SamplingOptions(top_p=0.9), count=3000)
    assert len(tokens) > 1500
    assert max(tokens) < 5000


def test_a_row_does_not_depend_on_its_batch() -> None:
    x = logits(6, seed=9)
    draws = [
        draw(SamplingOptions(temperature=0.8, top_p=0.9), position=4, seed=1),
        draw(SamplingOptions(temperature=0.0), position=5),
        draw(SamplingOptions(top_k=3), position=6, seed=2),
        draw(SamplingOptions(repetition_penalty=1.4), seed=3, prompt=(1, 2, 3)),
        draw(SamplingOptions(min_p=0.05, logprobs=True, top_logprobs=2), position=8, seed=4),
        draw(SamplingOptions(), position=9, seed=5),
    ]
    together = sample(x.clone(), draws)
    alone = [sample(x[i : i + 1].clone(), [draws[i]]) for i in range(6)]
    assert together.tokens == [drawn.tokens[0] for drawn in alone]
    backwards: Drawn = sample(x.flip(0), draws[::-1])
    assert backwards.tokens[::-1] == together.tokens
    assert together.scores[4] == alone[4].scores[0] == backwards.scores[1]


def test_seed_and_position_decide_the_draw() -> None:
    row = logits(1, seed=3)
    options = SamplingOptions()
    first = [sample(row.clone(), [draw(options, position=i, seed=7)]).tokens[0] for i in range(40)]
    again = [sample(row.clone(), [draw(options, position=i, seed=7)]).tokens[0] for i in range(40)]
    other = [sample(row.clone(), [draw(options, position=i, seed=8)]).tokens[0] for i in range(40)]
    assert first == again
    assert first != other


def test_penalties() -> None:
    row = torch.tensor([[2.0, -1.0, 0.5, 0.0]])
    options = SamplingOptions(
        temperature=0.0, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.125
    )
    changed = row.clone()
    sample(changed, [draw(options, prompt=(1, 1), produced=(0, 0, 0))])
    # 2/2 - 0.25 - 3 × 0.125; the prompt's token is only scaled, away from zero as it is negative.
    assert changed.tolist() == [[0.375, -2.0, 0.5, 0.0]]


def test_log_probabilities_are_the_model_s() -> None:
    x = logits(2, seed=6)
    expected = x.log_softmax(-1)
    options = SamplingOptions(temperature=0.3, repetition_penalty=5.0, logprobs=True, top_logprobs=3)
    drawn = sample(x.clone(), [draw(options, prompt=tuple(range(9))), draw(SamplingOptions())])
    own, top = drawn.scores[0]
    assert own == pytest.approx(expected[0, drawn.tokens[0]].item())
    assert [t for t, _ in top] == expected[0].topk(3).indices.tolist()
    assert 1 not in drawn.scores


def test_uniform_numbers_are_uniform() -> None:
    u = uniform([3] * 20_000, range(20_000))
    assert u.min() >= 0
    assert u.max() < 1
    assert np.abs(np.histogram(u, bins=20, range=(0, 1))[0] - 1000).max() < 4 * math.sqrt(1000)
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", 0),
        ("min_p", -1.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", math.inf),
        ("top_logprobs", 21),
    ],
)
def test_options_out_of_range_name_themselves(name: str, value: float) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingOptions(**{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name
