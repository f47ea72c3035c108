"""Recognise a transformer's operators in a graph of ATen calls.

Each `…_of` looks at one node and the nodes it is made from, and returns what it found with its leaves, or
None. Views that move no bytes are looked through. Knows nothing of instructions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

_VIEWS = {
    "aten.view.default", "aten._unsafe_view.default", "aten.alias.default", "aten.unsqueeze.default",
    "aten.squeeze.dim", "aten.reshape.default", "aten.detach.default",
}  # fmt: skip


def name_of(node: Any) -> str:
    """`aten.mm.default` of a call, "" of anything else."""
    return str(node.target) if isinstance(node, Node) and node.op == "call_function" else ""


def through(node: Any, *more: str) -> Any:
    """The node behind views, and behind calls named in `more`."""
    while name_of(node) in _VIEWS or name_of(node) in more:
        node = node.args[0]
    return node


def shape_of(node: Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def call_of(node: Any, name: str, library: str = "aten") -> Sequence[Any] | None:
    return node.args if name_of(node) == f"{library}.{name}" else None


def either_of(node: Any, name: str) -> list[tuple[Any, Any]]:
    """Both orders of a commutative call's operands."""
    args = call_of(node, name)
    return [] if args is None else [(args[0], args[1]), (args[1], args[0])]


@dataclass(frozen=True)
class Norm:
    x: Node
    gain: Node
    eps: float


def norm_of(node: Any) -> Norm | None:
    """gain · bf16(x32 · rsqrt(mean(x32²) + eps))."""
    for gain, cast in either_of(through(node), "mul.Tensor"):
        if not isinstance(gain, Node) or name_of(gain) or name_of(cast) != "aten._to_copy.default":
            continue
        for wide, scale in either_of(cast.args[0], "mul.Tensor"):
            root = call_of(scale, "rsqrt.default")
            shifted = root and call_of(root[0], "add.Tensor")
            mean = shifted and call_of(shifted[0], "mean.dim")
            square = mean and call_of(mean[0], "pow.Tensor_Scalar")
            if square and square[1] == 2 and square[0] is wide and name_of(wide) == "aten._to_copy.default":
                return Norm(through(wide.args[0]), gain, float(shifted[1]))  # type: ignore[index]
    return None


@dataclass(frozen=True)
class Product:
    x: Node
    weight: Node
    rows: Node | None = None
    """Scales of the rows of x, in f32; of whole numbers and fp8 only, as the columns'."""
    columns: Node | None = None
    blocks: bool = False


def product_of(node: Any) -> Product | None:
    """x · weightᵀ, or (x · rows) · (weight · columns)ᵀ."""
    behind = through(node)
    if args := call_of(behind, "scaled_product.default", "tongyun"):
        return Product(args[0], args[1], args[2], args[3], bool(args[4]))
    if args := call_of(behind, "_scaled_mm.default"):
        turned, given = call_of(args[1], "t.default"), [*args[4:], *behind.kwargs.values()]
        # Neither a bias nor a scale of the result.
        if turned is None or any(isinstance(item, Node) for item in given):
            return None
        return Product(args[0], turned[0], args[2], through(args[3], "aten.t.default"))
    args = call_of(behind, "mm.default")
    turned = args and call_of(args[1], "t.default")
    return Product(args[0], turned[0]) if args and turned else None


@dataclass(frozen=True)
class Quantised:
    call: Node
    x: Node
    blocks: bool


def quantised_of(node: Any) -> Quantised | None:
    """Rows in few bits, of which this is one result: 0 the numbers, 1 the scales."""
    args = picked_of(node, "quantise.default", "tongyun")
    return Quantised(node.args[0], args[0], bool(args[2])) if args else None


def swiglu_of(node: Any) -> tuple[Node, Node] | None:
    """silu(gate) · up."""
    for act, up in either_of(through(node), "mul.Tensor"):
        if silu := call_of(act, "silu.default"):
            return silu[0], up
    return None


@dataclass(frozen=True)
class Part:
    """`count` columns from `offset` on of a matrix of `row` columns."""

    whole: Node
    row: int
    offset: int
    count: int


