# ruff: noqa: RUF009 - `has` returns dataclasses.field, which is not evaluated per instance
"""What a fleet file's `[drafts]` may say: how many tokens are drafted, and how often one is right."""

from __future__ import annotations

from dataclasses import dataclass

from tongyun.specs.figure import FRACTION, Figure
from tongyun.specs.form import Fact, Whole, has


@dataclass(frozen=True, kw_only=True)
class DraftsSpec:
    """Speculative decoding; the draft module is the model's own, or assumed to be like one."""

    tokens: int = has(Whole())
    """Drafted for each step that verifies them."""
    acceptance: Figure = has(Fact(FRACTION))
    """Probability that a draft is right when those before it were."""
