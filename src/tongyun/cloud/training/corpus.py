"""The text a model learns from: which files, in which order, and as which tokens.

Order depends on names alone, so that the same files give the same tokens on any
machine. It knows nothing of models or of steps beyond `Windows`.
"""

from __future__ import annotations

import hashlib
import lzma
import sysconfig
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tongyun.cloud.training.recipe import Data, Recipe
from tongyun.errors import InputError, SpecError, unknown


@dataclass(frozen=True, kw_only=True)
class Document:
    """One file: its path below the root, with forward slashes, and its text."""

    name: str
    text: str

    @property
    def size_bytes(self) -> int:
        return len(self.text.encode())


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents to train on and documents kept for evaluation, each sorted by name."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over the names and texts: two runs with the same digest saw the same data."""
        total = hashlib.sha256()
        for document in (*self.train, *self.held_out):
            total.update(f"{document.name}\0{document.text}\0".encode())
        return total.hexdigest()


def gather(recipe: Recipe) -> Corpus:
    """Read every `*.py` below the recipe's root and split off the held-out files."""
    root = _root(recipe)
    documents = _read(root, recipe.data)
    if not documents:
        raise InputError(f"no Python files below {root}")
    names = {d.name for d in documents}
    for i, name in enumerate(recipe.data.held_out):
        if name not in names:
            raise SpecError(
                recipe.file, f"data.held_out[{i}]", f"{unknown('file', name, _near(name, names))} …"
            )
    held_out = set(recipe.data.held_out)
    train = tuple(d for d in documents if d.name not in held_out)
    if not train:
        raise SpecError(recipe.file, "data.held_out", "leaves nothing to train on")
    return Corpus(train=train, held_out=tuple(d for d in documents if d.name in held_out))


def _root(recipe: Recipe) -> Path:
    if recipe.data.source == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    root = recipe.file.parent / str(recipe.data.path)
    if not root.is_dir():
        raise SpecError(recipe.file, "data.path", f"no such directory: {root}")
    return root


def _read(root: Path, data: Data) -> list[Document]:
    """Files that are not UTF-8 or are empty are left out."""
    paths = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py"))
    documents = []
    for name in paths:
        if any(fnmatch(part, pattern) for part in PurePosixPath(name).parts for pattern in data.exclude):
            continue
        try:
            text = (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            documents.append(Document(name=name, text=text))
    return documents


def _near(name: str, names: Iterable[str]) -> list[str]:
    """Names in the same folder, so that a message does not list a whole library."""
    folder = PurePosixPath(name).parent
    return [n for n in names if PurePosixPath(n).parent == folder][:20]


class Encoder(Protocol):
    """What the corpus asks of a tokenizer."""

    def encode_all(self, texts: list[str]) -> list[list[int]]: ...

    @property
    def end_of_text(self) -> int: ...


def encode(documents: Iterable[Document], encoder: Encoder) -> NDArray[np.uint16]:
    """All documents as one row of tokens, `<|endoftext|>` before each and after the last."""
    end = np.array([encoder.end_of_text], dtype=np.uint16)
    rows = encoder.encode_all([document.text for document in documents])
    pieces = [end]
    for row in rows:
        pieces += [np.array(row, dtype=np.uint16), end]
    return np.concatenate(pieces)


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Rows of `sequence + 1` tokens in a shuffled order that depends on the seed alone.

    Every epoch cuts the tokens at a new offset and shuffles anew, so row i is known
    without the rows before it: that is what makes resuming exact.
    """

    tokens: NDArray[np.uint16]
    sequence: int
    seed: int

    def rows(self, first: int, count: int) -> NDArray[np.int64]:
        """Rows `first … first + count − 1` of the endless stream, (count, sequence + 1)."""
        per_epoch = (len(self.tokens) - 1) // self.sequence - 1
        if per_epoch < 1:
            raise InputError(f"{len(self.tokens)} tokens are too few for rows of {self.sequence}")
        rows = []
        orders: dict[int, tuple[int, NDArray[np.int64]]] = {}
        for i in range(first, first + count):
            epoch, index = divmod(i, per_epoch)
            if epoch not in orders:
                orders[epoch] = self._order(epoch, per_epoch)
            offset, order = orders[epoch]
            start = offset + int(order[index]) * self.sequence
            rows.append(self.tokens[start : start + self.sequence + 1].astype(np.int64))
        return np.stack(rows)

    def _order(self, epoch: int, per_epoch: int) -> tuple[int, NDArray[np.int64]]:
        random = np.random.default_rng((self.seed, self.sequence, epoch))
        return int(random.integers(self.sequence)), random.permutation(per_epoch)


def compressed_bits_per_byte(documents: Iterable[Document]) -> dict[str, float]:
    """Bits per byte of gzip (level 9) and xz (preset 9e) on the same files, each file on its own.

    A file's container headers count; at these sizes they are below one hundredth of a bit.
    """
    texts = [document.text.encode() for document in documents]
    size = sum(map(len, texts))
    xz = sum(len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) for text in texts)
    return {"gzip": 8 * sum(len(zlib.compress(text, 9)) for text in texts) / size, "xz": 8 * xz / size}
