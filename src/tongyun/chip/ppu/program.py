"""A compiled program: words, where its tensors lie in HBM, and what each kernel is for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from tongyun.chip.ppu.asm import Words
from tongyun.chip.ppu.isa import SLOTS, Type
from tongyun.errors import InputError

MAGIC = b"PPU4"
_DIGEST = 32
"""Bytes of the SHA-256 behind the magic, over all that follows."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor in HBM: contiguous, row-major."""

    name: str
    at: int
    """Byte address."""
    shape: tuple[int, ...]
    type: Type
    role: str
    """weight, input, output, state (kept between runs, such as the KV cache) or scratch."""

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.type.bytes

    @property
    def room(self) -> int:
        """Bytes it takes in HBM: whole pieces of 256, at least one."""
        return (max(self.bytes, 1) + 255) // 256 * 256


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What runs between two barriers."""

    name: str
    kind: str
    layer: int | None = None
    line: str = ""
    """Where in the user's source the operator stands."""
    moves: Mapping[str, int] = field(default_factory=dict)
    """Bytes to and from memory by tensor, from shapes and tiles; empty where numbers in memory decide."""


@dataclass(frozen=True, kw_only=True)
class Program:
    words: Words
    tensors: tuple[Tensor, ...]
    kernels: tuple[Kernel, ...]
    symbols: tuple[str, ...] = ()
    """Names of the numbers read from SRAM that a simulation without data must be given."""
    hbm_bytes: int = 0
    chip: str = ""
    chips: int = 1
    """How many run it together, each on its own part of the weights."""
    order: tuple[float, ...] = ()
    """`rates` of the chip it was compiled for, its cores first: requests to shared memory are served in the
    order in which they come there. Empty: they are served as they come on the chip it runs on."""

    def tensor(self, name: str) -> Tensor:
        return next(tensor for tensor in self.tensors if tensor.name == name)

    def save(self, path: Path) -> None:
        """Write header and words under a temporary name, then rename."""
        header = json.dumps(
            {
                "tensors": [asdict(tensor) for tensor in self.tensors],
                "kernels": [asdict(kernel) for kernel in self.kernels],
                "symbols": self.symbols,
                "hbm_bytes": self.hbm_bytes,
                "chip": self.chip,
                "chips": self.chips,
                "order": self.order,
            }
        ).encode()
        rest = len(header).to_bytes(8, "little") + header + np.ascontiguousarray(self.words).tobytes()
        fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        fresh.write_bytes(MAGIC + hashlib.sha256(rest).digest() + rest)
        fresh.replace(path)

    @classmethod
    def load(cls, path: Path) -> Program:
        """Read what `save` wrote; InputError when the file is not one."""
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        start = len(MAGIC) + _DIGEST
        digest, rest = raw[len(MAGIC) : start], raw[start:]
        if raw[: len(MAGIC)] != MAGIC:
            raise InputError(f"{path}: not a PPU program")
        if hashlib.sha256(rest).digest() != digest:
            raise InputError(f"{path}: damaged: its bytes are not those that were written")
        size = int.from_bytes(rest[:8], "little")
        body = rest[8 + size :]
        try:
            header = json.loads(rest[8 : 8 + size])
            tensors = tuple(
                Tensor(**{**item, "shape": tuple(item["shape"]), "type": Type(item["type"])})
                for item in header["tensors"]
            )
            kernels = tuple(Kernel(**item) for item in header["kernels"])
            symbols, hbm_bytes = tuple(header["symbols"]), header["hbm_bytes"]
            chip, chips, order = header["chip"], header["chips"], tuple(map(float, header["order"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: damaged header: {error}") from None
        return cls(
            words=np.frombuffer(body, dtype=np.uint32).reshape(-1, SLOTS).copy(),
            tensors=tensors,
            kernels=kernels,
            symbols=symbols,
            hbm_bytes=hbm_bytes,
            chip=chip,
            chips=chips,
            order=order,
        )


@dataclass
class Layout:
    """Hands out HBM addresses, 256-byte aligned; scratch goes where something was released."""

    tensors: list[Tensor] = field(default_factory=list)
    top: int = 256
    free: list[tuple[int, int]] = field(default_factory=list)
    """(address, bytes) of holes."""

    def place(self, name: str, shape: tuple[int, ...], type: Type, role: str) -> Tensor:
        tensor = Tensor(name=name, at=0, shape=shape, type=type, role=role)
        at = self._hole(tensor.room) if role == "scratch" else None
        if at is None:
            at, self.top = self.top, self.top + tensor.room
        tensor = replace(tensor, at=at)
        self.tensors.append(tensor)
        return tensor

    def release(self, tensor: Tensor) -> None:
        """Its bytes may be handed out again."""
        holes = sorted([*self.free, (tensor.at, tensor.room)])
        self.free = []
        for at, size in holes:
            if self.free and sum(self.free[-1]) == at:
                self.free[-1] = (self.free[-1][0], self.free[-1][1] + size)
            else:
                self.free.append((at, size))

    def _hole(self, size: int) -> int | None:
        fitting = [hole for hole in self.free if hole[1] >= size]
        if not fitting:
            return None
        at, room = min(fitting, key=lambda hole: hole[1])
        self.free.remove((at, room))
        if room > size:
            self.free.append((at + size, room - size))
        return at
