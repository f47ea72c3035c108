"""What becomes of requests whose engine failed: tried again so many times, or lost.

A request that is tried again goes on from what was streamed, which becomes part of its
prompt: its reader has those tokens already, and they are neither sent nor counted twice.
Its waiting counts from its first arrival. Knows no reason for a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

from tongyun.cloud.front import Fronts
from tongyun.cloud.instance import Torn
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.replica import Replica
from tongyun.cloud.sched.request import Finish, Request

LOST = "lost: "
"""How the reason of a request begins that was lost."""


@dataclass(slots=True)
class _Story:
    """What a request that was torn from an engine felt so far."""

    prompt_tokens: int
    tokens: int = 0
    first_s: float | None = None
    cached_tokens: int = 0
    tries: int = 0
    torn_s: float = 0.0
    """When it was last."""


class Retries:
    """Requests torn from engines of one fleet, each sent again at most `most` times."""

    def __init__(
        self, fleet: Fronts, most: int, *, told: Callable[[RequestRecord], None] | None = None
    ) -> None:
        """`told` hears of every request that is lost, when it is."""
        self._fleet, self._most, self._told = fleet, most, told
        self._stories: dict[str, _Story] = {}
        self.lost: dict[str, RequestRecord] = {}
        self.retries = 0
        """Times that requests were sent again."""

    @property
    def retried(self) -> int:
        """Requests that were sent again at least once."""
        return sum(story.tries > 0 for story in self._stories.values())

    def tear(self, replica: Replica, engine: int, moment_s: float) -> None:
        """One of its engines has lost what it had: each request is sent again, or lost."""
        self.judge(self._fleet.lose(replica.pool, engine), replica.name, moment_s)

    def judge(self, torn: Iterable[Torn], name: str, moment_s: float) -> None:
        """Send each of these again, which a replica of that name has lost, or lose it."""
        for one in torn:
            story = self._note(one)
            story.torn_s = moment_s
            if story.tries < self._most:
                story.tries += 1
                self.retries += 1
                self._fleet.again(one.request)
            else:
                why = f" after {story.tries} retries" if story.tries else ""
                self._lose(one.request, story, moment_s, f"{name} failed{why}")

    def give_up(self, moment_s: float) -> None:
        """What is held now is lost: no engine will be up any more."""
        for one in self._fleet.give_up():
            story = self._note(one)
            ended_s = max(moment_s, one.request.arrival_s, story.torn_s)
            self._lose(one.request, story, ended_s, "no instance came up again")

    def forget(self, but: Collection[str]) -> None:
        """Drop what requests felt that are not among these."""
        self._stories = {name: story for name, story in self._stories.items() if name in but}
        self.lost = {name: record for name, record in self.lost.items() if name in but}

    def whole(self, records: Iterable[RequestRecord]) -> list[RequestRecord]:
        """Records of how requests ended, with what they felt before they were torn."""
        stories = self._stories
        if not stories:
            return list(records)
        return [_told(record, stories[record.id]) if record.id in stories else record for record in records]

    def _note(self, torn: Torn) -> _Story:
        story = self._stories.setdefault(torn.request.id, _Story(torn.prompt_tokens))
        story.tokens += torn.tokens
        if story.first_s is None and torn.first_s is not None:
            story.first_s, story.cached_tokens = torn.first_s, torn.cached_tokens
        return story

    def _lose(self, request: Request, story: _Story, moment_s: float, why: str) -> None:
        record = self.lost[request.id] = RequestRecord(
            id=request.id,
            arrival_s=request.arrival_s,
            ended_s=moment_s,
            prompt_tokens=story.prompt_tokens,
            output_tokens=story.tokens,
            first_token_s=story.first_s,
            last_token_s=None if story.first_s is None else moment_s,
            cached_tokens=story.cached_tokens,
            finish=Finish.ERROR,
            error=LOST + why,
            model=request.model,
            priority_class=request.priority_class,
        )
        if self._told is not None:
            self._told(record)


def _told(record: RequestRecord, story: _Story) -> RequestRecord:
    """The end of a request, with its beginning."""
    begun = story.first_s is not None
    return replace(
        record,
        prompt_tokens=story.prompt_tokens,
        output_tokens=story.tokens + record.output_tokens,
        first_token_s=story.first_s if begun else record.first_token_s,
        last_token_s=record.last_token_s if record.last_token_s is not None or not begun else record.ended_s,
        cached_tokens=story.cached_tokens if begun else record.cached_tokens,
    )
