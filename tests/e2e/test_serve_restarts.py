"""`tongyun serve --replicas`: who is killed or stopped under load comes back, and no answer is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
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
from tongyun.cli.serve import upkeep_of
from tongyun.cloud.engine.keeper import Upkeep
from tongyun.cloud.gateway.app import build_app
from tongyun.cloud.gateway.server import bind, serving
from tongyun.errors import InputError
from tongyun.model.config import ModelConfig
from tongyun.model.tokenizer import write_byte_tokenizer
from tongyun.model.weights import write_random_checkpoint

ASKS: list[dict[str, Any]] = [
    {
        "model": "tiny",
        "prompt": f"def add_{n}(a, b):",
        "max_tokens": 200,
        "temperature": n % 2,
        "seed": 7 + n,
        "extra_body": {"ignore_eos": True},
    }
    for n in range(6)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hub") / "tiny"
    write_byte_tokenizer(directory)
    write_random_checkpoint(directory, ModelConfig.from_hf(CONFIG, name="tiny"))
    return directory


class Served:
    def __init__(self, url: str) -> None:
        self.url, self.pool = url, ThreadPoolExecutor(len(ASKS))
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=60)

    def answer(self, ask: dict[str, Any]) -> str:
        return self.client.completions.create(**ask).choices[0].text

    def load(self) -> list[Future[str]]:
        return [self.pool.submit(self.answer, ask) for ask in ASKS]

    def health(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/health").json())

    def restarts(self, reason: str) -> float:
        return gauge(self.url, f'replica_restarts_total{{reason="{reason}",replica="0"}}')

    def back(self) -> bool:
        return self.health() == {"status": "ok", "replicas": 2, "ready_replicas": 2}


@contextmanager
def served(model: Path, upkeep: Upkeep) -> Iterator[Served]:
    gateway = build_gateway(options(model, replicas=2, router="round-robin", upkeep=upkeep))
    with serving(build_app(gateway), bind("127.0.0.1", 0)) as url:
        yield Served(url)


def until(what: Callable[[], object]) -> None:
    limit = time.monotonic() + 30
    while not what():
        assert time.monotonic() < limit, "it did not come to that"
        time.sleep(0.02)


def test_one_that_is_killed_under_load_comes_back(model: Path) -> None:
    with served(model, Upkeep(first_s=1.0)) as one:
        whole = [answer.result() for answer in one.load()]
        blocks, tokens = gauge(one.url, "kv_blocks"), gauge(one.url, "output_tokens_total")
        first, second = engines()
        answers = one.load()
        until(lambda: gauge(one.url, "running") == len(ASKS))
        os.kill(first, signal.SIGKILL)
        assert [answer.result() for answer in answers] == whole
        assert one.health() == {"status": "degraded", "replicas": 2, "ready_replicas": 1}
        assert gauge(one.url, 'replica_up{replica="0"}') == 0
        until(one.back)
        assert gauge(one.url, 'replica_up{replica="0"}') == 1
        assert one.restarts("exited") == 1 and one.restarts("hung") == 0
        assert gauge(one.url, "kv_blocks") == blocks and gauge(one.url, "output_tokens_total") > tokens
        assert [answer.result() for answer in one.load()] == whole
        assert first not in engines() and second in engines()
        for pid in engines():
            os.kill(pid, signal.SIGKILL)
        until(lambda: httpx.get(f"{one.url}/ready").status_code == 503)
        with pytest.raises(openai.InternalServerError, match="no replica is up"):
            one.answer(ASKS[0])
        assert one.health()["ready_replicas"] == 0


def test_one_that_is_stopped_under_load_is_killed_and_comes_back(model: Path) -> None:
    with served(model, Upkeep(hang_after_s=2.5, first_s=0.1)) as one:
        whole = [answer.result() for answer in one.load()]
        first, second = engines()
        answers = one.load()
        until(lambda: gauge(one.url, "running") == len(ASKS))
        os.kill(first, signal.SIGSTOP)
        # As long as nobody has noticed, half of these go to it as well.
        more = one.load()
        assert one.health()["ready_replicas"] == 2
        assert [answer.result() for answer in answers + more] == whole * 2
        until(one.back)
        assert one.restarts("hung") == 1 and one.restarts("exited") == 0
        assert first not in engines() and second in engines() and len(engines()) == 2
        assert [answer.result() for answer in one.load()] == whole


def test_one_that_is_stopped_while_idle_does_not_keep_the_server_from_ending(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tongyun.cloud.engine.replicas.GRACE_S", 0.5)
    with served(model, Upkeep()):
        os.kill(engines()[1], signal.SIGSTOP)
        begun_s = time.monotonic()
    assert time.monotonic() - begun_s < 5 and not engines()


def test_one_engine_alone_is_looked_after_where_that_is_asked_for() -> None:
    assert upkeep_of(1, None, None) is None
    assert upkeep_of(2, None, None) == Upkeep() and Upkeep().hang_after_s == 60
    assert upkeep_of(1, 90.0, None) == Upkeep(hang_after_s=90.0)
    assert upkeep_of(1, None, 0) == Upkeep(restarts=0)


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (["--hang-after", "0.5"], "--hang-after 0.5: accepted: 1 or more seconds"),
        (["--replicas", "2", "--restarts", "-1"], "--restarts -1: accepted: 0 or more"),
        (["--device", "ppu", "--hang-after", "60"], "--hang-after: a simulated chip's step"),
        (["--twin", "--fleet", "fleet.toml", "--restarts", "2"], "--restarts: --twin runs no model"),
    ],
)
def test_what_makes_no_sense_is_refused(model: Path, told: list[str], why: str) -> None:
    place = [] if "--twin" in told else [str(model)]
    result = CliRunner().invoke(build(), ["serve", *place, "--port", "0", *told])
    assert isinstance(result.exception, InputError)
    assert why in str(result.exception)
