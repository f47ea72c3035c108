"""Compiled steps kept on disk, under a name made of everything they depend on.

A file that cannot be read back whole is compiled anew. Nothing is ever out of date: another model, chip,
size of step, fusion or version of the compiler's source is another name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tongyun.chip.ppu.kept import kept
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
    """Where the program of a step is kept; the versions of what traces the model count as well."""
    from importlib.metadata import version

    versions = version("torch"), version("transformers")
    return kept("programs", ".ppu", ppu, sorted(config.items()), sorted(step.items()), versions)
