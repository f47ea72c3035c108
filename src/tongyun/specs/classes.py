"""What a fleet file's `[[class]]` and `[migration]` may say: who goes first, and who moves."""

from __future__ import annotations

from dataclasses import dataclass

from tongyun.specs.form import Flag, Number, Text, Whole, has


@dataclass(frozen=True, kw_only=True)
class ClassSpec:
    """A class of service, by the name that requests call it."""

    name: str = has(Text())
    priority: int = has(Number(whole=True, least=-1000, most=1000), default=0)
    """Higher is admitted first and preempted last; requests without a class have 0."""
    ttft_ms: float | None = has(Number(least=1e-3), default=None)
    """Its own limit on the time to first token, by which its goodput is counted; default the run's."""
    tpot_ms: float | None = has(Number(least=1e-3), default=None)
    headroom: float = has(Number(most=0.95), default=0.0)
    """Share of an engine's KV blocks that counts as used where a request of the class is."""


@dataclass(frozen=True, kw_only=True)
class MigrationSpec:
    """When running requests move; the names follow `cloud/sched/migrate.py`."""

    interval_ms: float = has(Number(least=1.0), default=200.0)
    below_steps: float = has(Number(), default=32.0)
    """An engine gives whose blocks last its batch for fewer decode steps than this."""
    above_steps: float = has(Number(), default=128.0)
    """An engine takes whose blocks last for more."""
    stages: int = has(Whole(), default=3)
    """Copies at most while the request decodes on."""
    last_tokens: int = has(Whole(), default=16)
    """So few tokens left to copy end the stages earlier."""
    prompts: bool = has(Flag(), default=False)
    """Whether prompts that wait move, too, among engines that only prefill."""

    def problem(self) -> str | None:
        if self.above_steps < self.below_steps:
            return (
                f"above_steps {self.above_steps:g} is less than below_steps {self.below_steps:g}:"
                " an engine would give and take at once"
            )
        return None
