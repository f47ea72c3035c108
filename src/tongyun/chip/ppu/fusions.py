"""Which operators are made part of their neighbours."""

from __future__ import annotations

from dataclasses import dataclass, fields

from tongyun.errors import InputError, unknown


@dataclass(frozen=True, kw_only=True)
class Fusions:
    """Which operators are made part of their neighbours; each can be switched off alone."""

    norm: bool = True
    """RMSNorm into the products behind it."""
    rotate: bool = True
    """The norm of each head into its rotation."""
    swiglu: bool = True
    """silu(gate) · up into the two products before it."""
    residual: bool = True
    """An addition into the product, or the sum over experts, before it."""

    @classmethod
    def without(cls, *names: str) -> Fusions:
        """All but the named; "all" switches every one off. InputError for a name that is none."""
        known = [item.name for item in fields(cls)]
        for name in names:
            if name not in {*known, "all"}:
                raise InputError(unknown("fusion", name, [*known, "all"]))
        return cls(**{name: name not in names and "all" not in names for name in known})
