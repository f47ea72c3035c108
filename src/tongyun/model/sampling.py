"""Choose the next token of each request from its row of logits.

Decides the order of the filters and where randomness comes from. A row's token
depends on its own logits, options, history and position only, never on the rows
beside it: the uniform number of a draw is a hash of the request's seed and the
position drawn for, so a request repeats exactly in any batch and after preemption.
Knows no model, cache or clock.

Order, each on what the one before left: repetition, presence and frequency penalty,
temperature, min_p, top_k, top_p. Log-probabilities are those of the model, before
all of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tongyun.model.options import SamplingOptions

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One row to sample, and what its token may depend on."""

    options: SamplingOptions
    seed: int
    """`options.seed`, or any number where that is None."""
    history: Sequence[int] = ()
    """Every token known so far; the position drawn for is its length."""
    prompt_tokens: int = 0
    """How many of them are the prompt."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Tokens by row; by row too, for rows that asked, (log-probability, top alternatives)."""

    tokens: list[int]
    scores: dict[int, tuple[float, tuple[tuple[int, float], ...]]]


def _argmax(logits_NV: Tensor) -> Tensor:
    return logits_NV.argmax(-1)


def sample(logits_NV: Tensor, draws: Sequence[Draw], argmax: Callable[[Tensor], Tensor] = _argmax) -> Drawn:
    """One token a row. `logits_NV` is float32 and may be overwritten."""
    options = [draw.options for draw in draws]
    scored = [i for i, o in enumerate(options) if o.logprobs]
    raw_NV = logits_NV[scored].log_softmax(-1) if scored else None
    penalised = [i for i, o in enumerate(options) if o.penalised]
    if penalised:
        _penalise(logits_NV, penalised, [draws[i] for i in penalised])
    random = [i for i, o in enumerate(options) if not o.greedy]
    if not random:
        tokens = argmax(logits_NV).tolist()
    else:
        tokens_N = torch.empty(len(draws), dtype=torch.long, device=logits_NV.device)
        greedy = [i for i, o in enumerate(options) if o.greedy]
        if greedy:
            tokens_N[greedy] = argmax(logits_NV[greedy])
        tokens_N[random] = _draw(logits_NV[random], [draws[i] for i in random])
        tokens = tokens_N.tolist()
    scores = {} if raw_NV is None else _scores(raw_NV, scored, tokens, options)
    return Drawn(tokens=tokens, scores=scores)


def _penalise(logits_NV: Tensor, rows: list[int], draws: list[Draw]) -> None:
    """Apply the three penalties in place, all rows in one gather and one scatter."""
    row, token, less, factor = [], [], [], []
    for index, draw in zip(rows, draws, strict=True):
        o = draw.options
        ids, first = np.unique(np.asarray(draw.history, dtype=np.int64), return_inverse=True)
        counts = np.bincount(first[draw.prompt_tokens :], minlength=len(ids))
        row.append(np.full(len(ids), index))
        token.append(ids)
        less.append(counts * o.frequency_penalty + (counts > 0) * o.presence_penalty)
        factor.append(np.full(len(ids), o.repetition_penalty))
    device = logits_NV.device
    row_X, token_X = _tensor(np.concatenate(row), device), _tensor(np.concatenate(token), device)
    less_X = _tensor(np.concatenate(less).astype(np.float32), device)
    factor_X = _tensor(np.concatenate(factor).astype(np.float32), device)
    value_X = logits_NV[row_X, token_X]
    value_X = torch.where(value_X > 0, value_X / factor_X, value_X * factor_X) - less_X
    logits_NV[row_X, token_X] = value_X


def _tensor(array: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)


