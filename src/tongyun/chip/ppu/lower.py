"""A captured graph to a program: operators to kernels, kernels to instructions.

Goes through the graph from what is asked for to what it needs, fuses what the patterns allow, and writes
each operator as a kernel. What it does not know it refuses by name and source line; nothing is left
to the host.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import GraphModule, Node

from tongyun.chip.ppu import patterns
from tongyun.chip.ppu.draft import Draft
from tongyun.chip.ppu.emit import attention as attend
from tongyun.chip.ppu.emit import experts, paged, rows
from tongyun.chip.ppu.emit.builder import Builder
from tongyun.chip.ppu.emit.matmul import matmul
from tongyun.chip.ppu.isa import At, Type, Vec
from tongyun.chip.ppu.program import Program, Tensor
from tongyun.chip.ppu.repeat import Layer, UnlikeError, repeat
from tongyun.chip.ppu.tiles import TORCH
from tongyun.errors import InputError, unknown
from tongyun.specs.ppu import Ppu

Constant = NDArray[np.int32] | NDArray[np.int64]
Shape = tuple[int, ...]
_LEAST = 3
"""Layers that show how one follows another: the first also holds what all share."""
_SHARED = {"embed", "angles"}
"""Kernels that are of no layer, though the first one asks for them."""
_TYPES = {dtype: kind for kind, dtype in TORCH.items()}


@dataclass(frozen=True, kw_only=True)
class Fusions:
    """Which operators are made part of their neighbours; each can be switched off alone."""

    norm: bool = True
    """RMSNorm into the products behind it."""
    rotate: bool = True
    """The norm of each head into its rotation."""
    swiglu: bool = True
    """silu(gate) · up into the two products before it."""
    residual: bool = True
    """An addition into the product, or the sum over experts, before it."""

    @classmethod
    def without(cls, *names: str) -> Fusions:
        """All but the named; "all" switches every one off. InputError for a name that is none."""
        known = [item.name for item in fields(cls)]
        for name in names:
            if name not in {*known, "all"}:
                raise InputError(unknown("fusion", name, [*known, "all"]))
        return cls(**{name: name not in names and "all" not in names for name in known})


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
    return _Lowering(graph, ppu, fusions or Fusions(), scale or Scale()).run()


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


@dataclass
class _Lowering:
    graph: GraphModule
    ppu: Ppu
    fusions: Fusions
    scale: Scale
    made: dict[Node, Tensor] = field(default_factory=dict)
    constants: dict[str, Constant] = field(default_factory=dict)
    angles: dict[tuple[Node, Node | None, int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.b = Builder(self.ppu)
        self.here: Node | None = None
        self.layers: list[Layer] = []

    def run(self) -> Lowered:
        drafted = self._drafted()
        wanted = self.scale.layers
        if wanted is not None and wanted > len(self.layers):
            if len(self.layers) < _LEAST:
                raise UnlikeError(f"{len(self.layers)} layers do not show how one follows another")
            drafted = _repeated(drafted, self.layers, wanted)
        return Lowered(
            program=drafted.draft.settled(self.ppu, set(drafted.outputs), self.scale.chips),
            inputs=drafted.inputs,
            outputs=drafted.outputs,
            output_shapes=drafted.shapes,
            constants=self.constants,
        )

    def _drafted(self) -> _Drafted:
        """The graph as kernels, layer by layer: a layer ends with the second of its residual sums."""
        placeholders = [node for node in self.graph.graph.nodes if node.op == "placeholder"]
        sums, start = 0, 0
        for node in self.graph.graph.nodes:
            # In the graph's order, so that the way down from the last operator stays short.
            if self._is_residual(node):
                self.value(node)
                sums += 1
                if sums % 2 == 0:
                    self.layers.append(Layer(start, len(self.b.kernels)))
                    start = len(self.b.kernels)
            elif self._is_advance(node):
                self.value(node)
        (output,) = (node for node in self.graph.graph.nodes if node.op == "output")
        results = [item for item in output.args[0] if isinstance(item, Node)]
        tensors = [self.value(node) for node in results]
        for number, layer in enumerate(self.layers):
            for place in range(layer.first, layer.last):
                if self.b.kernels[place].kind not in _SHARED:
                    self.b.kernels[place] = replace(self.b.kernels[place], layer=number)
        return _Drafted(
            draft=self.b.draft(),
            inputs=tuple(self.made[node].name if node in self.made else None for node in placeholders),
            outputs=tuple(tensor.name for tensor in tensors),
            shapes=tuple(patterns.shape_of(node) for node in results),
        )

    @staticmethod
    def _is_residual(node: Node) -> bool:
        if patterns.name_of(node) != "aten.add.Tensor" or not all(
            isinstance(item, Node) for item in node.args
        ):
            return False
        is_row = len(patterns.shape_of(node)) in (2, 3) and node.meta["val"].dtype == torch.bfloat16
        return is_row and patterns.rotation_of(node) is None

    @staticmethod
    def _is_advance(node: Node) -> bool:
        """How long a layer's cache is now: its kernel belongs to the layer."""
        if patterns.name_of(node) != "aten.add.Tensor" or not isinstance(node.args[1], int):
            return False
        start = node.args[0]
        return isinstance(start, Node) and start.op == "placeholder" and not patterns.shape_of(node)

    # Tensors.

    def value(self, node: Node) -> Tensor:
        """The tensor of a node, row-major; lowers what it takes."""
        source = patterns.through(node)
        if source in self.made:
            return self.made[source]
        if source.op == "placeholder":
            return self._place(source, "input")
        self.here = source
        known = (
            self._norm,
            self._mixture_sum,
            self._attention,
            self._paged,
            self._swiglu,
            self._reduced,
            self._product,
            self._cache,
            self._sum,
            self._embedding,
            self._advance,
            self._cast,
        )
        for recognise in known:
            found = recognise(source)
            if found is not None:
                self.made[source] = found
                return found
        raise self._refused(source)

    def _refused(self, node: Node) -> InputError:
        trace = node.meta.get("stack_trace") or ""
        lines = re.findall(r'File "([^"]+)", line (\d+)', trace)
        where = f"{lines[-1][0]}:{lines[-1][1]}: " if lines else ""
        what = patterns.name_of(node) or node.op
        return InputError(f"{where}the PPU compiler does not know {what} here ({node.name})")

    def _place(self, node: Node, role: str) -> Tensor:
        value = node.meta["val"]
        if value.dtype not in _TYPES:
            known = ", ".join(map(str, _TYPES))
            raise InputError(f"{node.name}: the PPU has no data type {value.dtype}; it has {known}")
        shape = tuple(int(size) for size in value.shape) or (1,)
        name = self.scale.names.get(node.name, node.name)
        self.made[node] = self.b.layout.place(name, shape, _TYPES[value.dtype], role)
        return self.made[node]

    def _new(self, *shape: int, type: Type = Type.BF16, role: str = "scratch") -> Tensor:
        return self.b.layout.place(f"t{len(self.b.layout.tensors)}", shape, type, role)

    def _constant(self, name: str, make: Callable[[], Constant]) -> Tensor:
        if name not in self.constants:
            self.constants[name] = make()
            kind = Type.I64 if self.constants[name].dtype == np.int64 else Type.I32
            self.b.layout.place(name, self.constants[name].shape, kind, "constant")
        return next(tensor for tensor in self.b.layout.tensors if tensor.name == name)

    def _start(self, start: Node | None) -> Tensor:
        return (
            self._constant("zero", lambda: np.zeros(1, dtype=np.int64))
            if start is None
            else self.value(start)
        )

    def _flat(self, tensor: Tensor, width: int) -> Tensor:
        """The same bytes as a matrix of `width` columns."""
        count = tensor.bytes // tensor.type.bytes // width
        return Tensor(
            name=tensor.name, at=tensor.at, shape=(count, width), type=tensor.type, role=tensor.role
        )

    def _rows(self, node: Node, width: int | None = None) -> rows.Rows:
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

    def _kernel(self, kind: str) -> AbstractContextManager[None]:
        name = self.here.name if self.here is not None else kind
        return self.b.kernel(kind, f"{kind} {name}")

    # Operators.

    def _norm(self, node: Node) -> Tensor | None:
        norm = patterns.norm_of(node)
        if norm is None:
            return None
        x, gain = self._rows(norm.x), self.value(norm.gain)
        out = self._new(x.rows, x.cols)
        with self._kernel("rmsnorm"):
            rows.rmsnorm(self.b, x, gain, rows.Rows.of(out), norm.eps)
        return out

    def _fused_norm(self, node: Node) -> tuple[Tensor, Tensor | None, float]:
        """A product's left operand, and the norm to fold into it."""
        norm = patterns.norm_of(node) if self.fusions.norm else None
        if norm is None or patterns.through(node) in self.made:
            return self.value(node), None, 0.0
        return self.value(norm.x), self.value(norm.gain), norm.eps

    def _product(self, node: Node, residual: Tensor | None = None) -> Tensor | None:
        product = patterns.product_of(node)
        if product is None:
            return None
        weight = self.value(product.weight)
        x, gain, eps = self._fused_norm(product.x)
        x = self._flat(x, weight.shape[1])
        out = self._new(x.shape[0], weight.shape[0])
        with self._kernel("matmul"):
            matmul(self.b, x, weight, out, gain=gain, eps=eps, residual=residual)
        return out

    def _reduced(self, node: Node, residual: Tensor | None = None) -> Tensor | None:
        """The sum over the chips, and the residual with it: rounded once, as a product and its residual."""
        reduced = patterns.reduced_of(node)
        if reduced is None:
            return None
        part = self.value(reduced.part)
        out = self._new(*part.shape, type=part.type)
        with self._kernel("all_reduce"):
            self.b.emit(
                "ALL_REDUCE", part.type, source=At(part.at), target=At(out.at), bytes=part.bytes,
                ranks=reduced.ranks, addend=At() if residual is None else At(residual.at),
            )  # fmt: skip
        return out

    def _swiglu(self, node: Node) -> Tensor | None:
        parts = patterns.swiglu_of(node)
        if parts is None:
            return None
        joint = self._joint(parts)
        if joint is not None:
            return joint
        gate, up = (patterns.product_of(part) for part in parts)
        if self.fusions.swiglu and gate and up and patterns.through(gate.x) is patterns.through(up.x):
            weights = self.value(gate.weight), self.value(up.weight)
            x, gain, eps = self._fused_norm(gate.x)
            x = self._flat(x, weights[0].shape[1])
            out = self._new(x.shape[0], weights[0].shape[0])
            with self._kernel("matmul"):
                matmul(self.b, x, weights[0], out, up=weights[1], gain=gain, eps=eps)
            return out
        left, right = (self._rows(part) for part in parts)
        out = self._new(left.rows, left.cols)
        with self._kernel("swiglu"):
            rows.swiglu(self.b, left, right, out)
        return out

    def _joint(self, parts: tuple[Node, Node]) -> Tensor | None:
        """Gate and up as the halves of one product, gate first."""
        gate, up = (patterns.part_of(part) for part in parts)
        product = patterns.product_of(gate.whole) if gate and self.fusions.swiglu else None
        if product is None or gate is None or up is None or gate.whole is not up.whole:
            return None
        weight = self.value(product.weight)
        (width, hidden) = weight.shape
        if (gate.row, gate.offset, up.offset, gate.count) != (width, 0, width // 2, width // 2):
            return None
        half = replace(weight, shape=(width // 2, hidden))
        x, gain, eps = self._fused_norm(product.x)
        x = self._flat(x, hidden)
        out = self._new(x.shape[0], width // 2)
        with self._kernel("matmul"):
            second = replace(half, at=weight.at + half.bytes)
            matmul(self.b, x, half, out, up=second, gain=gain, eps=eps)
        return out

    def _sum(self, node: Node) -> Tensor | None:
        if patterns.name_of(node) != "aten.add.Tensor" or not all(
            isinstance(item, Node) for item in node.args
        ):
            return None
        left, right = node.args
        assert isinstance(left, Node)
        assert isinstance(right, Node)
        if patterns.shape_of(left) != patterns.shape_of(right):
            return None
        for base, term in ((left, right), (right, left)):
            inner = patterns.through(term)
            if not self.fusions.residual or len(inner.users) > 1 or inner in self.made:
                continue
            if patterns.product_of(term) or patterns.mixture_of(term) or patterns.reduced_of(term):
                other = self._flat(self.value(base), patterns.shape_of(node)[-1])
                self.here = node
                kinds = (self._reduced, self._product, self._mixture)
                return next(found for kind in kinds if (found := kind(term, other)) is not None)
        a, b = self.value(left), self.value(right)
        out = self._new(*self._flat(a, patterns.shape_of(node)[-1]).shape)
        with self._kernel("add"):
            rows.elementwise(
                self.b, Vec.ADD, self._flat(a, out.shape[1]), out, other=self._flat(b, out.shape[1])
            )
        return out

    def _embedding(self, node: Node) -> Tensor | None:
        found = patterns.taken_of(node)
        if found is None:
            return None
        table, ids = self.value(found.table), self.value(found.ids)
        out = self._new(ids.bytes // ids.type.bytes, table.shape[1])
        with self._kernel("embed"):
            rows.embed(self.b, ids, table, out)
        return out

    def _advance(self, node: Node) -> Tensor | None:
        """An integer and a constant: how long the cache is now."""
        if patterns.name_of(node) != "aten.add.Tensor" or not isinstance(node.args[1], int):
            return None
        given = self.value(node.args[0])  # type: ignore[arg-type]
        out = self._new(*given.shape, type=given.type)
        with self._kernel("add"):
            rows.elementwise(self.b, Vec.ADD, given, out, imm=float(node.args[1]))
        return out

    def _cast(self, node: Node) -> Tensor | None:
        """From one floating-point type to another."""
        if patterns.name_of(node) != "aten._to_copy.default" or set(node.kwargs) != {"dtype"}:
            return None
        source, target = self.value(node.args[0]), node.meta["val"].dtype  # type: ignore[arg-type]
        if target not in (torch.float32, torch.bfloat16) or source.type not in (Type.F32, Type.BF16):
            return None
        out = self._new(*source.shape, type=_TYPES[target])
        with self._kernel("cast"):
            rows.copy(self.b, rows.Rows.of(source), rows.Rows.of(out))
        return out

    # Attention.

    def _cache(self, node: Node) -> Tensor | None:
        """Keys or values written into the cache, which stays where it is."""
        cached = patterns.cached_of(node)
        if cached is None or cached.written is not node:
            return None
        if cached.cache is None:
            cache = self._new(*patterns.shape_of(node), role="state")
        else:
            cache = self.value(cached.cache)
        self._keep(cached.fresh, cache, self._start(cached.start))
        return cache

    def _keep(self, fresh: Node, cache: Tensor, start: Tensor) -> None:
        tokens = self._heads(fresh)
        with self._kernel("keep"):
            rows.keep(self.b, tokens, cache, start)

    def _heads(self, node: Node) -> Tensor:
        """Queries, keys or values as [tokens, heads · width], rotated if they are."""
        rotation = patterns.rotation_of(node)
        if rotation is None:
            if patterns.name_of(node) != "aten.transpose.int":
                raise self._refused(node)
            return self.value(node.args[0])  # type: ignore[arg-type]
        if node in self.made:
            return self.made[node]
        *batch, tokens, heads, width = patterns.shape_of(rotation.x)
        norm = patterns.norm_of(rotation.x) if self.fusions.rotate else None
        x = self._rows(norm.x if norm else rotation.x, heads * width)
        head = rows.HeadNorm(gain=self.value(norm.gain), eps=norm.eps) if norm else None
        cos, sin = self._angles(rotation, math.prod(batch), tokens)
        out = self._new(x.rows, heads * width)
        self.here = node
        with self._kernel("rotate"):
            rows.rotate(self.b, x, cos, sin, rows.Rows.of(out), heads=heads, norm=head)
        self.made[node] = out
        return out

    def _angles(self, rotation: patterns.Rotation, sequences: int, tokens: int) -> tuple[Tensor, Tensor]:
        cos, sin = patterns.angles_of(rotation.cos), patterns.angles_of(rotation.sin)
        if cos is None or sin is None or (cos.function, sin.function) != ("cos", "sin"):
            raise self._refused(rotation.cos)
        key = (cos.frequency, cos.start or cos.positions, sequences, tokens)
        if key not in self.angles:
            frequency, start = self.value(cos.frequency), self._start(cos.start)
            count = (
                self.value(cos.positions)
                if cos.positions is not None
                else self._constant(
                    f"count_{sequences}_{tokens}",
                    lambda: np.tile(np.arange(tokens, dtype=np.int32), sequences),
                )
            )
            wide = 2 * frequency.shape[-1]
            both = self._new(sequences * tokens, wide), self._new(sequences * tokens, wide)
            self.here = rotation.cos
            with self._kernel("angles"):
                rows.angles(self.b, frequency, start, count, *both)
            self.angles[key] = both
        return self.angles[key]

    def _attention(self, node: Node) -> Tensor | None:
        found = patterns.attention_of(node)
        if found is None:
            return None
        q = self._heads(found.q)
        sequences, heads, tokens, width = patterns.shape_of(found.q)
        caches = []
        for item in (found.k, found.v):
            cached = patterns.cached_of(item)
            if cached is None:
                raise self._refused(item)
            if cached.written is not None:
                caches.append(self.value(cached.written))
                continue
            cache = self._new(*patterns.shape_of(cached.fresh))
            self._keep(cached.fresh, cache, self._start(None))
            caches.append(cache)
        shape = attend.Attention(
            sequences=sequences, tokens=tokens, heads=heads, kv_heads=caches[0].shape[1], width=width,
            room=caches[0].shape[2], scale=found.scale, query_stride=heads * width * 2,
        )  # fmt: skip
        out = self._new(sequences * tokens, heads * width)
        start = self._start(found.start)
        self.here = node
        with self._kernel("attention"):
            attend.attention(self.b, shape, q, caches[0], caches[1], out, start)
        return out

    def _paged(self, node: Node) -> Tensor | None:
        """Attention over blocks: the step's keys and values go to their slots first."""
        found = patterns.paged_of(node)
        if found is None:
            return None
        caches = self.value(found.caches[0]), self.value(found.caches[1])
        slots, first, starts, blocks = (
            self.value(item) for item in (found.slots, found.rows, found.starts, found.blocks)
        )
        pages = paged.Pages(slots=slots, rows=first, starts=starts, blocks=blocks)
        q, k = self._heads(found.q), self._heads(found.k)
        width, heads = caches[0].shape[3], caches[0].shape[1]
        out = self._new(*q.shape)
        self.here = found.call
        with self._kernel("keep"):
            paged.store(self.b, (rows.Rows.of(k), self._rows(found.v, heads * width)), caches, slots)
        with self._kernel("attention"):
            paged.attention(self.b, q, caches, out, pages, width**-0.5)
        for item in found.call.users:
            self.made[item] = (out, *caches)[item.args[1]]  # type: ignore[index]
        return self.made[node]

    # Experts.

    def _mixture_sum(self, node: Node) -> Tensor | None:
        return self._mixture(node, None) if patterns.mixture_of(node) is not None else None

    def _mixture(self, node: Node, residual: Tensor | None) -> Tensor | None:
        found = patterns.mixture_of(node)
        if found is None:
            return None
        router, up, down = (self.value(item) for item in (found.router, found.up, found.down))
        count, hidden, inner = down.shape
        x = self._flat(self.value(found.x), hidden)
        tokens, pairs = x.shape[0], x.shape[0] * found.top
        owner = self._constant(
            f"owner_{pairs}_{found.top}", lambda: np.arange(pairs, dtype=np.int32) // found.top
        )
        logits, share = self._new(tokens, count), self._new(tokens, found.top)
        expert, token, place = (self._new(pairs, type=Type.I32) for _ in range(3))
        offset = self._new(count + 1, type=Type.I32)
        act, each, out = self._new(pairs, inner), self._new(pairs, hidden), self._new(tokens, hidden)
        with self._kernel("router"):
            matmul(self.b, x, router, logits)
        with self._kernel("choose"):
            experts.choose(self.b, logits, share, expert, top=found.top, renormalise=found.renormalise)
        with self._kernel("dispatch"):
            experts.dispatch(self.b, expert, owner, token, place, offset, experts=count)
        if self.fusions.swiglu:
            with self._kernel("experts_up"):
                experts.grouped(self.b, x, up, act, offset, token=token, gate=True)
        else:
            both = self._new(pairs, 2 * inner)
            with self._kernel("experts_up"):
                experts.grouped(self.b, x, up, both, offset, token=token)
            stride = 4 * inner
            first = rows.Rows(tensor=both, rows=pairs, cols=inner, stride=stride)
            second = replace(first, offset=2 * inner)
            with self._kernel("swiglu"):
                rows.swiglu(self.b, first, second, act)
        with self._kernel("experts_down"):
            experts.grouped(self.b, act, down, each, offset)
        with self._kernel("combine"):
            experts.combine(self.b, each, share, place, out, top=found.top, residual=residual)
        return out
