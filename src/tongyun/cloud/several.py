"""Fleets that share nothing but the time and the chips' nodes, each for models of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from tongyun.cloud.agenda import Agenda
from tongyun.cloud.front import Front, Fronts
from tongyun.cloud.instance import Torn
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.sched.request import Request
from tongyun.errors import RequestError, unknown


class Several:
    """Fleets by the models that requests name; what happens at a moment happens to all of them."""

    def __init__(self, of: Mapping[str, Fronts]) -> None:
        self._of = dict(of)
        self._fleets = list({id(fleet): fleet for fleet in of.values()}.values())
        self._sent: dict[int, list[str]] = {id(fleet): [] for fleet in self._fleets}
        self._agenda = Agenda()

    @property
    def fronts(self) -> tuple[Front, ...]:
        return tuple(front for fleet in self._fleets for front in fleet.fronts)

    @property
    def in_flight(self) -> int:
        return sum(fleet.in_flight for fleet in self._fleets)

    def at(self, moment_s: float, action: Callable[[], None]) -> None:
        """Have something happen when every fleet has come to `moment_s` (see `Front.at`)."""
        self._agenda.put(moment_s, action)

    def send(self, request: Request) -> None:
        """Give a request, in order of arrival, to its model's fleet; the others stay behind until something
        happens to all."""
        if self._agenda:
            self.advance(request.arrival_s)
        fleet = self._fleet_of(request)
        self._sent[id(fleet)].append(request.id)
        fleet.send(request)

    def check(self, request: Request) -> None:
        """RequestError if its model's fleet could never run it, or there is none."""
        name = request.model or ""
        if name not in self._of:
            raise RequestError(unknown("model", name, self._of), param="model")
        self._of[name].check(request)

    def goes_on(self, request_id: str) -> bool:
        """Whether a request that ends in one pool goes on in another."""
        return any(fleet.goes_on(request_id) for fleet in self._fleets)

    def advance(self, until_s: float) -> None:
        """Every engine to `until_s`, by way of all that happens until then."""
        self._agenda.advance(until_s, self._all_to)

    def next_s(self) -> float | None:
        """When something happens next besides steps; None where nothing does."""
        moments = [self._agenda.next_s, *(fleet.next_s() for fleet in self._fleets)]
        return min((moment_s for moment_s in moments if moment_s is not None), default=None)

    def again(self, request: Request) -> None:
        """Give a request that an engine lost to another of its model's, at this moment."""
        self._fleet_of(request).again(request)

    def lose(self, pool: Front, index: int) -> list[Torn]:
        """Take what is in flight from an engine that failed, and what it was handing over."""
        return self._with(pool).lose(pool, index)

    def whole(self, pool: Front, torn: Torn) -> Torn:
        """What a front has lost, with what others had done for it."""
        return self._with(pool).whole(pool, torn)

    def give_up(self) -> list[Torn]:
        """Take back what is held."""
        return [torn for fleet in self._fleets for torn in fleet.give_up()]

    def abort(self, request_id: str) -> bool:
        """End a request wherever it is; false if it is not in flight."""
        return any(fleet.abort(request_id) for fleet in self._fleets)

    def records(self, _names: Iterable[str]) -> list[RequestRecord]:
        """Of all requests that ended, fleet after fleet."""
        return [record for fleet in self._fleets for record in fleet.records(self._sent[id(fleet)])]

    def forget(self, but: Collection[str]) -> None:
        """Drop what is remembered of requests that have ended, but for these."""
        for fleet in self._fleets:
            fleet.forget(but)
            self._sent[id(fleet)] = [name for name in self._sent[id(fleet)] if name in but]

    def _all_to(self, until_s: float) -> None:
        for fleet in self._fleets:
            fleet.advance(until_s)

    def _with(self, pool: Front) -> Fronts:
        return next(fleet for fleet in self._fleets if pool in fleet.fronts)

    def _fleet_of(self, request: Request) -> Fronts:
        return self._of[request.model or ""]
