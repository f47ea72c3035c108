"""Measure the products of the model: linear layers and experts, with the engine's own operations.

Every product is taken again and again on one weight matrix, so that a matrix that fits a
cache is read from it, as it is in a model that fits; `memory` says what a larger
footprint costs. Activations are float32, weights are in the type they are stored in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tongyun.cloud.engine.calibrate.bench import Bench
from tongyun.specs.samples import GroupedMatmulSample, MatmulSample

LINEAR_SIZES = ((64, 64), (256, 128), (512, 512), (1024, 1024), (4096, 1024), (1024, 4096), (32768, 1024))
"""Columns and inner width of the weight: small ones, squares, and an output head."""
ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 40, 64, 128, 256, 512)
EXPERT_SIZES = ((64, 32), (256, 128), (1024, 256), (2048, 768))
"""Hidden width and width of one expert."""
EXPERT_ROWS = (1, 2, 3, 4, 6, 8, 16, 32, 128)
EXPERT_GROUPS = (2, 8)
MOST_FLOPS = 2.5e9
"""A larger product than this takes too long to repeat; its rate is that of the largest below."""


@dataclass(frozen=True, kw_only=True)
class _Routing:
    chosen_TN: Tensor
    weight_TN: Tensor


def linear(bench: Bench) -> Iterator[MatmulSample]:
    """Seconds of `ops.linear` over rows and weight sizes."""
    sizes = LINEAR_SIZES if not bench.quick else LINEAR_SIZES[:2]
    for n, k in sizes:
        weight_OD = bench.weight(n, k)
        for m in ROWS if not bench.quick else ROWS[::3]:
            if 2.0 * m * n * k > MOST_FLOPS:
                break
            x_TD = bench.activation(m, k)
            seconds = bench.seconds(lambda x=x_TD, w=weight_OD: bench.ops.linear(x, w))  # type: ignore[misc]
            yield MatmulSample(dtype=bench.weight_type, m=m, n=n, k=k, seconds=seconds)


def exact(bench: Bench) -> Iterator[MatmulSample]:
    """Seconds of `ops.linear` where weights are stored as wide as activations are: a few points."""
    if bench.activation_type is bench.weight_type:
        return
    n, k = (1024, 1024) if not bench.quick else (128, 128)
    weight_OD = bench.activation(n, k)
    for m in (1, 16, 256):
        x_TD = bench.activation(m, k)
        seconds = bench.seconds(lambda x=x_TD: bench.ops.linear(x, weight_OD))  # type: ignore[misc]
        yield MatmulSample(dtype=bench.activation_type, m=m, n=n, k=k, seconds=seconds)


def experts(bench: Bench) -> Iterator[GroupedMatmulSample]:
    """Seconds of `ops.experts`: up, activation and down of every group, each with as many rows.

    A sample is written as the up-projection of those rows: n = 2 × width, k = hidden.
    """
    sizes = EXPERT_SIZES if not bench.quick else EXPERT_SIZES[:1]
    for hidden, width in sizes:
        for groups in EXPERT_GROUPS:
            gate_up_EOD, down_EDI = (
                bench.weight(groups, 2 * width, hidden),
                bench.weight(groups, hidden, width),
            )
            for rows in EXPERT_ROWS if not bench.quick else EXPERT_ROWS[::3]:
                if 6.0 * groups * rows * hidden * width > MOST_FLOPS:
                    break
                tokens = groups * rows // 2
                x_TD, routing = bench.activation(tokens, hidden), _balanced(tokens, groups, bench.device)
                seconds = bench.seconds(
                    lambda x=x_TD, up=gate_up_EOD, down=down_EDI, r=routing: bench.ops.experts(  # type: ignore[misc]
                        x, up, down, r.chosen_TN, r.weight_TN
                    )
                )
                yield GroupedMatmulSample(
                    dtype=bench.weight_type,
                    m=2 * tokens,
                    n=2 * width,
                    k=hidden,
                    groups=groups,
                    seconds=seconds,
                )


def _balanced(tokens: int, groups: int, device: torch.device) -> _Routing:
    """Two experts a token, every expert as often as the others."""
    first = torch.arange(tokens, device=device) % (groups // 2)
    chosen_TN = torch.stack((first, first + groups // 2), dim=1)
    return _Routing(chosen_TN=chosen_TN, weight_TN=torch.full(chosen_TN.shape, 0.5, device=device))
