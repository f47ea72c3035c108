"""Files that appear whole, and never in place of others unasked."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tongyun.errors import InputError

SCRIPT_MODE, FILE_MODE = 0o755, 0o644


def write_files(files: Mapping[str, str], folder: Path, *, force: bool) -> list[Path]:
    """Write texts by name, each in one move; where one of them exists, nothing, unless forced."""
    places = [folder / name for name in files]
    taken = [str(place) for place in places if place.exists()]
    if taken and not force:
        raise InputError(f"{', '.join(taken)}: already there; --force replaces")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place, text in zip(places, files.values(), strict=True):
            _write(place, text)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from None
    return places


def _write(place: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(SCRIPT_MODE if place.suffix == ".sh" else FILE_MODE)
        Path(temporary).replace(place)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
