"""A program whose tensors have no place yet, and the places.

Kernels are written against addresses that no two tensors share, so that every operand says which tensor
it means. From that follows how long each tensor lives, and which scratch may lie where another lay.
Knows no operators and no layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tongyun.chip.ppu.asm import Words
from tongyun.chip.ppu.isa import BY_NAME, OPCODES, Form
from tongyun.chip.ppu.program import Kernel, Layout, Program, Tensor
from tongyun.chip.ppu.rates import rates
from tongyun.errors import Infeasible, TongyunError
from tongyun.specs.ppu import Ppu

_HIGH = 0xFFFFFF
"""Bits of an HBM operand's second slot that are address; the others name its register."""


@dataclass(frozen=True, kw_only=True)
class Uses:
    """Every operand that points into a tensor: its word and slot, the tensor's number, the bytes into it."""

    row: NDArray[np.int64]
    slot: NDArray[np.int64]
    tensor: NDArray[np.int64]
    offset: NDArray[np.int64]

    def part(self, first: int, last: int) -> Uses:
        """Those of words first … last - 1, counted from the first."""
        inside = (self.row >= first) & (self.row < last)
        return Uses(
            row=self.row[inside] - first, slot=self.slot[inside], tensor=self.tensor[inside],
            offset=self.offset[inside],
        )  # fmt: skip

    @classmethod
    def joined(cls, parts: Iterable[tuple[int, Uses]]) -> Uses:
        """Parts one behind the other, each with the number of its first word."""
        given = list(parts)
        return cls(
            row=np.concatenate([first + part.row for first, part in given]),
            slot=np.concatenate([part.slot for _, part in given]),
            tensor=np.concatenate([part.tensor for _, part in given]),
            offset=np.concatenate([part.offset for _, part in given]),
        )


@dataclass(frozen=True, kw_only=True)
class Draft:
    words: Words
    tensors: tuple[Tensor, ...]
    kernels: tuple[Kernel, ...]
    uses: Uses
    symbols: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, words: Words, tensors: Sequence[Tensor], kernels: Sequence[Kernel], symbols: Sequence[str]
    ) -> Draft:
        """Words over tensors of distinct, rising addresses."""
        return cls(
            words=words, tensors=tuple(tensors), kernels=tuple(kernels), uses=_uses(words, tensors),
            symbols=tuple(symbols),
        )  # fmt: skip

    @cached_property
    def borders(self) -> NDArray[np.int64]:
        """First word of each kernel, and the word behind the last kernel."""
        starts = np.flatnonzero(self.words[:, 0] & 0xFF == BY_NAME["BARRIER"].code)
        return np.append(starts, len(self.words) - 1)

    def settled(self, ppu: Ppu, keep: Collection[str] = (), chips: int = 1) -> Program:
        """The program with every tensor in its place in HBM.

        Scratch lies where other scratch lay whose last kernel is past, unless `keep` names it. Infeasible
        when a chip's HBM is too small, with the bytes missing.
        """
        lasting = [each.role != "scratch" or each.name in keep for each in self.tensors]
        placed = self._placed(lasting)
        top = max((each.at + each.room for each in placed), default=0)
        if top > ppu.hbm_bytes:
            held = sum(each.room for each, lasts in zip(placed, lasting, strict=True) if lasts)
            raise Infeasible(_short(ppu, top, held, chips))
        words = self.words.copy()
        at = np.array([each.at for each in placed], dtype=np.int64)[self.uses.tensor] + self.uses.offset
        words[self.uses.row, self.uses.slot] = at & 0xFFFFFFFF
        high = self.uses.row, self.uses.slot + 1
        words[high] = (words[high] & ~np.uint32(_HIGH)) | (at >> 32).astype(np.uint32)
        return Program(
            words=words, tensors=placed, kernels=self.kernels, symbols=self.symbols, hbm_bytes=top,
            chip=ppu.name, chips=chips, order=tuple(rates(ppu).tolist()),
        )  # fmt: skip

    def _placed(self, lasting: Sequence[bool]) -> tuple[Tensor, ...]:
        """The tensors at their addresses: first what lasts, then scratch, kernel by kernel."""
        kernel = np.searchsorted(self.borders, self.uses.row, side="right") - 1
        # In the order of their first use, which is the same however the draft was made.
        met = np.full(len(self.tensors), len(self.uses.row))
        np.minimum.at(met, self.uses.tensor, np.arange(len(self.uses.row)))
        last = np.full(len(self.tensors), -1)
        np.maximum.at(last, self.uses.tensor, kernel)
        layout, placed, ends = Layout(), dict[int, Tensor](), dict[int, list[int]]()
        order = [int(number) for number in np.argsort(met, kind="stable")]
        for number in sorted(order, key=lambda number: not lasting[number]):
            given = self.tensors[number]
            if not lasting[number] and last[number] >= 0:
                now = int(kernel[met[number]])
                for past in sorted(end for end in ends if end < now):
                    for done in ends.pop(past):
                        layout.release(placed[done])
                ends.setdefault(int(last[number]), []).append(number)
            placed[number] = layout.place(given.name, given.shape, given.type, given.role)
        return tuple(placed[number] for number in range(len(self.tensors)))


def _uses(words: Words, tensors: Sequence[Tensor]) -> Uses:
    rows, slots = [], []
    for opcode in OPCODES:
        found = np.flatnonzero(words[:, 0] & 0xFF == opcode.code)
        for name, place in opcode.slot.items():
            if opcode.operands[name] is Form.HBM:
                rows.append(found)
                slots.append(np.full(len(found), place))
    row, slot = np.concatenate(rows), np.concatenate(slots)
    order = np.lexsort((slot, row))
    row, slot = row[order], slot[order]
    at = words[row, slot].astype(np.int64) | (words[row, slot + 1] & _HIGH).astype(np.int64) << 32
    # No tensor lies at zero: an operand that is zero is one the instruction goes without.
    row, slot, at = row[at > 0], slot[at > 0], at[at > 0]
    starts = np.array([each.at for each in tensors], dtype=np.int64)
    tensor = np.searchsorted(starts, at, side="right") - 1
    sizes = np.array([each.bytes for each in tensors], dtype=np.int64)
    if len(at) and (tensor.min() < 0 or bool((at - starts[tensor] >= np.maximum(sizes[tensor], 1)).any())):
        raise TongyunError("an instruction points outside every tensor")
    return Uses(row=row, slot=slot, tensor=tensor, offset=at - starts[tensor])


def _short(ppu: Ppu, needed: int, held: int, chips: int) -> str:
    each = "the program" if chips == 1 else f"each of {chips} chips"
    missing = needed - ppu.hbm_bytes
    total = f", {missing * chips:,} on all" if chips > 1 else ""
    return (
        f"{each} needs {needed:,} bytes of HBM ({held:,} of them weights, cache and results), {ppu.name} has "
        f"{ppu.hbm_bytes:,}: {missing:,} bytes are missing{total}"
    )
