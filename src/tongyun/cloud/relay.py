"""A pool that prefills before a pool that decodes: what passes between them, and one record of both."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from heapq import heappop, heappush

from tongyun.cloud.agenda import Agenda
from tongyun.cloud.engine.interface import Engine, Turn
from tongyun.cloud.front import Front, handed
from tongyun.cloud.instance import Simulated, Torn
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.sched.prefix import row
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.router import Router


class Relay:
    """A pool that prefills and a pool that decodes the rest.

    The first token leaves where the prompt was computed; its keys and values are at the
    other engine `hand_over_s` seconds later. Prefill never waits for decoding, so that the
    second pool follows the first: whatever reaches it by a moment has left the first before.
    """

    def __init__(
        self,
        pools: tuple[Iterable[Engine], Iterable[Engine]],
        routers: tuple[Router, Router],
        hand_over_s: Callable[[Request], float],
        *,
        watches: tuple[Callable[[Turn], None] | None, Callable[[Turn], None] | None] = (None, None),
    ) -> None:
        self.first = Front(pools[0], routers[0], watch=watches[0], ended=self._hand_over)
        self.second = Front(pools[1], routers[1], watch=watches[1])
        self._hand_over_s = hand_over_s
        self._whole: dict[str, Request] = {}
        # A heap of what is under way between the pools; the number keeps the order of equal moments.
        self._under_way: list[tuple[float, int, Request]] = []
        self._serial = 0
        # What is to happen to both pools.
        self._agenda = Agenda()

    def at(self, moment_s: float, action: Callable[[], None]) -> None:
        """Have something happen when both pools have come to `moment_s` (see `Front.at`)."""
        self._agenda.put(moment_s, action)

    @property
    def fronts(self) -> tuple[Front, ...]:
        return self.first, self.second

    @property
    def in_flight(self) -> int:
        """Requests in either pool, between them, and held before them."""
        return self.first.in_flight + self.second.in_flight + len(self._under_way)

    def check(self, request: Request) -> None:
        """RequestError where a pool could never run its part."""
        self.first.check(prefill_part(request))
        if request.output_tokens > 1:
            self.second.check(decode_part(request, 0.0))

    def send(self, request: Request) -> None:
        """Give a request, in order of arrival."""
        if self._agenda:
            self.advance(request.arrival_s)
        self._whole[request.id] = request = replace(request, keys={})
        self.first.send(prefill_part(request))
        self._pass_on(request.arrival_s)

    def advance(self, until_s: float) -> None:
        """Both pools to `until_s`, by way of all that happens until then."""
        self._agenda.advance(until_s, self._all_to)

    def _all_to(self, until_s: float) -> None:
        self.first.advance(until_s)
        self._pass_on(until_s)
        self.second.advance(until_s)

    def again(self, request: Request) -> None:
        """Give what is left of a request to the first pool, at this moment."""
        self._whole[request.id] = request = replace(request, keys={})
        self.first.again(prefill_part(request))

    def lose(self, pool: Front, index: int) -> list[Torn]:
        """Take what is in flight from an engine that failed, with what it was handing over."""
        torn = [self.whole(pool, one) for one in pool.tear(index)]
        if pool is self.second:
            return torn
        # Ended there, not yet arrived: keys and values that are gone before they were read.
        sent = {name for name, record in pool.instances[index].records.items() if record is not None}
        # In the order of their moments: a heap's own tells how often somebody has looked.
        under_way = sorted(self._under_way)
        leaving = [request for _, _, request in under_way if request.id in sent]
        self._under_way = [entry for entry in under_way if entry[2].id not in sent]
        leaving += self.second.unhold(lambda request: request.id in sent)
        return torn + [self._from_first(handed(request)) for request in leaving]

    def whole(self, pool: Front, torn: Torn) -> Torn:
        """What a pool has lost, as the request that was sent."""
        if pool is self.second:
            return self._from_first(torn)
        return torn._replace(request=self._whole.pop(torn.request.id))

    def give_up(self) -> list[Torn]:
        """Take back what is held before either pool."""
        first = [handed(self._whole.pop(request.id)) for request in self.first.unhold()]
        return first + [self._from_first(handed(request)) for request in self.second.unhold()]

    def _from_first(self, torn: Torn) -> Torn:
        """What the second pool lost, with what the first had done for it, whose record goes."""
        for one in self.first.instances:
            record = one.records.get(torn.request.id)
            if record is not None:
                del one.records[record.id]
                return Torn(
                    replace(torn.request, arrival_s=record.arrival_s, handed_tokens=0),
                    torn.tokens + record.output_tokens,
                    record.first_token_s,
                    record.cached_tokens,
                    record.prompt_tokens,
                )
        # Who has no use for records forgets those that have ended.
        return torn._replace(request=replace(torn.request, handed_tokens=0))

    def records(self, names: Iterable[str]) -> list[RequestRecord]:
        """Of these requests in their order, those that ended: one record for both pools."""
        return list(joined(names, *self.results()))

    def forget(self, but: Collection[str]) -> None:
        """Drop records of requests that have ended, but for these."""
        for front in self.fronts:
            front.forget(but)

    def abort(self, request_id: str) -> bool:
        """End a request wherever it is; false if it is not in flight."""
        self._whole.pop(request_id, None)
        if self.first.abort(request_id) or self.second.abort(request_id):
            return True
        left = sorted(entry for entry in self._under_way if entry[2].id != request_id)
        gone, self._under_way = len(left) < len(self._under_way), left
        return gone

    def results(self) -> tuple[list[Simulated], list[Simulated]]:
        """What happened in each pool."""
        first, second = ([one.result() for one in front.instances] for front in (self.first, self.second))
        return first, second

    def goes_on(self, request_id: str) -> bool:
        """Whether a request that the first pool has needs the second."""
        request = self._whole.get(request_id)
        return request is not None and request.output_tokens > 1

    def next_s(self) -> float | None:
        """When the next request reaches the second pool or something else happens; None if neither is due."""
        moments = [entry[0] for entry in self._under_way[:1]]
        moments += [
            one for one in (self._agenda.next_s, self.first.next_s(), self.second.next_s()) if one is not None
        ]
        return min(moments, default=None)

    def _hand_over(self, record: RequestRecord) -> None:
        request = self._whole.pop(record.id, None)
        if request is not None and record.ok and request.output_tokens > 1:
            moment_s = record.ended_s + self._hand_over_s(request)
            self._serial += 1
            heappush(self._under_way, (moment_s, self._serial, decode_part(request, moment_s)))

    def _pass_on(self, until_s: float) -> None:
        while self._under_way and self._under_way[0][0] <= until_s:
            self.second.send(heappop(self._under_way)[2])


def joined(
    names: Iterable[str], first: Iterable[Simulated], second: Iterable[Simulated]
) -> tuple[RequestRecord, ...]:
    """A record for each of these requests that ended, from those of both pools."""
    prefilled = {record.id: record for one in first for record in one.records}
    decoded = {record.id: record for one in second for record in one.records}
    return tuple(_joined(prefilled[name], decoded.get(name)) for name in names if name in prefilled)


def prefill_part(request: Request) -> Request:
    """What the first pool does: the prompt and the token it yields."""
    return replace(request, output_tokens=1)


def decode_part(request: Request, arrival_s: float) -> Request:
    """What the second pool does from when the prompt's keys and values have come: all but the first token."""
    prompt = row(request.prompt)
    # The first token: made up as the others are.
    prompt.append(prompt[-1])
    return replace(
        request,
        prompt=prompt,
        output_tokens=request.output_tokens - 1,
        arrival_s=arrival_s,
        handed_tokens=len(request.prompt),
        keys=None if request.keys is None else {size: keys[:] for size, keys in request.keys.items()},
    )


def _joined(first: RequestRecord, rest: RequestRecord | None) -> RequestRecord:
    """One request's record from those of both pools; the end of the second decides."""
    if rest is None:
        return first
    return replace(
        first,
        ended_s=rest.ended_s,
        last_token_s=rest.last_token_s,
        output_tokens=first.output_tokens + rest.output_tokens,
        finish=rest.finish,
        error=rest.error,
    )
