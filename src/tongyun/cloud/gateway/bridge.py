"""Carry tokens from the engine's thread to the requests that wait for them.

The engine reports a step at a time and so does this: one `call_soon_threadsafe` a step,
however many sequences it moved. Nothing in here runs per token but `_deliver`'s loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from tongyun.cloud.engine.protocol import EngineStats, TokenEvent
from tongyun.cloud.gateway.exchange import Choice, Exchange
from tongyun.cloud.gateway.faults import Refused
from tongyun.cloud.gateway.ports import Engine, StartEngine
from tongyun.cloud.sched.request import Request
from tongyun.errors import RequestError, ServiceError


class Bridge:
    """The gateway's side of an engine. Everything but `_from_engine` runs on the event loop."""

    def __init__(self, start: StartEngine) -> None:
        self._loop = asyncio.get_running_loop()
        self._live: dict[str, tuple[Exchange, Choice]] = {}
        self._engine: Engine = start(self._from_engine)
        self.draining = False

    def _from_engine(self, events: Sequence[TokenEvent]) -> None:
        self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        now_s = time.perf_counter()
        live = self._live
        for event in events:
            seat = live.get(event.request_id)
            # A sequence we ended (stop string, hang-up) may have had a token under way.
            if seat is None:
                continue
            exchange, choice = seat
            if exchange.accept(choice, event, now_s):
                del live[event.request_id]
                if event.finish is None:
                    self._engine.abort(event.request_id)

    def open(self, exchange: Exchange) -> None:
        """Give every sequence of a request to the engine, or none of them."""
        if self.draining:
            raise Refused(503, "the server is shutting down", code="server_draining")
        try:
            for choice in exchange.choices:
                self._live[choice.id] = (exchange, choice)
                self._engine.submit(_request(exchange, choice))
        except RequestError:
            self.close(exchange)
            raise
        except ServiceError as error:
            self.close(exchange)
            raise Refused(503, str(error), code="engine_unavailable") from error

    def close(self, exchange: Exchange) -> None:
        """Take a request out, and abort what of it still runs; ended ones are left alone."""
        for choice in exchange.choices:
            if self._live.pop(choice.id, None) is not None:
                self._engine.abort(choice.id)

    def fail_all(self, fault: RequestError) -> None:
        """End every request in flight with one error."""
        for exchange, _ in list(self._live.values()):
            exchange.fail(fault)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    @property
    def in_flight(self) -> int:
        return len(self._live)

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine; `None` while it lives."""
        return self._engine.failure

    def stop(self) -> None:
        """End the engine; blocks until its thread is gone."""
        self._engine.close()


def _request(exchange: Exchange, choice: Choice) -> Request:
    ask, at = exchange.ask, exchange.prompt_of(choice)
    return Request(
        id=choice.id,
        prompt=ask.prompts[at],
        output_tokens=ask.output_tokens[at],
        arrival_s=exchange.arrived_s,
        sampling=ask.sampling_of(choice.index),
        ignore_eos=ask.ignore_eos,
        stop_token_ids=ask.stop_token_ids,
        priority=ask.priority,
        priority_class=ask.priority_class,
        model=ask.model,
    )
