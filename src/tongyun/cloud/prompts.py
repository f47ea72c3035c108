"""Move prompts that wait between engines that only prefill, to where they are computed sooner.

Such a prompt has no keys and values yet, so that it goes as it is and reserves nothing. At every interval the
last in the queue of the engine with the most to compute goes to the one with the least, as long as the
policy finds it done sooner there; an engine that is given no more requests gives all that wait. One
that fails keeps nobody who has left it; what was on its way to it goes back, if it can.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from tongyun.cloud.front import Front
from tongyun.cloud.instance import Instance, Passage, Torn, lost
from tongyun.cloud.migration import Move
from tongyun.cloud.sched.freeness import Load
from tongyun.cloud.sched.migrate import PromptPolicy
from tongyun.cloud.ticks import Ticks


@dataclass
class _Way:
    """A prompt between two engines."""

    request_id: str
    source: int
    target: int
    tokens: int
    left_s: float
    back: bool = True
    """Whether its source still is what it left, and could have it again."""


class PromptMover:
    """Carries the policy out on the engines behind a front."""

    def __init__(self, front: Front, policy: PromptPolicy, send_s: float) -> None:
        """`send_s`: until a request is at another engine."""
        self.log: list[Move] = []
        self.front, self._policy, self._send_s = front, policy, send_s
        self._ways: dict[str, _Way] = {}
        self._ticks = Ticks(front, policy.interval_s, self._look)

    def strike(self, engines: Collection[int], now_s: float) -> list[tuple[int, Torn]]:
        """These have failed: who was on the way to one goes back, or nowhere if that has failed, too."""
        found = []
        for way in list(self._ways.values()):
            way.back &= way.source not in engines
            if way.target not in engines:
                continue
            passage = self.front.between.pop(way.request_id, None)
            if passage is None:
                self._end(way, "called off", now_s)
            elif way.back:
                self._arrive(way, passage, way.source, "called off")
            else:
                found.append((way.target, lost(passage)))
                self._end(way, "torn", now_s)
        return found

    @property
    def _engines(self) -> list[Instance]:
        return self.front.instances

    def _look(self, now_s: float) -> bool:
        while (pair := self._policy.pair(self._loads(), self._last_tokens)) is not None:
            self._send(*pair, now_s)
        return any(one.in_flight for one in self._engines) or bool(self._ways)

    def _loads(self) -> list[Load]:
        """With what is on its way; from an engine that has failed nothing can be had."""
        coming = Counter[int]()
        for way in self._ways.values():
            coming[way.target] += way.tokens
        return [
            one.load._replace(prompt_tokens=one.prompt_tokens_due + coming[index])
            for index, one in enumerate(self._engines)
        ]

    def _last_tokens(self, index: int) -> int | None:
        one = self._engines[index]
        last = None if one.failed else one.single.scheduler.last()
        return None if last is None else last.tokens

    def _send(self, source: int, target: int, now_s: float) -> None:
        one = self._engines[source]
        last = one.single.scheduler.last()
        assert last is not None
        left_s = max(now_s, one.loop.clock.now())
        way = self._ways[last.id] = _Way(last.id, source, target, last.tokens, left_s)
        for index in (source, target):
            self._engines[index].moves += 1
        self.front.between[last.id] = one.depart(last.id)
        self.front.at(left_s + self._send_s, lambda: self._land(way))

    def _land(self, way: _Way) -> None:
        # It has ended, where its engine failed; another may have begun since.
        if self._ways.get(way.request_id) is not way:
            return
        passage = self.front.between.pop(way.request_id, None)
        if passage is None:
            # Its reader has gone.
            self._end(way, "called off", self.front.now_s)
        else:
            self._arrive(way, passage, way.target, "prompt")

    def _arrive(self, way: _Way, passage: Passage, index: int, outcome: str) -> None:
        self._engines[index].arrive(passage)
        self._end(way, outcome, self._engines[index].loop.clock.now())

    def _end(self, way: _Way, outcome: str, moment_s: float) -> None:
        del self._ways[way.request_id]
        for index in (way.source, way.target):
            one = self._engines[index]
            one.moves -= 1
            one.ended_s = max(one.ended_s, self.front.now_s)
        went_s = max(moment_s - way.left_s, 0.0) if outcome == "prompt" else 0.0
        self.log.append(Move(moment_s, way.request_id, way.source, way.target, outcome, 0, 0, went_s))
