"""Whose turn it is where several models share one instance, and how long a turn lasts.

The idea is Aegaeon's (Xiang et al., SOSP 2025): an instance goes from model to model between
two tokens. What decodes gets weighted rounds, in which every model earns its requests more
tokens than they may miss until its next turn; what prefills goes first come, first served in
small groups of one model. Policies know how many requests each model has, and are told the
time; they know no memory, no clock and no price.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

MOST_TURN_S = 4.0
"""The longest turn while others wait (Aegaeon's `max_batch_quota`; see `quotas_s`)."""
SLACK = 0.5
"""A round lasts at most this share of the time for which its tokens last, if that can be had (Aegaeon's)."""
GROUP_REQUESTS = 8
"""Prompts of one model that go before the next model's (Aegaeon's `max_group_size`)."""


class Work(NamedTuple):
    """What a model with requests in flight asks of a round."""

    step_s: float
    """Seconds of a step in which all of its requests decode."""
    limit_s: float
    """The most mean time between tokens."""
    switch_s: float
    """Seconds until it can run once it is its turn."""


class Turn(NamedTuple):
    """A model has the instance until the first step that ends at `end_s` or later."""

    model: str
    end_s: float


class Turns(Protocol):
    """Chooses the model that runs next, among those with requests in flight."""

    def arrived(self, model: str, due_s: float) -> None:
        """One more request in flight; its first token is due."""

    def begun(self, model: str) -> None:
        """The first token of the model's oldest request without one is there."""

    def left(self, model: str) -> None:
        """One fewer in flight."""

    def choose(self, now_s: float, work: Callable[[str], Work]) -> Turn | None:
        """The turn that goes on or begins now; None where no request is in flight."""

    def extend(self, seconds: float) -> None:
        """Time of this turn that does not count: switching, and prompts."""

    @property
    def order(self) -> tuple[str, ...]:
        """Models with requests in flight, the soonest first, from the one whose turn it is."""


class Rounds:
    """One model after the other, each for as long as keeps its time between tokens.

    A model whose turn ends with requests left goes behind all others; one that gets its
    first request does too. Alone, it goes on. One whose prompt is about to be late goes
    first, and who was at work goes on behind it.
    """

    def __init__(self, most_s: float = MOST_TURN_S) -> None:
        self._most_s = most_s
        # Requests in flight, in the order of turns.
        self._queue: dict[str, int] = {}
        # When their first tokens are due, of those without one.
        self._due_s: dict[str, deque[float]] = {}
        self._turn: Turn | None = None

    def arrived(self, model: str, due_s: float) -> None:
        self._queue[model] = self._queue.get(model, 0) + 1
        if due_s < float("inf"):
            self._due_s.setdefault(model, deque()).append(due_s)

    def begun(self, model: str) -> None:
        due_s = self._due_s.get(model)
        if due_s:
            due_s.popleft()
            if not due_s:
                del self._due_s[model]

    def left(self, model: str) -> None:
        self._queue[model] -= 1
        if not self._queue[model]:
            del self._queue[model]
            self._due_s.pop(model, None)
            if self._turn is not None and self._turn.model == model:
                self._turn = None

    def choose(self, now_s: float, work: Callable[[str], Work]) -> Turn | None:
        queue, turn = self._queue, self._turn
        alone = len(queue) == 1
        late = self._late(now_s)
        if turn is not None and now_s >= turn.end_s:
            # It had its time; what is left of it goes behind the others, late or not.
            queue[turn.model] = queue.pop(turn.model)
            late = self._late(now_s, but=turn.model)
        elif turn is not None and late in (None, turn.model) and (alone or turn.end_s < float("inf")):
            return self._until_due(turn)
        if late is not None:
            self._queue = queue = {late: queue.pop(late), **queue}
        model = next(iter(queue), None)
        if model is None:
            return None
        end_s = float("inf") if alone else now_s + self._quota_s(model, work)
        self._turn = Turn(model, end_s)
        return self._until_due(self._turn)

    def _until_due(self, turn: Turn) -> Turn:
        """What is left of a turn before another model's prompt is due."""
        dues_s = [due_s[0] for model, due_s in self._due_s.items() if model != turn.model]
        return Turn(turn.model, min(turn.end_s, *dues_s)) if dues_s else turn

    def _late(self, now_s: float, *, but: str | None = None) -> str | None:
        """The model, `but` for one, whose oldest prompt has been due for longest, if any is."""
        late = [(dues_s[0], name) for name, dues_s in self._due_s.items() if name != but]
        due_s, model = min(late, default=(float("inf"), None))
        return model if due_s <= now_s else None

    def extend(self, seconds: float) -> None:
        if self._turn is not None:
            self._turn = Turn(self._turn.model, self._turn.end_s + seconds)

    @property
    def order(self) -> tuple[str, ...]:
        return tuple(self._queue)

    def _quota_s(self, model: str, work: Callable[[str], Work]) -> float:
        works = {name: work(name) for name in self._queue}
        return quotas_s(works.values(), self._most_s)[list(works).index(model)]


def quotas_s(works: Iterable[Work], most_s: float = MOST_TURN_S) -> list[float]:
    """Seconds of each model's turn in a round, as Aegaeon gives them in its decoding rounds.

    Formula, `SLACK` and `MOST_TURN_S` are those of `_assign_quota` in a public copy of its code
    (github.com/Zyyeric/Aegaeon at 6409f04, aegaeon/aegaeon/decode_scheduler.py). Two things differ:
    there c is a whole load of every model's weights, here the bytes that are missing; and there a
    model may have several batches, each with a quota, and a turn lasts one step at least.

    With n = limit / step tokens' time earned a second, load = Σ 1/n, c = Σ switch:
    q = c / (n · (α − load)), so that a round of c + Σ q = c · α / (α − load) earns each model
    1/α of itself. α is `SLACK`, or as much more as keeps every q within `most_s`; above 1 the
    limits cannot be kept. A turn is no shorter than the time of one token.
    """
    given = list(works)
    earned = [one.limit_s / one.step_s for one in given]
    load, switch_s = sum(1 / n for n in earned), sum(one.switch_s for one in given)
    if not switch_s:
        return [one.limit_s for one in given]
    share = max(switch_s / (min(earned) * most_s) + load, SLACK)
    return [max(switch_s / (n * (share - load)), one.limit_s) for n, one in zip(earned, given, strict=True)]


class Groups:
    """Prompts first come, first served, but for those that join an earlier group of their model."""

    def __init__(self, most: int = GROUP_REQUESTS) -> None:
        self._most = most
        # Model, requests that are left, and how many have ever joined.
        self._groups: list[tuple[str, int, int]] = []

    def arrived(self, model: str, due_s: float) -> None:
        for index, (name, left, joined) in enumerate(self._groups):
            if name == model and joined < self._most:
                self._groups[index] = name, left + 1, joined + 1
                return
        self._groups.append((model, 1, 1))

    def begun(self, model: str) -> None:
        """Whose first token is there is over."""

    def left(self, model: str) -> None:
        index = next(i for i, group in enumerate(self._groups) if group[0] == model)
        name, left, joined = self._groups[index]
        if left == 1:
            del self._groups[index]
        else:
            self._groups[index] = name, left - 1, joined

    def choose(self, now_s: float, work: Callable[[str], Work]) -> Turn | None:
        return Turn(self._groups[0][0], float("inf")) if self._groups else None

    def extend(self, seconds: float) -> None:
        """A turn is as long as its group."""

    @property
    def order(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name, _, _ in self._groups))
