"""Signals and ports, with the server in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tongyun.cloud.gateway.server import bind, url_of
from tongyun.errors import InputError, ServiceError

SERVER = Path(__file__).with_name("fake_server.py")


@contextmanager
def server(drain_s: float, tpot_s: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, str(SERVER), "0", str(drain_s), str(tpot_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def ask(tokens: int) -> dict[str, object]:
    return {"model": "fake", "prompt": "ab", "max_tokens": tokens, "stream": True}


def test_sigterm_finishes_what_runs_and_takes_nothing_new() -> None:
    with server(drain_s=20, tpot_s=0.01) as (process, url), httpx.Client() as client:
        with client.stream("POST", f"{url}/v1/completions", json=ask(100)) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.4)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/health")
            events = [first, *(line for line in lines if line)]
        assert len(events) == 101
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"
        output, errors = process.communicate(timeout=10)
        assert (process.returncode, output, errors) == (0, "ended\n", "")


def test_what_does_not_finish_in_time_is_told_so() -> None:
    with server(drain_s=0.3, tpot_s=0.02) as (process, url), httpx.Client() as client:
        begun = time.monotonic()
        with client.stream("POST", f"{url}/v1/completions", json=ask(5000)) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            last = [json.loads(line[6:]) for line in lines if line.startswith("data: {")][-1]
        assert last["error"]["code"] == "server_draining"
        output, errors = process.communicate(timeout=10)
        assert (process.returncode, output, errors) == (0, "ended\n", "")
        assert time.monotonic() - begun < 10


def test_idle_server_ends_at_once_on_sigint() -> None:
    with server(drain_s=20, tpot_s=0.01) as (process, _):
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=10)
        assert (process.returncode, output, errors) == (0, "ended\n", "")


def test_a_taken_port_is_named() -> None:
    with bind("127.0.0.1", 0) as sock:
        sock.listen()
        port = sock.getsockname()[1]
        assert url_of(sock) == f"http://127.0.0.1:{port}"
        with pytest.raises(ServiceError, match=rf"cannot listen on 127.0.0.1:{port}: Address already in use"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("no.such.host.invalid", 80)])
def test_bad_addresses_are_input_errors(host: str, port: int) -> None:
    with pytest.raises(InputError, match="--"):
        bind(host, port)
