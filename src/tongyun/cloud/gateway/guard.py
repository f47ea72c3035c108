"""What every request passes before it reaches a route: its id, its key, its size.

Plain ASGI rather than FastAPI's middleware, which would put a queue between a stream
and its socket.
"""

from __future__ import annotations

import hmac
import re
import time
import uuid
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tongyun.cloud.gateway.faults import Refused, fault_bytes

ARRIVED = "tongyun.arrived_s"
"""Key of a request's scope: when it came, by `time.perf_counter`."""
_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Guard:
    """`x-request-id` on every answer, `Authorization: Bearer` under /v1, a bound on bodies.

    `headers` go with every answer as well.
    """

    def __init__(
        self, app: ASGIApp, *, api_key: str | None, body_bytes: int, headers: Mapping[str, str]
    ) -> None:
        self.app, self.body_bytes = app, body_bytes
        self._always = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Before the body is read and tokenised, which is part of what a client waits for.
        scope[ARRIVED] = time.perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _ID.fullmatch(given) else f"req-{uuid.uuid4().hex}".encode()

        def send_named(message: Message) -> object:
            # Not a coroutine itself: a stream passes here once a token.
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id), *self._always]
            return send(message)

        fault = self._refuse(scope, headers)
        if fault is not None:
            await _answer(fault, send_named)  # type: ignore[arg-type]
            return
        await self.app(scope, self._bounded(receive), send_named)  # type: ignore[arg-type]

    def _refuse(self, scope: Scope, headers: dict[bytes, bytes]) -> Refused | None:
        if self._key is not None and scope["path"].startswith("/v1") and not self._known(headers):
            return Refused(401, "the API key is missing or wrong", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.body_bytes:
            return self._too_long()
        return None

    def _known(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key or b"")

    def _too_long(self) -> Refused:
        return Refused(413, f"the body is longer than {self.body_bytes} bytes", code="body_too_large")

    def _bounded(self, receive: Receive) -> Receive:
        read = 0

        async def receive_bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.body_bytes:
                raise self._too_long()
            return message

        return receive_bounded


async def _answer(fault: Refused, send: Send) -> None:
    body = fault_bytes(fault)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if fault.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if fault.status == 413:
        # The rest of the body is not read, so the connection cannot carry another request.
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": fault.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
