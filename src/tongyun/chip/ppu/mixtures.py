"""Recognise a mixture of experts in a graph of ATen calls, with the router behind its shares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from tongyun.chip.ppu.patterns import call_of, either_of, picked_of, product_of, swiglu_of, through


@dataclass(frozen=True)
class Mixture:
    x: Node
    router: Node
    up: Node
    """[experts, 2 · inner, hidden], gate first."""
    down: Node
    top: int
    renormalise: bool
    scales: tuple[Node, Node] | None = None
    """Of `up` and `down`, where they are of few bits."""
    blocks: bool = False


def mixture_of(node: Any) -> Mixture | None:
    """The sum over a token's choices of share · expert, by grouped products over sorted rows, or one call."""
    if args := call_of(through(node), "experts.default", "tongyun"):
        return _mixture(args[0], args[4], args[1], args[2])
    if args := call_of(through(node), "scaled_experts.default", "tongyun"):
        plain = _mixture(args[0], args[6], args[1], args[2])
        return plain and replace(plain, scales=(args[3], args[4]), blocks=bool(args[7]))
    total = call_of(through(node), "sum.dim_IntList")
    back = total and call_of(through(total[0]), "index.Tensor")
    for each, share in either_of(back[0] if back else None, "mul.Tensor"):
        down = call_of(each, "_grouped_mm.default")
        act = down and swiglu_of(down[0])
        first = act and picked_of(act[0], "split.Tensor")
        up = first and call_of(first[0], "_grouped_mm.default")
        rows = up and call_of(up[0], "index.Tensor")
        taken = call_of(through(share), "index.Tensor")
        if not (down and up and rows and taken):
            continue
        weights = [call_of(item[1], "transpose.int") for item in (up, down)]
        if weights[0] and weights[1]:
            return _mixture(through(rows[0]), taken[0], weights[0][0], weights[1][0])
    return None


def _mixture(x: Node, share: Any, up: Node, down: Node) -> Mixture | None:
    """With the router behind the shares: the largest of a softmax, which may be made to sum to one."""
    shares = through(share, "aten._to_copy.default")
    ratio = call_of(shares, "div.Tensor")
    choice = picked_of(ratio[0] if ratio else shares, "topk.default")
    soft = choice and call_of(choice[0], "_softmax.default")
    router = soft and product_of(through(soft[0], "aten._to_copy.default"))
    if not (choice and router):
        return None
    return Mixture(
        x=x, router=router.weight, up=up, down=down, top=int(choice[1]), renormalise=ratio is not None
    )
