"""The models that come with Tongyun, by name.

Each is a directory in the hub's layout beside this file. Knows nothing of how it was
trained: that is in `recipes/` and docs/model-card.md.
"""

from __future__ import annotations

from pathlib import Path

DEFAULT = "stdlib-moe"


def bundled_models() -> dict[str, Path]:
    """Name and directory of every model that is part of the package."""
    return {file.parent.name: file.parent for file in sorted(Path(__file__).parent.glob("*/config.json"))}
