"""Compiled steps kept on disk, under a name made of everything they depend on.

A file that cannot be read back whole is compiled anew. Nothing is ever out of date: another model, chip,
size of step, fusion or version of the compiler's source is another name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from tongyun.chip.ppu.program import Program
from tongyun.errors import InputError
from tongyun.specs.ppu import Ppu


def cached_step(config: Mapping[str, Any], ppu: Ppu, **step: Any) -> Program:
    """`compile_step`'s program, from disk where it was compiled before; arguments are the same."""
    path = program_path(config, ppu, **step)
    try:
        return Program.load(path)
    except InputError:
        # Not there yet, or damaged.
        from tongyun.chip.ppu.capture import compile_step

        program = compile_step(config, ppu, **step).program
        path.parent.mkdir(parents=True, exist_ok=True)
        program.save(path)
        return program


def program_path(config: Mapping[str, Any], ppu: Ppu, **step: Any) -> Path:
    """Where the program of a step is kept: below $XDG_CACHE_HOME, by default ~/.cache."""
    # A set of names is written in another order by every process.
    figures = replace(ppu, sources=frozenset())
    given = [sorted(config.items()), figures, sorted(step.items()), _compiler()]
    name = hashlib.sha256(repr(given).encode()).hexdigest()[:32]
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "tongyun" / "programs" / f"{name}.ppu"


@cache
def _compiler() -> str:
    """What the compiler is: its source, and the versions of what traces the model."""
    from importlib.metadata import version

    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return f"{digest.hexdigest()} {version('torch')} {version('transformers')}"
