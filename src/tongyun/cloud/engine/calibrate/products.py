"""Measure the products of the model: linear layers and experts, with the engine's own operations.

Every product is taken again and again, on a CPU with one weight matrix, so that one that fits a
cache is read from it, as it is in a model that fits; `memory` says what a larger
footprint costs. Weights and activations are in the types that the engine has for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from tongyun.cloud.engine.calibrate.bench import Bench, Probe
from tongyun.specs.samples import GroupedMatmulSample, MatmulSample
from tongyun.units import DType

COLUMNS, WIDTHS = (64, 512, 4096), (64, 128, 256, 512, 1024, 4096)
"""Of the weight: its rows are the product's columns, its width is what is summed over."""
ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 40, 64, 128, 256, 512)
EXPERT_SIZES = ((64, 32), (256, 128), (1024, 256), (2048, 768))
"""Hidden width and width of one expert."""
EXPERT_ROWS = (1, 2, 3, 4, 6, 8, 16, 32, 128)
EXPERT_GROUPS = (2, 8)
MOST_FLOPS, MOST_FLOPS_QUEUED = 1.2e9, 2e11
"""A larger product than this takes too long to repeat; its rate is that of the largest below. On a GPU
smaller ones say nothing of its rate."""
COLUMNS_QUEUED = 32768
"""On a GPU of such a matrix too: a head's time is that of reading it, a small matrix's that of a launch."""


def linear(bench: Bench) -> Iterator[Probe[MatmulSample]]:
    """`ops.linear` over rows and weight sizes."""
    columns = (*COLUMNS, COLUMNS_QUEUED) if bench.queued else COLUMNS
    sizes = [(n, k) for k in WIDTHS for n in columns]
    for n, k in sizes if not bench.quick else sizes[::6]:
        weights = bench.copies(n, k)
        for m in ROWS if not bench.quick else ROWS[::5]:
            if 2.0 * m * n * k <= _most_flops(bench):
                yield _linear(bench, bench.weight_type, (m, n, k), weights)


def _most_flops(bench: Bench) -> float:
    return MOST_FLOPS_QUEUED if bench.queued else MOST_FLOPS


def exact(bench: Bench) -> Iterator[Probe[MatmulSample]]:
    """`ops.linear` where weights are stored as wide as activations are: a few points."""
    if bench.activation_type is not bench.weight_type:
        width = 1024 if not bench.quick else 128
        weights = [bench.activation(width, width)]
        for m in (1, 16, 256):
            yield _linear(bench, bench.activation_type, (m, width, width), weights)


def _linear(
    bench: Bench, dtype: DType, shape: tuple[int, int, int], weights: list[Tensor]
) -> Probe[MatmulSample]:
    m, n, k = shape
    return Probe(
        call=_multiply(bench.ops.linear, bench.activation(m, k), weights),
        sample=lambda seconds: MatmulSample(dtype=dtype, m=m, n=n, k=k, seconds=seconds),
    )


def _multiply(
    linear: Callable[[Tensor, Tensor], Tensor], x_TD: Tensor, weights: list[Tensor]
) -> Callable[[], Tensor]:
    if len(weights) == 1:
        return partial(linear, x_TD, weights[0])
    turns = cycle(weights)
    return lambda: linear(x_TD, next(turns))


def experts(bench: Bench) -> Iterator[Probe[GroupedMatmulSample]]:
    """`ops.experts`: up, activation and down of every group, each with as many rows.

    A sample is written as the up-projection of those rows: n = 2 × width, k = hidden.
    """
    for hidden, width in EXPERT_SIZES if not bench.quick else EXPERT_SIZES[:1]:
        for groups in EXPERT_GROUPS:
            weights = bench.weight(groups, 2 * width, hidden), bench.weight(groups, hidden, width)
            for rows in EXPERT_ROWS if not bench.quick else EXPERT_ROWS[::4]:
                if 6.0 * groups * rows * hidden * width <= _most_flops(bench):
                    yield _experts(bench, groups * rows // 2, weights)


def _experts(bench: Bench, tokens: int, weights: tuple[Tensor, Tensor]) -> Probe[GroupedMatmulSample]:
    """Two experts a token."""
    groups, n, k = weights[0].shape
    routing = _balanced(tokens, groups, bench.device)
    return Probe(
        call=partial(bench.ops.experts, bench.activation(tokens, k), *weights, *routing),
        sample=lambda seconds: GroupedMatmulSample(
            dtype=bench.weight_type, m=2 * tokens, n=n, k=k, groups=groups, seconds=seconds
        ),
    )


def _balanced(tokens: int, groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two experts a token, every expert as often as the others: chosen (T, 2) and weights (T, 2)."""
    first = torch.arange(tokens, device=device) % (groups // 2)
    chosen_TN = torch.stack((first, first + groups // 2), dim=1)
    return chosen_TN, torch.full(chosen_TN.shape, 0.5, device=device)
