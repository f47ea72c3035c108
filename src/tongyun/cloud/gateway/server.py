"""A socket, a server loop and an orderly end.

The port is bound before anything slow is loaded, so that a taken one is told at once.
SIGTERM closes it, lets what runs finish for `drain_s`, ends the rest with an error its
client can read, and returns normally: the process exits 0.
"""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from tongyun.cloud.gateway.faults import Refused
from tongyun.cloud.pauses import settle
from tongyun.errors import InputError, ServiceError

# What may still be written after the last request was ended: error events, no tokens.
_LAST_WORDS_S = 2.0


def bind(host: str, port: int) -> socket.socket:
    """A bound, not yet listening socket; port 0 takes a free one."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port: {port} is no port; accepted: 0 … 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise InputError(f"--host: '{host}' is no address of this machine: {error.strerror}") from None
    sock = socket.socket(family, kind, protocol)
    # A restarted server must not wait for its predecessor's connections to time out.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _cannot_listen(f"{host}:{port}", error) from None
    return sock


def _cannot_listen(where: str, error: OSError) -> ServiceError:
    return ServiceError(f"cannot listen on {where}: {error.strerror}; --port 0 takes a free port")


def url_of(sock: socket.socket) -> str:
    """`http://127.0.0.1:8000`, for people to click on."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(
    app: FastAPI, sock: socket.socket, *, drain_s: float, on_ready: Callable[[], None] | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second SIGINT ends at once."""

    def ready() -> None:
        settle()
        if on_ready is not None:
            on_ready()

    _server(app, drain_s, ready).run(sockets=[sock])


@contextmanager
def serving(app: FastAPI, sock: socket.socket, *, drain_s: float = 5.0) -> Generator[str, None, None]:
    """Serve from a thread while the block runs; yields the URL once requests are taken."""
    ready = threading.Event()
    server = _server(app, drain_s, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="gateway")
    url = url_of(sock)
    thread.start()
    try:
        while not ready.wait(0.05):
            if not thread.is_alive():
                raise ServiceError("the server did not start; its log says why")
        yield url
    finally:
        server.should_exit = True
        thread.join()


def _server(app: FastAPI, drain_s: float, on_ready: Callable[[], None] | None) -> _Server:
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        # A backstop behind `_Server.shutdown`, which ends the requests itself.
        timeout_graceful_shutdown=math.ceil(drain_s + _LAST_WORDS_S),
    )
    return _Server(config, app, drain_s, on_ready)


class _Server(uvicorn.Server):
    """uvicorn's, but it tells its requests when time is up, and returns after a signal."""

    def __init__(
        self, config: uvicorn.Config, app: FastAPI, drain_s: float, on_ready: Callable[[], None] | None
    ) -> None:
        super().__init__(config)
        self._app, self._drain_s, self._on_ready = app, drain_s, on_ready

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self._on_signal) for sig in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def _on_signal(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        where = [url_of(sock) for sock in sockets or []]
        try:
            await super().startup(sockets=sockets)
        except OSError as error:
            # Another server bound the same port while neither listened yet.
            await self.lifespan.shutdown()
            raise _cannot_listen(", ".join(where), error) from None
        if self.started and self._on_ready is not None:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        bridge = self._app.state.bridge
        bridge.draining = True
        fault = Refused(503, "the server is shutting down", code="server_draining")
        deadline = asyncio.get_running_loop().call_later(self._drain_s, bridge.fail_all, fault)
        await super().shutdown(sockets=sockets)
        deadline.cancel()
