"""How many tokens a decoding sequence knows after so many steps, and after how many steps it knows so many.

Without drafts it gains one a step, and a number says it all. With drafts a step also gives those that
are right, and the sequence follows a path: the tokens known before each of its steps, which whoever
draws them can tell beforehand. Knows no block and no price.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.sequence import Sequence

Tokens = NDArray[np.int64]


class Paths(Protocol):
    def __call__(self, request: Request, known: int, drafts: int, /) -> Tokens:
        """Tokens known before each step from `known` on, so many drafts verified in each; the limit last."""


class Progress(Protocol):
    """Of sequences that decode together, from the step they join with to the one they end with."""

    def join(self, seq: Sequence, step: int) -> None:
        """`seq`, whose fields are true, decodes from this step on."""

    def leave(self, seq: Sequence) -> None:
        """The step before was its last."""

    def known(self, seq: Sequence, step: int) -> int:
        """Tokens it knows when the step begins."""

    def reaches(self, seq: Sequence, tokens: int) -> int:
        """The first step that it begins with so many known; past its last where it never does."""

    def context_tokens(self, step: int, count: int) -> int:
        """Tokens that all `count` of them have computed when the step begins."""

    def contexts(self, step: int, steps: int, count: int) -> Tokens:
        """The same of so many steps in a row, in which nobody joins or leaves, [steps]."""

    def gained(self, step: int, steps: int, count: int) -> int:
        """Tokens that they produce in these steps."""


class Even:
    """One token a step: before step s a sequence knows `offset` + s."""

    def __init__(self) -> None:
        self._offsets = 0

    def join(self, seq: Sequence, step: int) -> None:
        seq.offset = offset = len(seq.history) - step
        self._offsets += offset

    def leave(self, seq: Sequence) -> None:
        self._offsets -= seq.offset

    def known(self, seq: Sequence, step: int) -> int:
        return seq.offset + step

    def reaches(self, seq: Sequence, tokens: int) -> int:
        return tokens - seq.offset

    def context_tokens(self, step: int, count: int) -> int:
        return self._offsets + count * (step - 1)

    def contexts(self, step: int, steps: int, count: int) -> Tokens:
        return self.context_tokens(step, count) + count * np.arange(steps)

    def gained(self, step: int, steps: int, count: int) -> int:
        return count * steps


class Drafted:
    """Paths: before step s a sequence knows `path[offset + s]`. Sums over all of them are kept by step."""

    def __init__(self, paths: Paths, drafts: int) -> None:
        self._paths, self._drafts = paths, drafts
        # Of the steps from the first on: what is known before each, and what each yields.
        self._first = 0
        self._known = np.zeros(1024, dtype=np.int64)
        self._gained = np.zeros(1024, dtype=np.int64)

    def join(self, seq: Sequence, step: int) -> None:
        path, known = seq.path, len(seq.history)
        place = 0 if path is None else int(path.searchsorted(known))
        if path is None or place == len(path) or path[place] != known:
            # A prompt's step verifies nothing, so that whoever was preempted goes on by other places.
            path, place = self._paths(seq.request, known, self._drafts), 0
            seq.path = path
        seq.offset = place - step
        left = path[place:]
        self._keep(step, step + len(left) - 1)
        at = slice(step - self._first, step - self._first + len(left) - 1)
        self._known[at] += left[:-1]
        self._gained[at] += left[1:] - left[:-1]

    def leave(self, seq: Sequence) -> None:
        """Nothing: no sum has anything of it after its last step."""

    def known(self, seq: Sequence, step: int) -> int:
        assert seq.path is not None
        return seq.path.item(seq.offset + step)

    def reaches(self, seq: Sequence, tokens: int) -> int:
        assert seq.path is not None
        return int(seq.path.searchsorted(tokens)) - seq.offset

    def context_tokens(self, step: int, count: int) -> int:
        return self._known.item(step - self._first) - count if count else 0

    def contexts(self, step: int, steps: int, count: int) -> Tokens:
        at = step - self._first
        return self._known[at : at + steps] - count

    def gained(self, step: int, steps: int, count: int) -> int:
        at = step - self._first
        return int(self._gained[at : at + steps].sum())

    def _keep(self, step: int, past: int) -> None:
        """Have sums of the steps from `step` to before `past`; earlier ones may go."""
        if past - self._first <= len(self._known):
            return
        held, size = step - self._first, max(2 * (past - step), len(self._known))
        for name in ("_known", "_gained"):
            rest = getattr(self, name)[held:]
            setattr(self, name, np.concatenate((rest, np.zeros(size - len(rest), dtype=np.int64))))
        self._first = step
