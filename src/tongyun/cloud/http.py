"""POST and GET over asyncio, with the moment at which every piece of an answer arrived.

A load generator shares its machine with the server it measures, so a streamed token may
cost it microseconds only: pieces are stamped and kept as they come, and read when the
answer is whole. Knows no SSE and no JSON; one request at a time on a connection.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tongyun.errors import InputError, ServiceError


class ConnectionLost(ServiceError):
    """The other side closed before its answer was whole; `begun` says whether any of it came."""

    def __init__(self, message: str, *, begun: bool) -> None:
        super().__init__(message)
        self.begun = begun


@dataclass(slots=True)
class Answer:
    """One response. `pieces` are (moment, bytes) in order of arrival, chunk framing removed."""

    status: int
    headers: dict[str, str]
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.pieces)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Scheme, host, port and path of an endpoint's root, `http://127.0.0.1:8000/v1` for one."""

    host: str
    port: int
    path: str
    tls: bool

    @classmethod
    def parse(cls, url: str) -> Origin:
        """Read `http(s)://host[:port][/v1]`; the root of the API is /v1 where no path is given."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query:
            raise InputError(f"--url '{url}': expected http://HOST:PORT or https://HOST[:PORT]/v1")
        tls = parts.scheme == "https"
        path = parts.path.rstrip("/") or "/v1"
        return cls(host=parts.hostname, port=port or (443 if tls else 80), path=path, tls=tls)

    def head(self, method: str, path: str, headers: Mapping[str, str], length: int) -> bytes:
        """The bytes before the body."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"{method} {self.path}{path} HTTP/1.1",
            f"host: {host}:{self.port}",
            f"content-length: {length}",
        ]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


class Client:
    """Connections to one origin, kept open between requests and never shared by two."""

    def __init__(self, origin: Origin, headers: Mapping[str, str]) -> None:
        self.origin, self._headers = origin, dict(headers)
        self._idle: list[_Connection] = []

    async def send(self, method: str, path: str, body: bytes = b"") -> Answer:
        """One request. A kept connection that turns out closed is replaced once, as nothing was answered."""
        payload = self.origin.head(method, path, self._headers, len(body)) + body
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                try:
                    return await self._through(connection, payload)
                except ConnectionLost as error:
                    if error.begun:
                        raise
                break
        return await self._through(await self._open(), payload)

    async def _through(self, connection: _Connection, payload: bytes) -> Answer:
        try:
            answer = await connection.exchange(payload)
        except BaseException:
            connection.close()
            raise
        if connection.usable:
            self._idle.append(connection)
        return answer

    async def _open(self) -> _Connection:
        context = ssl.create_default_context() if self.origin.tls else None
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                _Connection, self.origin.host, self.origin.port, ssl=context
            )
        except OSError as error:
            where = f"{self.origin.host}:{self.origin.port}"
            raise ServiceError(f"cannot connect to {where}: {error.strerror or error}") from None
        return connection

    async def close(self) -> None:
        """Close what is kept; the transports end on the loop's next turn."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()
        await asyncio.sleep(0)


class _Connection(asyncio.Protocol):
    """An HTTP/1.1 connection, parsed as far as answers of an API need."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._answer: Answer | None = None
        self._waiter: asyncio.Future[Answer] | None = None
        self._left: int | None = None
        """Bytes of the body still to come; `None` when chunked or until the end of the connection."""
        self._chunked = False
        self._keep = True

    @property
    def usable(self) -> bool:
        return self._keep and self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        self._keep = False
        if self._transport is not None:
            self._transport.close()

    async def exchange(self, payload: bytes) -> Answer:
        """Write a request and wait for the end of its answer."""
        assert self._transport is not None
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(payload)
        return await self._waiter

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._keep = False
        if self._answer is not None and not self._chunked and self._left is None:
            self._finish()
        elif self._waiter is not None and not self._waiter.done():
            begun = self._answer is not None
            what = "closed the connection in the middle of its answer" if begun else "closed the connection"
            self._waiter.set_exception(ConnectionLost(f"the server {what}", begun=begun))

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        if self._rest:
            data = self._rest + data
        if self._answer is None:
            at = data.find(b"\r\n\r\n")
            if at < 0:
                self._rest = data
                return
            if not self._begin(data[:at]):
                return
            data = data[at + 4 :]
        self._rest = b""
        if self._chunked:
            self._chunks(data, now_s)
        elif data or self._left == 0:
            self._plain(data, now_s)

    def _begin(self, head: bytes) -> bool:
        """Read the status line and headers; false, and the request fails, where they are not HTTP."""
        first, *lines = head.decode("latin-1").split("\r\n")
        words = first.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
            self._fail("the server does not speak HTTP/1.1")
            return False
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        self._answer = Answer(int(words[1]), headers)
        self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        length = headers.get("content-length", "")
        self._left = int(length) if length.isdigit() else None
        if headers.get("connection", "").lower() == "close" or words[0] == "HTTP/1.0":
            self._keep = False
        return True

    def _plain(self, data: bytes, now_s: float) -> None:
        assert self._answer is not None
        self._answer.pieces.append((now_s, data))
        if self._left is not None:
            self._left -= len(data)
            if self._left <= 0:
                self._finish()

    def _chunks(self, data: bytes, now_s: float) -> None:
        """Take every whole chunk off `data`; what is left waits for more."""
        assert self._answer is not None
        pieces, at = self._answer.pieces, 0
        while (end := data.find(b"\r\n", at)) >= 0:
            try:
                size = int(data[at:end].partition(b";")[0], 16)
            except ValueError:
                self._fail("the server's chunked answer is malformed")
                return
            stop = end + 2 + size
            if size == 0:
                # No trailers are asked for; where some come, they end at the next empty line.
                if data.startswith(b"\r\n", stop) or b"\r\n\r\n" in data[stop:]:
                    self._finish()
                    return
                break
            if len(data) < stop + 2:
                break
            pieces.append((now_s, data[end + 2 : stop]))
            at = stop + 2
        self._rest = data[at:]

    def _fail(self, message: str) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(ServiceError(message))
        self.close()

    def _finish(self) -> None:
        answer, self._answer = self._answer, None
        self._rest, self._chunked, self._left = b"", False, None
        if answer is not None and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(answer)
        if not self._keep:
            self.close()
