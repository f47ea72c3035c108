"""What a program may not do."""

from __future__ import annotations

from tongyun.errors import TongyunError


class Fault(TongyunError):
    """A program did what the chip forbids: `kernel, core, instruction: what`."""
