"""What every rule lowers with: the graph's tensors, the program under construction, and the way down.

A rule looks at one node, and writes kernels for it if it knows it. Its operands are lowered first, by
whichever rule knows them. Knows no operator.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch.fx import Node

from tongyun.chip.ppu import patterns
from tongyun.chip.ppu.emit import rows
from tongyun.chip.ppu.emit.builder import Builder
from tongyun.chip.ppu.fusions import Fusions
from tongyun.chip.ppu.isa import Type
from tongyun.chip.ppu.program import Tensor
from tongyun.chip.ppu.tiles import TORCH
from tongyun.errors import InputError

Constant = NDArray[np.int32] | NDArray[np.int64]
TYPES = {dtype: kind for kind, dtype in TORCH.items()}


@dataclass
class Lowering:
    b: Builder
    fusions: Fusions
    rules: Sequence[Rule]
    """Tried in this order: what is found first is what the node becomes."""
    names: Mapping[str, str]
    """What placeholders are called in the model."""
    made: dict[Node, Tensor] = field(default_factory=dict)
    constants: dict[str, Constant] = field(default_factory=dict)
    angles: dict[tuple[Node, Node | None, int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    here: Node | None = None
    """The node whose kernels are being written."""

    def value(self, node: Node) -> Tensor:
        """The tensor of a node, row-major; lowers what it takes."""
        source = patterns.through(node)
        if source in self.made:
            return self.made[source]
        if source.op == "placeholder":
            return self.place(source, "input")
        self.here = source
        for rule in self.rules:
            found = rule(self, source)
            if found is not None:
                self.made[source] = found
                return found
        raise self.refused(source)

    def refused(self, node: Node, why: str = "") -> InputError:
        """The operator by name and source line, and why it is not lowered, if that is known."""
        trace = node.meta.get("stack_trace") or ""
        lines = re.findall(r'File "([^"]+)", line (\d+)', trace)
        where = f"{lines[-1][0]}:{lines[-1][1]}: " if lines else ""
        what = patterns.name_of(node) or node.op
        return InputError(where + (why or f"the PPU compiler does not know {what} here ({node.name})"))

    def rated(self, node: Node, *operands: Tensor) -> None:
        """InputError if the chip's tensor unit has no rate for operands of a product."""
        has = self.b.ppu.tensor_flops
        for tensor in operands:
            if tensor.type.rate not in has:
                known = ", ".join(has)
                why = f"{self.b.ppu.name} has no tensor rate for {tensor.type.rate}; it has {known}"
                raise self.refused(node, why)

    def place(self, node: Node, role: str) -> Tensor:
        value = node.meta["val"]
        if value.dtype not in TYPES:
            known = ", ".join(map(str, TYPES))
            raise InputError(f"{node.name}: the PPU has no data type {value.dtype}; it has {known}")
        shape = tuple(int(size) for size in value.shape) or (1,)
        name = self.names.get(node.name, node.name)
        self.made[node] = self.b.layout.place(name, shape, TYPES[value.dtype], role)
        return self.made[node]

    def new(self, *shape: int, type: Type = Type.BF16, role: str = "scratch") -> Tensor:
        return self.b.layout.place(f"t{len(self.b.layout.tensors)}", shape, type, role)

    def constant(self, name: str, make: Callable[[], Constant]) -> Tensor:
        if name not in self.constants:
            self.constants[name] = make()
            kind = Type.I64 if self.constants[name].dtype == np.int64 else Type.I32
            self.b.layout.place(name, self.constants[name].shape, kind, "constant")
        return next(tensor for tensor in self.b.layout.tensors if tensor.name == name)

    def start(self, start: Node | None) -> Tensor:
        return (
            self.constant("zero", lambda: np.zeros(1, dtype=np.int64)) if start is None else self.value(start)
        )

    def flat(self, tensor: Tensor, width: int) -> Tensor:
        """The same bytes as a matrix of `width` columns."""
        count = tensor.bytes // tensor.type.bytes // width
        return Tensor(
            name=tensor.name, at=tensor.at, shape=(count, width), type=tensor.type, role=tensor.role
        )

    def rows(self, node: Node, width: int | None = None) -> rows.Rows:
        """A node as rows of its last axis, or of `width` numbers; a piece of a split stays where it is."""
        part = patterns.part_of(node)
        if part is None or patterns.through(node) in self.made:
            return rows.Rows.of(self.value(node), width)
        whole = self.value(part.whole)
        size, stride = whole.type.bytes, part.row * whole.type.bytes
        return rows.Rows(
            tensor=whole,
            rows=whole.bytes // stride,
            cols=part.count,
            stride=stride,
            offset=part.offset * size,
        )

    def kernel(self, kind: str) -> AbstractContextManager[None]:
        name = self.here.name if self.here is not None else kind
        return self.b.kernel(kind, f"{kind} {name}")


Rule = Callable[[Lowering, Node], Tensor | None]
