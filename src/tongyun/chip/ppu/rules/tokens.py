"""What is done row by row and to plain numbers: norms on their own, embeddings, casts, positions."""

from __future__ import annotations

import torch
from torch.fx import Node

from tongyun.chip.ppu import patterns
from tongyun.chip.ppu.emit import rows
from tongyun.chip.ppu.isa import Type, Vec
from tongyun.chip.ppu.program import Tensor
from tongyun.chip.ppu.rules.lowering import TYPES, Lowering


def normed(low: Lowering, node: Node) -> Tensor | None:
    norm = patterns.norm_of(node)
    if norm is None:
        return None
    x, gain = low.rows(norm.x), low.value(norm.gain)
    out = low.new(x.rows, x.cols)
    with low.kernel("rmsnorm"):
        rows.rmsnorm(low.b, x, gain, rows.Rows.of(out), norm.eps)
    return out


def embedded(low: Lowering, node: Node) -> Tensor | None:
    found = patterns.taken_of(node)
    if found is None:
        return None
    table, ids = low.value(found.table), low.value(found.ids)
    out = low.new(ids.bytes // ids.type.bytes, table.shape[1])
    with low.kernel("embed"):
        rows.embed(low.b, ids, table, out)
    return out


def advanced(low: Lowering, node: Node) -> Tensor | None:
    """An integer and a constant: how long the cache is now."""
    if patterns.name_of(node) != "aten.add.Tensor" or not isinstance(node.args[1], int):
        return None
    given = low.value(node.args[0])  # type: ignore[arg-type]
    out = low.new(*given.shape, type=given.type)
    with low.kernel("add"):
        rows.elementwise(low.b, Vec.ADD, given, out, imm=float(node.args[1]))
    return out


def cast(low: Lowering, node: Node) -> Tensor | None:
    """From one floating-point type to another."""
    if patterns.name_of(node) != "aten._to_copy.default" or set(node.kwargs) != {"dtype"}:
        return None
    source, target = low.value(node.args[0]), node.meta["val"].dtype  # type: ignore[arg-type]
    if target not in (torch.float32, torch.bfloat16) or source.type not in (Type.F32, Type.BF16):
        return None
    out = low.new(*source.shape, type=TYPES[target])
    with low.kernel("cast"):
        rows.copy(low.b, rows.Rows.of(source), rows.Rows.of(out))
    return out
