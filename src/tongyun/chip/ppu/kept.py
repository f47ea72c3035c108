"""Where what the compiler made is kept on disk, under a name of everything it depends on."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

from tongyun.specs.ppu import Ppu


def kept(folder: str, suffix: str, ppu: Ppu, *given: object) -> Path:
    """A file below $XDG_CACHE_HOME (by default ~/.cache), named by chip, compiler and what is `given`."""
    # A set of names is written in another order by every process.
    figures = replace(ppu, sources=frozenset())
    name = hashlib.sha256(repr([figures, compiler(), *given]).encode()).hexdigest()[:32]
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "tongyun" / folder / f"{name}{suffix}"


@cache
def compiler() -> str:
    """What the compiler is: its source."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
