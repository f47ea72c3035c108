"""Products, and what is fused into them: norms before, activations and residuals behind."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from tongyun.chip.ppu import patterns
from tongyun.chip.ppu.emit import rows
from tongyun.chip.ppu.emit.mapper import BLOCK
from tongyun.chip.ppu.emit.matmul import Scales, matmul
from tongyun.chip.ppu.emit.quantise import quantise
from tongyun.chip.ppu.isa import At, Type, Vec
from tongyun.chip.ppu.mixtures import mixture_of
from tongyun.chip.ppu.program import Tensor
from tongyun.chip.ppu.rules.experts import mixed
from tongyun.chip.ppu.rules.lowering import TYPES, Lowering


def fused_norm(low: Lowering, node: Node) -> tuple[Tensor, Tensor | None, float]:
    """A product's left operand, and the norm to fold into it."""
    norm = patterns.norm_of(node) if low.fusions.norm else None
    if norm is None or patterns.through(node) in low.made:
        return low.value(node), None, 0.0
    return low.value(norm.x), low.value(norm.gain), norm.eps


def quantised(low: Lowering, node: Node) -> Tensor | None:
    """Rows in few bits and their scales, the norm before them in the same kernel."""
    found = patterns.quantised_of(node)
    if found is None:
        return None
    x, gain, eps = fused_norm(low, found.x)
    given = low.rows(found.x) if gain is None else rows.Rows.of(x)
    blocks = given.cols // BLOCK if found.blocks else 1
    kind = TYPES[found.call.args[1]]  # type: ignore[index]
    low.here = found.call
    made = low.new(given.rows, given.cols, type=kind), low.new(given.rows, blocks, type=Type.F32)
    with low.kernel("quantise"):
        quantise(low.b, given, *made, gain=gain, eps=eps)
    for item in found.call.users:
        low.made[item] = made[item.args[1]]  # type: ignore[index]
    return low.made[node]


def scales_of(low: Lowering, *products: patterns.Product) -> Scales | None:
    """The scales of a product, or of the two of a gated one."""
    first = products[0]
    if first.columns is None or first.rows is None:
        return None
    up = products[1].columns if len(products) > 1 else None
    return Scales(
        rows=low.value(first.rows), columns=low.value(first.columns), blocks=first.blocks,
        up=None if up is None else low.value(up),
    )  # fmt: skip


def multiplied(low: Lowering, node: Node, residual: Tensor | None = None) -> Tensor | None:
    product = patterns.product_of(node)
    if product is None:
        return None
    weight = low.value(product.weight)
    x, gain, eps = fused_norm(low, product.x)
    x = low.flat(x, weight.shape[1])
    out = low.new(x.shape[0], weight.shape[0])
    scales = scales_of(low, product)
    low.rated(node, x, weight)
    low.here = node
    with low.kernel("matmul"):
        matmul(low.b, x, weight, out, gain=gain, eps=eps, residual=residual, scales=scales)
    return out


def reduced(low: Lowering, node: Node, residual: Tensor | None = None) -> Tensor | None:
    """The sum over the chips, and the residual with it: rounded once, as a product and its residual."""
    found = patterns.reduced_of(node)
    if found is None:
        return None
    part = low.value(found.part)
    out = low.new(*part.shape, type=part.type)
    with low.kernel("all_reduce"):
        low.b.emit(
            "ALL_REDUCE", part.type, source=At(part.at), target=At(out.at), bytes=part.bytes,
            ranks=found.ranks, addend=At() if residual is None else At(residual.at),
        )  # fmt: skip
    return out


def gated(low: Lowering, node: Node) -> Tensor | None:
    parts = patterns.swiglu_of(node)
    if parts is None:
        return None
    halves = gated_halves(low, parts)
    if halves is not None:
        return halves
    gate, up = (patterns.product_of(part) for part in parts)
    alike = gate and up and patterns.through(gate.x) is patterns.through(up.x) and not gate.blocks
    if low.fusions.swiglu and gate and up and alike:
        weights = low.value(gate.weight), low.value(up.weight)
        x, gain, eps = fused_norm(low, gate.x)
        x = low.flat(x, weights[0].shape[1])
        out = low.new(x.shape[0], weights[0].shape[0])
        scales = scales_of(low, gate, up)
        low.rated(node, x, *weights)
        low.here = node
        with low.kernel("matmul"):
            matmul(low.b, x, weights[0], out, up=weights[1], gain=gain, eps=eps, scales=scales)
        return out
    left, right = (low.rows(part) for part in parts)
    out = low.new(left.rows, left.cols)
    with low.kernel("swiglu"):
        rows.swiglu(low.b, left, right, out)
    return out


def gated_halves(low: Lowering, parts: tuple[Node, Node]) -> Tensor | None:
    """Gate and up as the halves of one product, gate first."""
    gate, up = (patterns.part_of(part) for part in parts)
    product = patterns.product_of(gate.whole) if gate and low.fusions.swiglu else None
    if product is None or gate is None or up is None or gate.whole is not up.whole or product.columns:
        return None
    weight = low.value(product.weight)
    (width, hidden) = weight.shape
    if (gate.row, gate.offset, up.offset, gate.count) != (width, 0, width // 2, width // 2):
        return None
    half = replace(weight, shape=(width // 2, hidden))
    x, gain, eps = fused_norm(low, product.x)
    x = low.flat(x, hidden)
    out = low.new(x.shape[0], width // 2)
    with low.kernel("matmul"):
        second = replace(half, at=weight.at + half.bytes)
        matmul(low.b, x, half, out, up=second, gain=gain, eps=eps)
    return out


def added(low: Lowering, node: Node) -> Tensor | None:
    if patterns.name_of(node) != "aten.add.Tensor" or not all(isinstance(item, Node) for item in node.args):
        return None
    left, right = node.args
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    if patterns.shape_of(left) != patterns.shape_of(right):
        return None
    for base, term in ((left, right), (right, left)):
        inner = patterns.through(term)
        if not low.fusions.residual or len(inner.users) > 1 or inner in low.made:
            continue
        if patterns.product_of(term) or mixture_of(term) or patterns.reduced_of(term):
            other = low.flat(low.value(base), patterns.shape_of(node)[-1])
            low.here = node
            kinds = (reduced, multiplied, mixed)
            return next(found for kind in kinds if (found := kind(low, term, other)) is not None)
    a, b = low.value(left), low.value(right)
    out = low.new(*low.flat(a, patterns.shape_of(node)[-1]).shape)
    with low.kernel("add"):
        rows.elementwise(low.b, Vec.ADD, low.flat(a, out.shape[1]), out, other=low.flat(b, out.shape[1]))
    return out
