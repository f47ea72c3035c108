"""A captured graph to a program: operators to kernels, kernels to instructions.

Goes through the graph from what is asked for to what it needs, fuses what the patterns allow, and writes
each operator as a kernel. What it does not know it refuses by name and source line; nothing is left
to the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch.fx import GraphModule, Node

from tongyun.chip.ppu import patterns
from tongyun.chip.ppu.draft import Draft
from tongyun.chip.ppu.emit.builder import Builder
from tongyun.chip.ppu.fusions import Fusions
from tongyun.chip.ppu.program import Program
from tongyun.chip.ppu.repeat import Layer, UnlikeError, repeat
from tongyun.chip.ppu.rules import attention, experts, products, tokens
from tongyun.chip.ppu.rules.lowering import Constant, Lowering, Rule
from tongyun.specs.ppu import Ppu

Shape = tuple[int, ...]
_LEAST = 3
"""Layers that show how one follows another: the first also holds what all share."""
_SHARED = {"embed", "angles"}
"""Kernels that are of no layer, though the first one asks for them."""
RULES: tuple[Rule, ...] = (
    tokens.normed, experts.mixed, attention.attended, attention.paged_attended, products.gated,
    products.quantised, products.reduced, products.multiplied, attention.written, products.added,
    tokens.embedded, tokens.advanced, tokens.cast,
)  # fmt: skip
"""What an operator is tried as, in this order."""


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A program and how to give it its inputs and take its outputs."""

    program: Program
    inputs: tuple[str | None, ...]
    """Tensor of each placeholder; None for those the program does not read."""
    outputs: tuple[str, ...]
    output_shapes: tuple[Shape, ...]
    constants: Mapping[str, Constant]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How a captured step differs from what it stands for."""

    layers: int | None = None
    """The graph's last layer is repeated until there are so many; None leaves the graph's own."""
    chips: int = 1
    """Chips that run the program together, each with its own part of the weights."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What placeholders are called in the model."""


def lower(
    graph: GraphModule, ppu: Ppu, fusions: Fusions | None = None, scale: Scale | None = None
) -> Lowered:
    """Lower one inference graph of ATen calls for a chip.

    InputError names an operator, type or shape that the compiler does not know, with its line;
    Infeasible says how many bytes of memory are missing; UnlikeError that layers cannot be repeated.
    """
    scale = scale or Scale()
    low = Lowering(b=Builder(ppu), fusions=fusions or Fusions(), rules=RULES, names=scale.names)
    drafted, layers = _drafted(graph, low)
    if scale.layers is not None and scale.layers > len(layers):
        if len(layers) < _LEAST:
            raise UnlikeError(f"{len(layers)} layers do not show how one follows another")
        drafted = _repeated(drafted, layers, scale.layers)
    return Lowered(
        program=drafted.draft.settled(ppu, set(drafted.outputs), scale.chips),
        inputs=drafted.inputs,
        outputs=drafted.outputs,
        output_shapes=drafted.shapes,
        constants=low.constants,
    )


def _repeated(drafted: _Drafted, layers: Sequence[Layer], wanted: int) -> _Drafted:
    """The last layer of a draft again and again, with its inputs and outputs."""
    number, more = len(layers) - 1, wanted - len(layers)

    def rename(name: str, turn: int) -> str:
        fresh = name.replace(f".{number}.", f".{number + turn}.")
        return fresh if fresh != name else f"{name}.{turn}"

    longer = repeat(drafted.draft, layers[-2], layers[-1], more, rename)

    def extended(names: Sequence[str | None], shapes: Sequence[Shape]) -> list[tuple[str | None, Shape]]:
        """Behind each run of the layer's own tensors, those of the layers made from it."""
        found: list[tuple[str | None, Shape]] = []
        given = list(zip(names, shapes, strict=True))
        for own, run in groupby(given, lambda item: item[0] in longer.copies[-1]):
            items = list(run)
            found += items
            if own:
                found += [
                    (copy[name], shape) for copy in longer.copies for name, shape in items if name is not None
                ]
        return found

    outputs = extended(drafted.outputs, drafted.shapes)
    inputs = extended(drafted.inputs, [()] * len(drafted.inputs))
    return _Drafted(
        draft=longer.draft,
        inputs=tuple(name for name, _ in inputs),
        outputs=tuple(str(name) for name, _ in outputs),
        shapes=tuple(shape for _, shape in outputs),
    )


@dataclass(frozen=True, kw_only=True)
class _Drafted:
    draft: Draft
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    shapes: tuple[Shape, ...]


def _drafted(graph: GraphModule, low: Lowering) -> tuple[_Drafted, list[Layer]]:
    """The graph as kernels, layer by layer: a layer ends with the second of its residual sums."""
    _share(graph)
    b, layers = low.b, list[Layer]()
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    sums, start = 0, 0
    for node in graph.graph.nodes:
        # In the graph's order, so that the way down from the last operator stays short.
        if _is_residual(node):
            low.value(node)
            sums += 1
            if sums % 2 == 0:
                layers.append(Layer(start, len(b.kernels)))
                start = len(b.kernels)
        elif _is_advance(node):
            low.value(node)
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    results = [item for item in output.args[0] if isinstance(item, Node)]
    tensors = [low.value(node) for node in results]
    for number, layer in enumerate(layers):
        for place in range(layer.first, layer.last):
            if b.kernels[place].kind not in _SHARED:
                b.kernels[place] = replace(b.kernels[place], layer=number)
    drafted = _Drafted(
        draft=b.draft(),
        inputs=tuple(low.made[node].name if node in low.made else None for node in placeholders),
        outputs=tuple(tensor.name for tensor in tensors),
        shapes=tuple(patterns.shape_of(node) for node in results),
    )
    return drafted, layers


def _share(graph: GraphModule) -> None:
    """Rows that several products take in few bits are made so once."""
    made: dict[tuple[object, ...], Node] = {}
    for node in graph.graph.nodes:
        if patterns.name_of(node) == "tongyun.quantise.default" or patterns.quantised_of(node):
            args = [patterns.through(item) if isinstance(item, Node) else item for item in node.args]
            first = made.setdefault((node.target, *args), node)
            if first is not node:
                node.replace_all_uses_with(first)


def _is_residual(node: Node) -> bool:
    if patterns.name_of(node) != "aten.add.Tensor" or not all(isinstance(item, Node) for item in node.args):
        return False
    is_row = len(patterns.shape_of(node)) in (2, 3) and node.meta["val"].dtype == torch.bfloat16
    return is_row and patterns.rotation_of(node) is None


def _is_advance(node: Node) -> bool:
    """How long a layer's cache is now: its kernel belongs to the layer."""
    if patterns.name_of(node) != "aten.add.Tensor" or not isinstance(node.args[1], int):
        return False
    start = node.args[0]
    return isinstance(start, Node) and start.op == "placeholder" and not patterns.shape_of(node)
