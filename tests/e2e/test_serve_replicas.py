"""`tongyun serve --replicas`: engines in processes of their own, one of which is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from test_serve_model import CONFIG, gauge, options
from typer.testing import CliRunner

from tongyun.cli import build
from tongyun.cli.engines import build_gateway
from tongyun.cloud.gateway.app import build_app
from tongyun.cloud.gateway.server import bind, serving
from tongyun.errors import InputError
from tongyun.model.config import ModelConfig
from tongyun.model.tokenizer import write_byte_tokenizer
from tongyun.model.weights import write_random_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hub") / "tiny"
    write_byte_tokenizer(directory)
    write_random_checkpoint(directory, ModelConfig.from_hf(CONFIG, name="tiny"))
    return directory


@pytest.fixture
def url(model: Path) -> Iterator[str]:
    gateway = build_gateway(options(model, replicas=2, router="round-robin"))
    with serving(build_app(gateway), bind("127.0.0.1", 0)) as url:
        yield url


def pieces(chunks: Any, most: int | None = None) -> str:
    """The text of so many chunks, or of all."""
    parts = []
    for chunk in chunks:
        parts.append(chunk.choices[0].text)
        if len(parts) == most:
            break
    return "".join(parts)


def test_a_stream_outlives_the_engine_that_began_it(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=60) as client:
        asks: list[dict[str, Any]] = [
            {
                "model": "tiny",
                "prompt": f"def add_{n}(a, b):",
                "max_tokens": 400,
                "temperature": n % 2,
                "seed": 7,
                "extra_body": {"ignore_eos": True},
            }
            for n in range(2)
        ]
        # Four in turn: each prompt is answered by both engines.
        whole = [client.completions.create(**ask).choices[0].text for ask in asks + asks[:1] + asks]
        assert whole[0] == whole[2] == whole[3] and whole[1] == whole[4]
        streams = [client.completions.create(**ask, stream=True) for ask in asks]
        begun = [pieces(stream, 20) for stream in streams]
        assert gauge(url, "running") == 2
        blocks = gauge(url, "kv_blocks")
        os.kill(engines()[0], signal.SIGKILL)
        assert [text + pieces(stream) for text, stream in zip(begun, streams, strict=True)] == whole[:2]
        assert httpx.get(f"{url}/health").status_code == 200
        assert gauge(url, "kv_blocks") == blocks / 2
        assert gauge(url, "running") == gauge(url, "kv_blocks_used") == 0
        assert client.completions.create(**asks[0]).choices[0].text == whole[0]
        os.kill(engines()[0], signal.SIGKILL)
        with pytest.raises(openai.InternalServerError, match="the engine has stopped"):
            client.completions.create(**asks[0])
        assert httpx.get(f"{url}/health").status_code == 503


def engines() -> list[int]:
    """Processes of engines that live, the first one's first."""
    found = [one.pid for one in multiprocessing.active_children() if one.name == "tongyun-engine"]
    return sorted(pid for pid in found if pid is not None)


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (["--replicas", "0"], "--replicas 0: accepted: 1 or more"),
        (["--replicas", "2", "--router", "lest-load"], "unknown router 'lest-load'; did you mean least-load"),
        (["--replicas", "2", "--device", "ppu"], "accepted with --device ppu: 1"),
        (["--router", "prefix"], "--router: --replicas 1 leaves nothing to choose"),
    ],
)
def test_what_makes_no_sense_is_refused(model: Path, told: list[str], why: str) -> None:
    result = CliRunner().invoke(build(), ["serve", str(model), "--port", "0", *told])
    assert isinstance(result.exception, InputError)
    assert why in str(result.exception)


def test_a_twin_has_the_replicas_of_its_file(tmp_path: Path) -> None:
    told = ["serve", "--twin", "--fleet", str(tmp_path / "fleet.toml"), "--replicas", "2"]
    result = CliRunner().invoke(build(), told)
    assert isinstance(result.exception, InputError)
    assert "--replicas: --twin runs no model" in str(result.exception)
