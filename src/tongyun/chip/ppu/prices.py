"""Analytic prices of kernels, each size once: in memory, and on disk under a name of chip and compiler.

Nothing kept is ever out of date: another figure of the chip or another line of the compiler is another
file. A line that cannot be read back is priced anew.
"""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from pathlib import Path

from tongyun.chip.ppu.analytic import analyse
from tongyun.chip.ppu.kept import kept
from tongyun.chip.ppu.pieces import Piece, written
from tongyun.specs.ppu import Ppu

EVERY_S = 1.0
"""Seconds of pricing that a run that is broken off may lose."""


class Prices:
    """Seconds of one kernel alone on a chip, a cold L2 before it."""

    def __init__(self, ppu: Ppu) -> None:
        self._ppu = ppu
        self._path = prices_path(ppu)
        self._known = _read(self._path)
        self._fresh, self._kept = 0, time.monotonic()

    def seconds(self, piece: Piece) -> float:
        """The analytic price of the kernel's words, barrier included; Infeasible where it has no program."""
        found = self._known.get(piece.key)
        if found is None:
            program, symbols = written(piece, self._ppu)
            found = self._known[piece.key] = analyse(program, self._ppu, symbols).seconds
            self._fresh += 1
        return found

    def keep(self) -> None:
        """Write what was priced since, now and then; `close` writes the rest."""
        if self._fresh and time.monotonic() - self._kept > EVERY_S:
            self.close()

    def close(self) -> None:
        if not self._fresh:
            return
        self._known = {**_read(self._path), **self._known}
        lines = "".join(f"{seconds!r}\t{key}\n" for key, seconds in sorted(self._known.items()))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(f".{secrets.token_hex(4)}")
        fresh.write_text(lines, encoding="utf-8")
        fresh.replace(self._path)
        self._fresh, self._kept = 0, time.monotonic()


def prices_path(ppu: Ppu) -> Path:
    """Where a chip's prices are kept."""
    return kept("prices", ".tsv", ppu)


def _read(path: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    with suppress(OSError, UnicodeDecodeError):
        for line in path.read_text(encoding="utf-8").splitlines():
            seconds, _, key = line.partition("\t")
            with suppress(ValueError):
                found[key] = float(seconds)
    return found
