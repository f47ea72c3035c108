"""YAML of nested objects and lists in block style; texts are quoted, so that none turns into a number."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Object = dict[str, Any]


def to_yaml(value: Object) -> str:
    return "".join(f"{line}\n" for line in _block(value))


def _block(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [line for key, item in value.items() for line in _entry(f"{key}:", item)]
    return [line for item in value for line in _item(item)]


def _entry(head: str, item: Any) -> list[str]:
    if not _nested(item):
        return [f"{head} {_scalar(item)}"]
    return [head, *(f"  {line}" for line in _block(item))]


def _item(item: Any) -> list[str]:
    if not _nested(item):
        return [f"- {_scalar(item)}"]
    first, *rest = _block(item)
    return [f"- {first}", *(f"  {line}" for line in rest)]


def _nested(item: Any) -> bool:
    return isinstance(item, Mapping | list | tuple) and bool(item)


def _scalar(item: Any) -> str:
    return json.dumps(item, ensure_ascii=False)
