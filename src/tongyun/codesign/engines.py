"""How a serving engine runs its steps: what its documentation says, and what it takes around the kernels.

An engine here is two facts and five times. Facts are its defaults as documented; times
were fitted once for an engine, on measured rows, and never for a model or a
row. Kernels are not here but in `chip/silicon.toml`.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from importlib.resources import files

from tongyun.errors import InputError, unknown


class Prompts(Enum):
    """How an engine lets prompts share its steps."""

    MIXED = "mixed"
    """A step decodes every sequence and prefills what its budget leaves, in chunks."""
    WHOLE = "whole"
    """The same, but a prompt is never cut."""
    FIRST = "first"
    """Prompts go first, without decoding, until none waits."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine's way with prompts, and its times beside those of kernels."""

    prompts: Prompts
    plans_ahead: bool
    """The next step is made up while the last one runs, so that a request that comes meanwhile misses it."""
    step_s: float = 0.0
    """What a step takes beyond its kernels."""
    sequence_s: float = 0.0
    """And for each sequence in it: sampling, bookkeeping."""
    prompt_layer_s: float = 0.0
    """Least time of a step with prompts for each layer: kernels started one by one, not as a graph."""
    request_s: float = 0.0
    """What the front end, one process, takes for a request on its way in."""
    token_s: float = 0.0
    """And for a token on its way out."""


@lru_cache(maxsize=1)
def engines() -> dict[str, Engine]:
    """The engines of `engines.toml` by name."""
    read = tomllib.loads(files("tongyun.codesign").joinpath("engines.toml").read_text(encoding="utf-8"))
    return {
        name: Engine(**{**values, "prompts": Prompts(values["prompts"])}) for name, values in read.items()
    }


def engine(name: str) -> Engine:
    """An engine by name; `any` takes nothing around its kernels."""
    found = engines()
    if name not in found:
        raise InputError(unknown("engine", name, found))
    return found[name]
