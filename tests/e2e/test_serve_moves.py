"""`tongyun serve --replicas 2 --migrate`: running requests move, and no reader can tell."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from test_serve_model import CONFIG, gauge, options
from test_serve_replicas import engines
from typer.testing import CliRunner

from tongyun.cli import build
from tongyun.cli.engines import build_gateway
from tongyun.cloud.engine.replicas import Replicas
from tongyun.cloud.gateway.app import build_app
from tongyun.cloud.gateway.server import bind, serving
from tongyun.cloud.sched.migrate import MigrationPolicy
from tongyun.errors import InputError
from tongyun.model.config import ModelConfig
from tongyun.model.tokenizer import write_byte_tokenizer
from tongyun.model.weights import write_random_checkpoint

LONG = 480
ASKS: list[dict[str, Any]] = [
    {
        "model": "tiny",
        "prompt": f"def add_{n}(a, b):",
        "max_tokens": LONG,
        "temperature": n % 2,
        "seed": 7 + n,
        "extra_body": {"ignore_eos": True},
    }
    for n in range(3)
]


class Served:
    def __init__(self, app: Any, url: str) -> None:
        self.app, self.url = app, url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=60)

    def alone(self) -> list[str]:
        """The long answers; the next request is the first engine's again."""
        self.client.completions.create(**ASKS[0] | {"max_tokens": 1})
        return [self.client.completions.create(**ask).choices[0].text for ask in ASKS]

    def crowd(self, pool: ThreadPoolExecutor) -> list[Any]:
        """All long answers from the first replica: every other request is a short one, and the second's."""
        streams = []
        for ask in ASKS:
            streams.append(self.client.completions.create(**ask, stream=True))
            self.client.completions.create(**ask | {"max_tokens": 1})
        return [pool.submit(self.read, stream) for stream in streams]

    @staticmethod
    def read(stream: Any) -> str:
        return "".join(chunk.choices[0].text for chunk in stream)

    def moves(self, outcome: str) -> float:
        return gauge(self.url, f'moves_total{{outcome="{outcome}"}}')

    def moving(self) -> int:
        """Moves under way."""
        replicas = self.app.state.bridge._engine
        assert isinstance(replicas, Replicas) and replicas._mover is not None
        return len(replicas._mover._moves)

    def checked(self) -> None:
        """Nothing is left anywhere."""
        limit = time.monotonic() + 5
        while gauge(self.url, "kv_blocks_used") and time.monotonic() < limit:
            time.sleep(0.02)
        assert gauge(self.url, "running") == gauge(self.url, "waiting") == 0
        assert gauge(self.url, "kv_blocks_used") == self.moving() == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hub") / "tiny"
    write_byte_tokenizer(directory)
    write_random_checkpoint(directory, ModelConfig.from_hf(CONFIG, name="tiny"))
    return directory


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's steps are a hundredth of those that the policy's defaults are made for."""
    policy = partial(MigrationPolicy, interval_s=0.01, below_steps=100.0)
    monkeypatch.setattr("tongyun.cloud.sched.migrate.MigrationPolicy", policy)


@contextmanager
def served(model: Path) -> Iterator[Served]:
    # 1,024 tokens of cache each: three long answers are more.
    told = replace(options(model, replicas=2, router="round-robin", migrate=True), kv_bytes=2**18)
    app = build_app(build_gateway(told))
    with serving(app, bind("127.0.0.1", 0)) as url:
        yield Served(app, url)


def until(what: Callable[[], object]) -> None:
    limit = time.monotonic() + 20
    while not what():
        assert time.monotonic() < limit, "it did not come to that"
        time.sleep(0.002)


@pytest.mark.parametrize("dies", ["source", "target"])
def test_no_reader_can_tell_who_moves_nor_who_dies(model: Path, dies: str) -> None:
    with served(model) as one, ThreadPoolExecutor() as pool:
        found = dict(zip(("source", "target"), engines(), strict=True))
        whole = one.alone()
        assert one.moves("migrated") == 0
        assert [answer.result() for answer in one.crowd(pool)] == whole
        moved = one.moves("migrated")
        assert moved >= 1
        assert gauge(one.url, "moved_bytes_total") > 0
        assert gauge(one.url, "move_downtime_seconds_count") == moved
        assert 0 < gauge(one.url, "move_downtime_seconds_sum") < moved
        one.checked()
        stayed = one.moves("called off")
        answers = one.crowd(pool)
        os.kill(found["target"], signal.SIGSTOP)
        try:
            until(one.moving)
            if dies == "source":
                # The target keeps room for who comes, and nobody answers that it may.
                os.kill(found["source"], signal.SIGSTOP)
                os.kill(found["target"], signal.SIGCONT)
                time.sleep(0.2)
                assert one.moving() == 1
        finally:
            os.kill(found[dies], signal.SIGKILL)
        assert [answer.result() for answer in answers] == whole
        assert one.moves("called off") > stayed and one.moves("migrated") == moved
        assert httpx.get(f"{one.url}/health").status_code == 200
        one.checked()


def test_there_must_be_somewhere_to_go(model: Path) -> None:
    result = CliRunner().invoke(build(), ["serve", str(model), "--port", "0", "--migrate"])
    assert isinstance(result.exception, InputError)
    assert "--migrate: requests move from one replica to another" in str(result.exception)
