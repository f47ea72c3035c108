"""Write a spec as TOML that reads back equal, each figure in the unit that is shortest to read.

Writes only what specs hold: tables, texts, numbers and lists. Knows no schema.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tongyun.specs.form import plain_fields
from tongyun.specs.schema import Spec


def dumps(spec: Spec) -> str:
    """The TOML text of a spec; reading it gives an equal spec."""
    return "\n".join(_lines(plain_fields(spec), ())) + "\n"


def save(spec: Spec, path: Path) -> None:
    """Write a spec file in one move: a reader sees the old file or the new one."""
    # Most that read specs write none.
    import tempfile

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(dumps(spec))
        os.replace(temporary, path)  # noqa: PTH105 - both are in one directory, so this is atomic
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    """Values first, then subtables: a TOML value after a subtable would belong to the subtable."""
    lines = [f"{_key(k)} = {_inline(v)}" for k, v in table.items() if not _own_table(v)]
    if path and (lines or not table):
        lines.insert(0, f"[{'.'.join(map(_key, path))}]")
    for key, value in table.items():
        if _own_table(value):
            inner = _lines(value, (*path, key))
            lines += ["", *inner] if inner[0].startswith("[") else inner
    return lines


def _own_table(value: Any) -> bool:
    """A figure (it has a kind) stays on one line; any other table gets its own header."""
    return isinstance(value, Mapping) and "kind" not in value


def _key(key: str) -> str:
    return key if key.isascii() and key.replace("-", "").replace("_", "").isalnum() else json.dumps(key)


def _inline(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_inline(v)}" for k, v in value.items()) + " }"
    rows = [_inline(item) for item in value]
    if value and isinstance(value[0], list):
        return "[\n" + "".join(f"    {row},\n" for row in rows) + "]"
    return "[" + ", ".join(rows) + "]"