def part_of(node: Any) -> Part | None:
    """One piece of a split: of columns, or of heads, which lie behind each other as columns do."""
    args = picked_of(through(node), "split_with_sizes.default")
    if args is not None:
        sizes = list(args[1])
    elif args := picked_of(through(node), "split.Tensor"):
        wide = shape_of(args[0])[_last(args, 2)]
        sizes = [min(args[1], wide - at) for at in range(0, wide, args[1])]
    else:
        return None
    shape, place = shape_of(args[0]), through(node).args[1]
    axis = _last(args, 2) % len(shape)
    if axis == 0:
        return None
    inner = math.prod(shape[axis + 1 :])
    return Part(through(args[0]), sum(sizes) * inner, sum(sizes[:place]) * inner, sizes[place] * inner)


def _last(args: Sequence[Any], place: int) -> int:
    return int(args[place]) if len(args) > place else 0


@dataclass(frozen=True)
class Reduced:
    part: Node
    """One chip's term of the sum."""
    ranks: int


def reduced_of(node: Any) -> Reduced | None:
    """The sum of a tensor over the chips."""
    behind = through(node)
    if name_of(behind) != "tongyun.all_reduce.default":
        return None
    return Reduced(behind.args[0], int(behind.args[1]))


@dataclass(frozen=True)
class Rotation:
    x: Node
    """[sequences, tokens, heads, width], or [tokens, heads, width]."""
    cos: Node
    sin: Node


def rotation_of(node: Any) -> Rotation | None:
    """x · cos + (−right half, left half) · sin, before or after heads and tokens change places."""
    for straight, crossed in either_of(node, "add.Tensor"):
        for turned, cos in either_of(straight, "mul.Tensor"):
            for halves, sin in either_of(crossed, "mul.Tensor"):
                pair = call_of(halves, "cat.default")
                negative = pair and call_of(pair[0][0], "neg.default")
                if negative and _half(negative[0], turned, 1) and _half(pair[0][1], turned, 0):  # type: ignore[index]
                    x = call_of(turned, "transpose.int")
                    if x or len(shape_of(turned)) == 3:
                        return Rotation(x[0] if x else turned, through(cos), through(sin))
    return None


