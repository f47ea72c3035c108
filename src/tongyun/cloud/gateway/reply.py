"""Answer one request: submit it, write what comes, and clean up however it ends.

The response owns the sequences from submission to last byte, so a client that hangs up,
a cancelled task and a plain end all pass through the same `finally`.
"""

from __future__ import annotations

import asyncio
import json

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tongyun.cloud.gateway.bridge import Bridge
from tongyun.cloud.gateway.exchange import Choice, Exchange
from tongyun.cloud.gateway.frames import DONE, fault_event, whole, whole_choice
from tongyun.cloud.gateway.meters import Meters

_SSE = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies of the nginx kind would otherwise collect tokens into pages.
    (b"x-accel-buffering", b"no"),
)


class Reply(Response):
    """A generation as an ASGI response, streamed or whole."""

    def __init__(self, exchange: Exchange, bridge: Bridge, meters: Meters) -> None:
        super().__init__()
        self.exchange, self.bridge, self.meters = exchange, bridge, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = self.exchange
        self.bridge.open(exchange)
        watcher = asyncio.ensure_future(_watch(receive, exchange))
        try:
            await (_stream(exchange, send) if exchange.ask.stream else _whole(exchange, send))
        finally:
            watcher.cancel()
            self.bridge.close(exchange)
            self.meters.closed(exchange)


async def _watch(receive: Receive, exchange: Exchange) -> None:
    """Note when the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass
    exchange.hang_up()


async def _whole(exchange: Exchange, send: Send) -> None:
    await exchange.turn()
    if exchange.fault is not None:
        raise exchange.fault
    if exchange.gone:
        return
    ask = exchange.ask
    answer = whole(ask.kind, ask.id, ask.created, ask.model)
    answer["choices"] = [_choice(exchange, choice) for choice in exchange.choices]
    answer["usage"] = exchange.usage()
    body = json.dumps(answer).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _choice(exchange: Exchange, choice: Choice) -> dict[str, object]:
    scores = choice.scores if exchange.ask.sampling.logprobs else None
    return whole_choice(exchange.ask.kind, choice.index, "".join(choice.parts), choice.finish, scores)


async def _stream(exchange: Exchange, send: Send) -> None:
    # The status line waits for the first token: until then a failure can still be told as one.
    out = await exchange.turn()
    if exchange.fault is not None and not out:
        raise exchange.fault
    await send({"type": "http.response.start", "status": 200, "headers": _SSE})
    while not exchange.over:
        await send({"type": "http.response.body", "body": out.encode(), "more_body": True})
        out = await exchange.turn()
    if exchange.gone:
        return
    await send({"type": "http.response.body", "body": (out + _ending(exchange)).encode()})


def _ending(exchange: Exchange) -> str:
    if exchange.fault is not None:
        return fault_event(exchange.fault)
    wanted = exchange.frames is not None and exchange.ask.include_usage
    return (exchange.frames.usage(exchange.usage()) if wanted and exchange.frames else "") + DONE
