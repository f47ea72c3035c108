"""One figure for two files: `same_as = "chips/zhenwu-810e#memory.bandwidth"` stands for the figure there.

A chip and its inside are two views of one thing. What nobody published is assumed once, in one of them, and
the other names it, so that they cannot drift apart. Knows TOML tables, no schema.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tongyun.errors import unknown
from tongyun.specs.form import Where, shown

KEY = "same_as"
Read = Callable[[str, str, Where], Mapping[str, Any]]
"""The raw table of a catalogue file, by its kind and name."""


def followed(raw: Mapping[str, Any], read: Read, where: Where) -> dict[str, Any]:
    """`raw` with every figure that names another file's in place of its name."""
    found = {}
    for key, value in raw.items():
        inner = where / key
        if isinstance(value, dict):
            found[key] = _named(value, read, inner) if KEY in value else followed(value, read, inner)
        else:
            found[key] = value
    return found


def _named(value: Mapping[str, Any], read: Read, where: Where) -> Any:
    place = value[KEY]
    if len(value) > 1:
        raise where.wrong(
            f"a figure that is the {KEY} of another says nothing else, this one also {_rest(value)}"
        )
    file, _, key = place.partition("#") if isinstance(place, str) else ("", "", "")
    kind, _, name = file.partition("/")
    if not (kind and name and key):
        raise (where / KEY).wrong(
            f'expected "kind/name#key", as "chips/a100#memory.bandwidth", got {shown(place)}'
        )
    at: Any = read(kind, name, where / KEY)
    for step in key.split("."):
        if not isinstance(at, dict) or step not in at:
            near = at if isinstance(at, dict) else ()
            raise (where / KEY).wrong(f"{file}: " + unknown("key", step, near))
        at = at[step]
    if not isinstance(at, dict) or KEY in at:
        raise (where / KEY).wrong(f"{file}: {key} is no figure with a number of its own")
    return at


def _rest(value: Mapping[str, Any]) -> str:
    return ", ".join(key for key in value if key != KEY)
