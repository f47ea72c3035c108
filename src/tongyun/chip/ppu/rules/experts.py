"""A mixture of experts: router, choice, dispatch, two grouped products, and the sum by shares."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch.fx import Node

from tongyun.chip.ppu.emit import experts, rows
from tongyun.chip.ppu.emit.mapper import BLOCK
from tongyun.chip.ppu.emit.matmul import Scales, matmul
from tongyun.chip.ppu.emit.quantise import quantise
from tongyun.chip.ppu.isa import Type
from tongyun.chip.ppu.mixtures import Mixture, mixture_of
from tongyun.chip.ppu.program import Tensor
from tongyun.chip.ppu.rules.lowering import Lowering


def mixed(low: Lowering, node: Node, residual: Tensor | None = None) -> Tensor | None:
    found = mixture_of(node)
    if found is None:
        return None
    router, up, down = (low.value(item) for item in (found.router, found.up, found.down))
    count, hidden, inner = down.shape
    x = low.flat(low.value(found.x), hidden)
    tokens, pairs = x.shape[0], x.shape[0] * found.top
    owner = low.constant(f"owner_{pairs}_{found.top}", lambda: np.arange(pairs, dtype=np.int32) // found.top)
    logits, share = low.new(tokens, count), low.new(tokens, found.top)
    expert, token, place = (low.new(pairs, type=Type.I32) for _ in range(3))
    offset = low.new(count + 1, type=Type.I32)
    act, each, out = low.new(pairs, inner), low.new(pairs, hidden), low.new(tokens, hidden)
    with low.kernel("router"):
        matmul(low.b, x, router, logits)
    with low.kernel("choose"):
        experts.choose(low.b, logits, share, expert, top=found.top, renormalise=found.renormalise)
    with low.kernel("dispatch"):
        experts.dispatch(low.b, expert, owner, token, place, offset, experts=count)
    low.rated(node, up, down)
    given, scales = _few_bits(low, found, 0, x, up)
    if low.fusions.swiglu and not found.blocks:
        with low.kernel("experts_up"):
            experts.grouped(low.b, given, up, act, offset, token=token, gate=True, scales=scales)
    else:
        both = low.new(pairs, 2 * inner)
        with low.kernel("experts_up"):
            experts.grouped(low.b, given, up, both, offset, token=token, scales=scales)
        stride = 4 * inner
        first = rows.Rows(tensor=both, rows=pairs, cols=inner, stride=stride)
        second = replace(first, offset=2 * inner)
        with low.kernel("swiglu"):
            rows.swiglu(low.b, first, second, act)
    act, scales = _few_bits(low, found, 1, act, down)
    with low.kernel("experts_down"):
        experts.grouped(low.b, act, down, each, offset, scales=scales)
    with low.kernel("combine"):
        experts.combine(low.b, each, share, place, out, top=found.top, residual=residual)
    return out


def _few_bits(
    low: Lowering, found: Mixture, which: int, x: Tensor, weight: Tensor
) -> tuple[Tensor, Scales | None]:
    """Rows as a grouped product takes them, and the scales of both sides; those of bf16 as they are."""
    if found.scales is None:
        return x, None
    count, width = x.shape
    columns = low.value(found.scales[which])
    q = low.new(count, width, type=weight.type)
    scale = low.new(count, width // BLOCK if found.blocks else 1, type=Type.F32)
    with low.kernel("quantise"):
        quantise(low.b, rows.Rows.of(x), q, scale)
    return q, Scales(rows=scale, columns=columns, blocks=found.blocks)
