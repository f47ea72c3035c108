"""A gateway on a free port, with a fake engine behind it that tests can look into."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from fakes import FakeEngine, served

from tongyun.cloud.gateway.app import Gateway, build_app
from tongyun.cloud.gateway.server import bind, serving


@dataclass(frozen=True)
class Running:
    """A served gateway and the engine behind it."""

    url: str
    engine: FakeEngine

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "any", "max_retries": 0, "timeout": 20, **options}
        )


@contextmanager
def _gateway(
    *, api_key: str | None = None, body_bytes: int = 2**20, context_tokens: int = 4096, **fake: Any
) -> Iterator[Running]:
    engines: list[FakeEngine] = []

    def start(sink: Any) -> FakeEngine:
        engines.append(FakeEngine(sink, **fake))
        return engines[0]

    gateway = Gateway(
        served=served(context_tokens=context_tokens),
        start_engine=start,
        api_key=api_key,
        body_bytes=body_bytes,
    )
    with serving(build_app(gateway), bind("127.0.0.1", 0)) as url:
        yield Running(url, engines[0])
    assert not engines[0].thread.is_alive()


@pytest.fixture
def open_gateway() -> Callable[..., Any]:
    return _gateway


@pytest.fixture(scope="module")
def gateway() -> Iterator[Running]:
    with _gateway() as running:
        yield running


@pytest.fixture(scope="module")
def client(gateway: Running) -> Iterator[openai.OpenAI]:
    with gateway.client() as client:
        yield client
