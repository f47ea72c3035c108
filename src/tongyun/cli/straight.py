"""Reads a plain command line without Typer: long flags, each with its value, nothing else.

Importing Typer and what it checks types with takes longer than most plans. Whatever is not
plain (help, an abbreviation, a value that does not look like its type, a flag that is missing)
is left to it, so that it words every error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PLAIN = {int: re.compile(r"\d{1,15}"), float: re.compile(r"\d{1,15}(\.\d{1,15})?")}
PLAN: Mapping[str, tuple[type, Any]] = {
    "model": (str, ...),
    "isl": (int, None),
    "osl": (int, None),
    "chip": (str, None),
    "chips": (int, 1),
    "ttft_ms": (float, None),
    "tpot_ms": (float, None),
    "dtype": (str, None),
    "kv_dtype": (str, None),
    "usd_per_chip_hour": (float, None),
    "json": (bool, False),
    "explain": (bool, False),
    "compare": (str, None),
    "launch": (Path, None),
    "engine": (str, None),
    "checkpoint": (str, None),
    "html": (Path, None),
    "force": (bool, False),
    "rate": (float, None),
    "workload": (str, None),
    "trace": (Path, None),
    "pools": (str, None),
    "prefix_hit": (float, None),
    "draft_tokens": (int, None),
    "acceptance": (float, None),
    "kernels": (str, "modelled"),
    "draft_weights": (str, None),
}
"""The flags of `tongyun plan` in their order, each with its type and default; `...`: has to be given."""


def read(words: Sequence[str], flags: Mapping[str, tuple[type, Any]]) -> dict[str, Any] | None:
    """Every flag's value by its name; None where the words are not plain."""
    names = {f"--{name.replace('_', '-')}": name for name in flags}
    found: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        name = names.get(word)
        if name is None or name in found:
            return None
        kind = flags[name][0]
        found[name] = True if kind is bool else _value(next(rest, ""), kind)
        if found[name] is None:
            return None
    given = {name: found.get(name, default) for name, (_, default) in flags.items()}
    return None if ... in given.values() else given


def _value(word: str, kind: type) -> Any:
    """The word as this type, or None where it is not plainly one."""
    plain = PLAIN.get(kind)
    if not word or word.startswith("-") or (plain is not None and not plain.fullmatch(word)):
        return None
    return kind(word)