def _draw(logits_NV: Tensor, draws: list[Draw]) -> Tensor:
    """Temperature, filters, and one draw a row by inverting the cumulative distribution."""
    options, device = [draw.options for draw in draws], logits_NV.device
    temperature_N = torch.tensor([o.temperature for o in options], device=device)
    # A temperature this low is greedy in float32 anyway, and dividing by less overflows.
    scaled_NV = logits_NV / temperature_N.clamp(min=1e-5).unsqueeze(1)
    if any(o.min_p for o in options):
        least_N = torch.tensor([math.log(o.min_p) if o.min_p else -math.inf for o in options], device=device)
        floor_N = scaled_NV.amax(-1) + least_N
        scaled_NV = scaled_NV.masked_fill(scaled_NV < floor_N.unsqueeze(1), -math.inf)
    uniform_N = torch.from_numpy(uniform([d.seed for d in draws], [len(d.history) for d in draws]))
    uniform_N = uniform_N.to(device)
    sorted_rows = [i for i, o in enumerate(options) if o.top_p < 1.0 or o.top_k is not None]
    plain_rows = [i for i, o in enumerate(options) if o.top_p == 1.0 and o.top_k is None]
    tokens_N = torch.empty(len(draws), dtype=torch.long, device=device)
    if plain_rows:
        probability_NV = scaled_NV[plain_rows].softmax(-1).double()
        tokens_N[plain_rows] = _invert(probability_NV, uniform_N[plain_rows])
    if sorted_rows:
        chosen = [options[i] for i in sorted_rows]
        tokens_N[sorted_rows] = _draw_sorted(scaled_NV[sorted_rows], chosen, uniform_N[sorted_rows])
    return tokens_N


def _draw_sorted(logits_NV: Tensor, options: list[SamplingOptions], uniform_N: Tensor) -> Tensor:
    """Draw from the head of each sorted row, looking deeper only where top_p is not reached.

    Sorting a whole vocabulary costs more than a decode step of a small model, and
    top_p is nearly always reached within a few hundred tokens.
    """
    vocab, device = logits_NV.shape[1], logits_NV.device
    whole_N = logits_NV.logsumexp(-1)
    tokens_N = torch.empty(len(options), dtype=torch.long, device=device)
    left = list(range(len(options)))
    depth = max([256, *(o.top_k or 0 for o in options)])
    while left:
        depth = min(depth, vocab)
        value_NC, id_NC = logits_NV[left].topk(depth, dim=-1)
        k_N = torch.tensor([min(options[i].top_k or vocab, vocab) for i in left], device=device)
        value_NC = value_NC.masked_fill(torch.arange(depth, device=device) >= k_N.unsqueeze(1), -math.inf)
        total_N = torch.where(k_N <= depth, value_NC.logsumexp(-1), whole_N[left])
        probability_NC = (value_NC - total_N.unsqueeze(1)).exp().double()
        mass_NC = probability_NC.cumsum(-1)
        p_N = torch.tensor([options[i].top_p for i in left], dtype=torch.float64, device=device)
        reached_N = (mass_NC[:, -1] >= p_N) | (k_N <= depth) | (depth == vocab)
        # The token that crosses top_p belongs to the set; the first always does.
        kept_NC = probability_NC * (mass_NC - probability_NC < p_N.unsqueeze(1))
        column_N = _invert(kept_NC, uniform_N[left])
        token_N = id_NC.gather(1, column_N.unsqueeze(1)).squeeze(1)
        done = [row for row, ok in zip(left, reached_N.tolist(), strict=True) if ok]
        tokens_N[done] = token_N[reached_N]
        left = [row for row in left if row not in done]
        depth *= 16
    return tokens_N


def _invert(mass_NC: Tensor, uniform_N: Tensor) -> Tensor:
    """The first column whose cumulative mass exceeds `u × total`; never one without mass."""
    cumulative_NC = mass_NC.cumsum(-1)
    target_N1 = uniform_N.unsqueeze(1) * cumulative_NC[:, -1:]
    column_N = torch.searchsorted(cumulative_NC, target_N1, right=True).squeeze(1)
    # u × total may round up to the total, which is past the last column with mass.
    last_N = (mass_NC > 0).int().cumsum(-1).argmax(-1)
    return torch.minimum(column_N, last_N)


def uniform(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """A number in [0, 1) for each seed and position: SplitMix64's output function, twice.

    Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
    """
    seed = np.array([s & _MASK64 for s in seeds], dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(seed + step) + (position + np.uint64(1)) * step)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _scores(
    raw_NV: Tensor, rows: list[int], tokens: list[int], options: list[SamplingOptions]
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    chosen = torch.tensor([tokens[i] for i in rows], device=raw_NV.device)
    own = raw_NV.gather(1, chosen.unsqueeze(1)).squeeze(1).tolist()
    most = max(options[i].top_logprobs for i in rows)
    value, index = raw_NV.topk(min(most, raw_NV.shape[1]), dim=-1)
    tops = zip(index.tolist(), value.tolist(), strict=True)
    return {
        row: (score, tuple(zip(ids, values, strict=True))[: options[row].top_logprobs])
        for row, score, (ids, values) in zip(rows, own, tops, strict=True)
    }
