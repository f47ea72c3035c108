"""Recognise a transformer's operators in a graph of ATen calls.

Each `…_of` looks at one node and the nodes it is made from, and returns what it found with its leaves, or
None. Views that move no bytes are looked through. Knows nothing of instructions.
"""

from __future__ import annotations

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


def _call(node: Any, name: str) -> Sequence[Any] | None:
    return node.args if name_of(node) == f"aten.{name}" else None


def _either(node: Any, name: str) -> list[tuple[Any, Any]]:
    """Both orders of a commutative call's operands."""
    args = _call(node, name)
    return [] if args is None else [(args[0], args[1]), (args[1], args[0])]


@dataclass(frozen=True)
class Norm:
    x: Node
    gain: Node
    eps: float


def norm_of(node: Any) -> Norm | None:
    """gain · bf16(x32 · rsqrt(mean(x32²) + eps))."""
    for gain, cast in _either(through(node), "mul.Tensor"):
        if not isinstance(gain, Node) or name_of(gain) or name_of(cast) != "aten._to_copy.default":
            continue
        for wide, scale in _either(cast.args[0], "mul.Tensor"):
            root = _call(scale, "rsqrt.default")
            shifted = root and _call(root[0], "add.Tensor")
            mean = shifted and _call(shifted[0], "mean.dim")
            square = mean and _call(mean[0], "pow.Tensor_Scalar")
            if square and square[1] == 2 and square[0] is wide and name_of(wide) == "aten._to_copy.default":
                return Norm(through(wide.args[0]), gain, float(shifted[1]))  # type: ignore[index]
    return None


@dataclass(frozen=True)
class Product:
    x: Node
    weight: Node


def product_of(node: Any) -> Product | None:
    """x · weightᵀ."""
    args = _call(through(node), "mm.default")
    turned = args and _call(args[1], "t.default")
    return Product(args[0], turned[0]) if args and turned else None


def swiglu_of(node: Any) -> tuple[Node, Node] | None:
    """silu(gate) · up."""
    for act, up in _either(through(node), "mul.Tensor"):
        if silu := _call(act, "silu.default"):
            return silu[0], up
    return None


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
    """[sequences, tokens, heads, width] before heads and tokens change places."""
    cos: Node
    sin: Node


def rotation_of(node: Any) -> Rotation | None:
    """x · cos + (−right half, left half) · sin."""
    for straight, crossed in _either(node, "add.Tensor"):
        for turned, cos in _either(straight, "mul.Tensor"):
            for halves, sin in _either(crossed, "mul.Tensor"):
                x = _call(turned, "transpose.int")
                pair = _call(halves, "cat.default")
                negative = pair and _call(pair[0][0], "neg.default")
                left = pair and _call(pair[0][1], "slice.Tensor")
                right = negative and _call(negative[0], "slice.Tensor")
                if x and left and right and left[0] is turned and right[0] is turned:
                    return Rotation(x[0], through(cos), through(sin))
    return None


@dataclass(frozen=True)
class Angles:
    function: str
    """cos or sin."""
    frequency: Node
    start: Node | None
    """Where the positions begin; None is zero."""


def angles_of(node: Any) -> Angles | None:
    """bf16(cos(position · frequency, twice))."""
    scaled = through(node, "aten._to_copy.default")
    if args := _call(scaled, "mul.Tensor"):
        scaled = args[0] if args[1] == 1.0 else None
    for function in ("cos", "sin"):
        wave = _call(scaled, f"{function}.default")
        both = wave and _call(wave[0], "cat.default")
        if both and both[0][0] is both[0][1]:
            for position, frequency in _either(both[0][0], "mul.Tensor"):
                place = start_of(through(position, "aten._to_copy.default"))
                source = through(frequency, "aten._to_copy.default")
                if place is not None and not name_of(source):
                    return Angles(function, source, place.start)
    return None


@dataclass(frozen=True)
class Start:
    start: Node | None


def start_of(node: Any) -> Start | None:
    """arange(n) + start, the positions of the new tokens."""
    args = _call(through(node), "add.Tensor")
    if args is None or name_of(args[0]) != "aten.arange.default":
        return None
    if isinstance(args[1], Node):
        return None if name_of(args[1]) else Start(args[1])
    return Start(None) if args[1] == 0 else None


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
    if args := _call(behind, "index_copy.default"):
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
    turned = _call(through(node), "transpose.int")
    picked = turned and through(turned[0])
    if not picked or name_of(picked) != "<built-in function getitem>":
        return None
    call = picked.args[0]
    args = _call(call, "_scaled_dot_product_flash_attention_for_cpu.default")
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
    if args := _call(mask, "where.self"):
        inner = args[0]
    order = _call(through(inner, "aten.expand.default"), "le.Tensor")
    if order is None:
        return None
    keys, queries = start_of(order[0]), start_of(order[1])
    return queries if keys is not None and keys.start is None else None


@dataclass(frozen=True)
class Mixture:
    x: Node
    router: Node
    up: Node
    """[experts, 2 · inner, hidden], gate first."""
    down: Node
    top: int
    renormalise: bool


def mixture_of(node: Any) -> Mixture | None:
    """The sum over a token's choices of share · expert, as grouped products over sorted rows."""
    total = _call(through(node), "sum.dim_IntList")
    back = total and _call(through(total[0]), "index.Tensor")
    for each, share in _either(back[0] if back else None, "mul.Tensor"):
        down = _call(each, "_grouped_mm.default")
        act = down and swiglu_of(down[0])
        first = act and _picked(act[0], "split.Tensor")
        up = first and _call(first[0], "_grouped_mm.default")
        rows = up and _call(up[0], "index.Tensor")
        taken = _call(through(share), "index.Tensor")
        if not (down and up and rows and taken):
            continue
        shares = through(taken[0], "aten._to_copy.default")
        ratio = _call(shares, "div.Tensor")
        choice = _picked(ratio[0] if ratio else shares, "topk.default")
        soft = choice and _call(choice[0], "_softmax.default")
        router = soft and product_of(through(soft[0], "aten._to_copy.default"))
        weights = [_call(item[1], "transpose.int") for item in (up, down)]
        if router and choice and weights[0] and weights[1]:
            return Mixture(
                x=through(rows[0]), router=router.weight, up=weights[0][0], down=weights[1][0],
                top=int(choice[1]), renormalise=ratio is not None,
            )  # fmt: skip
    return None


def _picked(node: Any, name: str) -> Sequence[Any] | None:
    """The call of which this is one result."""
    return _call(node.args[0], name) if name_of(node) == "<built-in function getitem>" else None