def _half(node: Any, whole: Node, which: int) -> bool:
    """The left or right half of the last axis."""
    width = shape_of(whole)[-1]
    if args := call_of(node, "slice.Tensor"):
        begin, end = which * width // 2, (which + 1) * width // 2
        last = args[1] % len(shape_of(whole)) == len(shape_of(whole)) - 1
        return args[0] is whole and last and args[2] == begin and min(args[3], width) == end
    part = part_of(node)
    return part == Part(through(whole), width, which * width // 2, width // 2)


@dataclass(frozen=True)
class Angles:
    function: str
    """cos or sin."""
    frequency: Node
    start: Node | None
    """Where the positions begin; None is zero."""
    positions: Node | None = None
    """The positions themselves, one a row, where they are given."""


def angles_of(node: Any) -> Angles | None:
    """bf16(cos(position · frequency, twice))."""
    scaled = through(node, "aten._to_copy.default")
    if args := call_of(scaled, "mul.Tensor"):
        scaled = args[0] if args[1] == 1.0 else None
    for function in ("cos", "sin"):
        wave = call_of(scaled, f"{function}.default")
        both = wave and call_of(wave[0], "cat.default")
        if both and both[0][0] is both[0][1]:
            for position, frequency in either_of(both[0][0], "mul.Tensor"):
                place = start_of(through(position, "aten._to_copy.default"))
                source = through(frequency, "aten._to_copy.default")
                if name_of(source):
                    continue
                if place is not None:
                    return Angles(function, source, place.start)
                given = through(position, "aten._to_copy.default")
                if not name_of(given) and not given.meta["val"].is_floating_point():
                    return Angles(function, source, None, given)
    return None


@dataclass(frozen=True)
class Start:
    start: Node | None


def start_of(node: Any) -> Start | None:
    """arange(n) + start, the positions of the new tokens."""
    args = call_of(through(node), "add.Tensor")
    if args is None or name_of(args[0]) != "aten.arange.default":
        return None
    if isinstance(args[1], Node):
        return None if name_of(args[1]) else Start(args[1])
    return Start(None) if args[1] == 0 else None


@dataclass(frozen=True)
class Taken:
    table: Node
    ids: Node


def taken_of(node: Any) -> Taken | None:
    """Rows of a matrix by number."""
    if args := call_of(node, "embedding.default"):
        return Taken(args[0], args[1])
    args = call_of(node, "index.Tensor")
    if args and len(args[1]) == 1 and len(shape_of(args[0])) == 2 and len(shape_of(args[1][0])) == 1:
        return Taken(args[0], args[1][0])
    return None


@dataclass(frozen=True)
class Cached:
    """Keys or values [sequences, kv_heads, room, width]: written at `start`, or as they are if None."""

    fresh: Node
    cache: Node | None
    """The cache before; None when there is none."""
    written: Node | None
    """The node of the cache after."""
    start: Node | None


def cached_of(node: Any) -> Cached | None:
    """The tensor behind the repeats, slices and copies that an attention sees."""
    behind = through(node, "aten.expand.default", "aten.clone.default", "aten.slice.Tensor")
    if args := call_of(behind, "index_copy.default"):
        place = start_of(args[2])
        if args[1] != 2 or place is None:
            return None
        cache = None if name_of(args[0]) == "aten.zeros.default" else args[0]
        return Cached(args[3], cache, behind, place.start)
    return Cached(behind, None, None, None) if isinstance(behind, Node) else None


@dataclass(frozen=True)
class Attended:
    q: Node
    k: Node
    v: Node
    scale: float
    start: Node | None
    """Position of the first query; None is zero."""


def attention_of(node: Any) -> Attended | None:
    """Causal attention, [sequences, tokens, heads · width] after heads and tokens changed places back."""
    turned = call_of(through(node), "transpose.int")
    picked = turned and through(turned[0])
    if not picked or name_of(picked) != "<built-in function getitem>":
        return None
    call = picked.args[0]
    args = call_of(call, "_scaled_dot_product_flash_attention_for_cpu.default")
    if args is None:
        return None
    scale = call.kwargs.get("scale") or shape_of(args[0])[-1] ** -0.5
    if len(args) > 4 and args[4]:
        same = shape_of(args[0])[2] == shape_of(args[1])[2]
        return Attended(args[0], args[1], args[2], scale, None) if same else None
    start = _causal(call.kwargs.get("attn_mask"))
    return None if start is None else Attended(args[0], args[1], args[2], scale, start.start)


def _causal(mask: Any) -> Start | None:
    """Key j seen by query i where j ≤ start + i, as −∞ or as a boolean."""
    inner = mask
    if args := call_of(mask, "where.self"):
        inner = args[0]
    order = call_of(through(inner, "aten.expand.default"), "le.Tensor")
    if order is None:
        return None
    keys, queries = start_of(order[0]), start_of(order[1])
    return queries if keys is not None and keys.start is None else None


@dataclass(frozen=True)
class Paged:
    """Attention of many pieces over blocks; q, k and v are [tokens, heads, width]."""

    call: Node
    q: Node
    k: Node
    v: Node
    caches: tuple[Node, Node]
    slots: Node
    rows: Node
    starts: Node
    blocks: Node


def paged_of(node: Any) -> Paged | None:
    """The project's paged attention, of which this is one result: 0 the values, 1 and 2 the caches."""
    call: Any = node.args[0] if name_of(node) == "<built-in function getitem>" else None
    if name_of(call) != "auto_functionalized_v2" or str(call.args[0]) != "tongyun.paged_attention.default":
        return None
    given = call.kwargs
    bases = given["_all_bases"]
    keys, values = bases[given["_keys_base_index"]], bases[given["_values_base_index"]]
    return Paged(
        call, given["q_THd"], given["k_TKd"], given["v_TKd"], (keys, values), given["slots_T"],
        given["rows_P1"], given["starts_P"], given["blocks_PB"],
    )  # fmt: skip


def picked_of(node: Any, name: str, library: str = "aten") -> Sequence[Any] | None:
    """The call of which this is one result."""
    return call_of(node.args[0], name, library) if name_of(node) == "<built-in function getitem>" else None
