"""Layers once for all: a draft of a few layers made into one of many.

Two neighbouring layers of a draft are the same words over other tensors; a further layer follows from how
the tensors of the one are those of the other. Knows no operators: what a layer is, the caller says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tongyun.chip.ppu.asm import Words
from tongyun.chip.ppu.draft import Draft, Uses
from tongyun.chip.ppu.program import Kernel, Tensor
from tongyun.errors import TongyunError


class UnlikeError(TongyunError):
    """Two layers are not the same words over other tensors."""


@dataclass(frozen=True)
class Layer:
    """Kernels first … last - 1 of a draft."""

    first: int
    last: int


@dataclass(frozen=True)
class Repeated:
    draft: Draft
    copies: tuple[dict[str, str], ...]
    """For each new layer: the names of its own tensors, by those of the layer it was made from."""


def repeat(
    draft: Draft, before: Layer, layer: Layer, more: int, rename: Callable[[str, int], str]
) -> Repeated:
    """`more` layers behind `layer`, each to the one before it as `layer` is to `before`.

    A tensor that both layers use alike is shared; one that a layer makes and the next reads is handed on; any
    other is the layer's own and made anew, called `rename(name, i)` in the i-th new layer. Kernels
    behind the layers read the last one's. UnlikeError when the two are not the same words.
    """
    one, two = _Part.of(draft, before), _Part.of(draft, layer)
    if not np.array_equal(one.words, two.words):
        raise UnlikeError("two layers are not the same instructions")
    chain = _Chain(list(draft.tensors), _pairs(draft, one.uses, two.uses), rename)
    source = {after: tensor for tensor, after in chain.next.items() if after != tensor}
    made = [chain.instances(one.uses, turn) for turn in range(2, more + 2)]
    last = {tensor: chain.instance(first, more + 1) for tensor, first in source.items()}
    borders = draft.borders
    start, end = int(borders[layer.last]), int(borders[layer.last] - borders[layer.first])
    tail = draft.uses.part(start, len(draft.words))
    moved = np.arange(len(draft.tensors))
    moved[list(last)] = list(last.values())
    parts = [(0, draft.uses.part(0, start))]
    parts += [(start + end * i, replace(two.uses, tensor=tensor)) for i, tensor in enumerate(made)]
    parts.append((start + end * more, replace(tail, tensor=moved[tail.tensor])))
    body = draft.words[int(borders[layer.first]) : start]
    words = np.concatenate([draft.words[:start], np.tile(body, (more, 1)), draft.words[start:]])
    kernels = [*draft.kernels[: layer.last]]
    for turn in range(1, more + 1):
        copied = draft.kernels[layer.first : layer.last]
        for each in copied:
            number = None if each.layer is None else each.layer + turn
            kernels.append(replace(each, layer=number, moves=chain.moves(each, source, turn + 1)))
    kernels += draft.kernels[layer.last :]
    longer = replace(
        draft, words=words, tensors=tuple(chain.tensors), kernels=tuple(kernels), uses=Uses.joined(parts)
    )
    longer.words[longer.borders[:-1], 2] = np.arange(len(kernels))
    copies: list[dict[str, str]] = [{} for _ in range(more)]
    for (tensor, turn), new in chain.made.items():
        copies[turn - 2][chain.tensors[chain.next[tensor]].name] = chain.tensors[new].name
    return Repeated(longer, tuple(copies))


@dataclass(frozen=True)
class _Part:
    """A layer's words without addresses and kernel numbers, and the tensors its operands point into."""

    words: Words
    uses: Uses

    @classmethod
    def of(cls, draft: Draft, layer: Layer) -> _Part:
        first, last = int(draft.borders[layer.first]), int(draft.borders[layer.last])
        words, uses = draft.words[first:last].copy(), draft.uses.part(first, last)
        words[uses.row, uses.slot] = 0
        words[uses.row, uses.slot + 1] &= 0xFF000000
        words[draft.borders[layer.first : layer.last] - first, 2] = 0
        return cls(words, uses)


def _pairs(draft: Draft, one: Uses, two: Uses) -> dict[int, int]:
    """Each tensor of the one layer to the tensor in its place in the other."""
    same = all(np.array_equal(getattr(one, name), getattr(two, name)) for name in ("row", "slot", "offset"))
    pairs: dict[int, int] = {}
    for left, right in zip(map(int, one.tensor), map(int, two.tensor), strict=False):
        same = same and pairs.setdefault(left, right) == right and _alike(draft.tensors, left, right)
    if not same or len(set(pairs.values())) != len(pairs):
        raise UnlikeError("two layers do not use their tensors alike")
    return pairs


def _alike(tensors: Sequence[Tensor], left: int, right: int) -> bool:
    a, b = tensors[left], tensors[right]
    return (a.shape, a.type, a.role) == (b.shape, b.type, b.role)


@dataclass
class _Chain:
    """What stands for a tensor of the first layer in each layer behind it."""

    tensors: list[Tensor]
    next: dict[int, int]
    rename: Callable[[str, int], str]

    def __post_init__(self) -> None:
        self.made: dict[tuple[int, int], int] = {}

    def moves(self, kernel: Kernel, source: dict[int, int], turn: int) -> dict[str, int]:
        """What a kernel of the layer moves, by the names of layer `turn`'s tensors."""
        number = {each.name: place for place, each in enumerate(self.tensors)}
        moved = {}
        for name, size in kernel.moves.items():
            first = source.get(number[name])
            moved[name if first is None else self.tensors[self.instance(first, turn)].name] = size
        return moved

    def instances(self, uses: Uses, turn: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.array([self.instance(int(tensor), turn) for tensor in uses.tensor], dtype=np.int64)

    def instance(self, tensor: int, turn: int) -> int:
        """The tensor that is to layer `turn` what `tensor` is to layer 0."""
        after = self.next[tensor]
        if turn == 0 or after == tensor:
            return tensor
        if after in self.next:
            return self.instance(after, turn - 1)
        if turn == 1:
            return after
        if (tensor, turn) not in self.made:
            given = self.tensors[after]
            self.made[tensor, turn] = len(self.tensors)
            self.tensors.append(replace(given, name=self.rename(given.name, turn - 1)))
        return self.made[tensor, turn]
