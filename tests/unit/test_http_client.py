"""The load generator's HTTP client, against a server that says exactly what the test wants."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tongyun.cloud.http import Answer, Client, ConnectionLost, Origin
from tongyun.errors import InputError, ServiceError

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
Talk = Callable[[Client, list[bytes]], Awaitable[Answer]]


def play(replies: list[list[bytes]], talk: Talk) -> tuple[Answer, list[bytes]]:
    """Serve one list of writes a request, close after an empty one; returns last answer and requests."""
    seen: list[bytes] = []

    conversations: list[asyncio.Task[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversations.append(asyncio.current_task())  # type: ignore[arg-type]
        while replies:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            seen.append(head + await reader.readexactly(length))
            for part in (parts := replies.pop(0)):
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.01)
            if parts[-1] == b"":
                break
        writer.close()
        await writer.wait_closed()

    async def run() -> Answer:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            client = Client(Origin.parse(f"http://127.0.0.1:{port}"), {"x-a": "b"})
            try:
                return await talk(client, seen)
            finally:
                await client.close()
                await asyncio.gather(*conversations)

    return asyncio.run(run()), seen


async def once(client: Client, _: list[bytes]) -> Answer:
    return await client.send("POST", "/completions", b"body")


async def twice(client: Client, _: list[bytes]) -> Answer:
    await client.send("GET", "/models")
    await asyncio.sleep(0.05)
    return await client.send("GET", "/models")


def test_request_and_plain_answer() -> None:
    answer, seen = play([[OK]], once)
    assert (answer.status, answer.body) == (200, b"hi")
    assert seen[0].startswith(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:")
    assert b"\r\nx-a: b\r\n" in seen[0]
    assert seen[0].endswith(b"\r\n\r\nbody")


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_chunks_cut_anywhere(size: int) -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    whole = head + b"5\r\nhe\r\nl\r\nA;x=y\r\n0123456789\r\n0\r\n\r\n"
    parts = [whole[i : i + size] for i in range(0, len(whole), size)]
    answer, _ = play([parts], once)
    assert [data for _, data in answer.pieces] == [b"he\r\nl", b"0123456789"]
    moments = [moment for moment, _ in answer.pieces]
    assert moments == sorted(moments)


def test_until_the_end_of_the_connection() -> None:
    answer, _ = play([[b"HTTP/1.1 200 OK\r\n\r\nab", b"cd", b""]], once)
    assert answer.body == b"abcd"


def test_a_connection_is_kept_and_a_stale_one_replaced() -> None:
    answer, seen = play([[OK], [OK]], twice)
    assert (answer.body, len(seen)) == (b"hi", 2)
    answer, seen = play([[OK, b""], [OK]], twice)
    assert (answer.body, len(seen)) == (b"hi", 2)


def test_a_cut_answer_is_an_error_and_not_sent_again() -> None:
    with pytest.raises(ConnectionLost, match="in the middle of its answer"):
        play([[b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab", b""], [OK]], once)


@pytest.mark.parametrize(
    "reply", [b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"]
)
def test_what_is_not_http_is_an_error(reply: bytes) -> None:
    with pytest.raises(ServiceError, match=r"HTTP/1\.1|malformed"):
        play([[reply]], once)


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://h", Origin(host="h", port=80, path="/v1", tls=False)),
        ("h:8000", Origin(host="h", port=8000, path="/v1", tls=False)),
        ("https://h/v1/", Origin(host="h", port=443, path="/v1", tls=True)),
        ("https://h:1/api/v2", Origin(host="h", port=1, path="/api/v2", tls=True)),
    ],
)
def test_urls(url: str, origin: Origin) -> None:
    assert Origin.parse(url) == origin


@pytest.mark.parametrize("url", ["", "ftp://h", "http://", "http://h:x", "http://h?q=1"])
def test_bad_urls(url: str) -> None:
    with pytest.raises(InputError, match="--url"):
        Origin.parse(url)
