"""Where a model is: a directory, one that comes with Tongyun, or the hub."""

from __future__ import annotations

from pathlib import Path

from tongyun.errors import InputError
from tongyun.model.bundled import bundled_models


def find_model(model: str) -> Path:
    """The directory of a model: as given, one that comes with Tongyun, or downloaded from the hub."""
    directory, bundled = Path(model).expanduser(), bundled_models()
    if directory.is_dir():
        return directory
    if model in bundled:
        return bundled[model]
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        inside = f"comes with Tongyun: {', '.join(bundled) or 'none'}"
        raise InputError(f"{model}: no such directory (and not a hub id of the form owner/name; {inside})")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{model}: no such directory, and the hub did not give it: {first}") from None
    return Path(found)
