"""Classes of service over HTTP: who names which, and that the engine lets the higher one go first."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from typer.testing import CliRunner

from tongyun.cli import build
from tongyun.cli.engines import ServeOptions, build_gateway
from tongyun.cli.twin import twin_gateway
from tongyun.cloud.gateway.app import build_app
from tongyun.cloud.gateway.classes import Classes
from tongyun.cloud.gateway.server import bind, serving
from tongyun.errors import RequestError
from tongyun.model.config import ModelConfig
from tongyun.model.tokenizer import write_byte_tokenizer
from tongyun.model.weights import write_random_checkpoint

CONFIG = {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": 300,
    "max_position_embeddings": 4000,
    "tie_word_embeddings": True,
    "eos_token_id": 256,
}
LONG = 600


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("hub") / "tiny"
    write_byte_tokenizer(directory)
    write_random_checkpoint(directory, ModelConfig.from_hf(CONFIG, name="tiny"))
    options = ServeOptions(
        model=str(directory),
        kernels="torch",
        threads=1,
        kv_bytes=2**20,
        max_sequences=1,
        priorities={"chat": 1, "batch": -1},
    )
    with serving(build_app(build_gateway(options)), bind("127.0.0.1", 0)) as url:
        yield url


def body(prompt: str, tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        **more,
    }


def gauge(url: str, name: str) -> float:
    page = httpx.get(f"{url}/metrics").text
    return float(next(line for line in page.splitlines() if line.startswith(f"tongyun_{name} ")).split()[1])


@pytest.mark.parametrize("by_header", [False, True])
def test_a_higher_class_overtakes_and_who_made_way_loses_nothing(url: str, by_header: bool) -> None:
    quiet = httpx.post(f"{url}/v1/completions", json=body("first", LONG), timeout=60).json()
    before = gauge(url, "preemptions_total")
    ended: list[str] = []
    texts: dict[str, str] = {}

    def ask(name: str, tier: str, tokens: int) -> None:
        said = {"headers": {"x-priority-class": tier}} if by_header else {}
        tiers = {"service_tier": "batch" if by_header else tier}
        answer = httpx.post(
            f"{url}/v1/completions", json=body(name, tokens, **tiers), timeout=60, **said
        ).json()
        texts[name] = answer["choices"][0]["text"]
        ended.append(name)

    def start(name: str, tier: str, tokens: int) -> threading.Thread:
        thread = threading.Thread(target=ask, args=(name, tier, tokens))
        thread.start()
        return thread

    threads = [start("first", "batch", LONG)]
    wait_for(url, "running", 1)
    threads.append(start("second", "batch", 4))
    wait_for(url, "waiting", 1)
    threads += [start("plain", "auto", 4), start("third", "chat", 4)]
    for thread in threads:
        thread.join(60)
    assert ended.index("third") < ended.index("first")
    assert ended.index("plain") < ended.index("first") < ended.index("second")
    assert gauge(url, "preemptions_total") > before
    assert texts["first"] == quiet["choices"][0]["text"]


def wait_for(url: str, name: str, least: float) -> None:
    deadline_s = time.monotonic() + 20
    while gauge(url, name) < least:
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


def test_a_class_that_is_not_there_is_refused_by_name(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match=r"chta.*did you mean chat") as refused:
            client.completions.create(model="tiny", prompt="a", extra_body={"service_tier": "chta"})
        assert refused.value.param == "service_tier"
        client.completions.create(model="tiny", prompt="a", extra_body={"service_tier": "default"})


def test_the_header_goes_before_the_body_and_without_classes_nothing_is_read() -> None:
    classes = Classes(priorities={"chat": 2, "default": 1})
    assert classes.of("chat", "nobody") == ("chat", 2)
    assert classes.of(None, "default") == ("default", 1)
    assert classes.of(None, "auto") == classes.of(None, None) == (None, 0)
    with pytest.raises(RequestError, match="x-priority-class 'other'"):
        classes.of("other", "chat")
    assert Classes().of("other", "flex") == (None, 0)


def test_the_classes_of_a_twin_are_those_of_its_fleet(tmp_path: Path) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(
        'name = "small"\nmodel = "Qwen/Qwen3-8B"\nchip = "a100"\n[[pool]]\nreplicas = 1\n'
        '[[class]]\nname = "chat"\npriority = 3\n'
    )
    gateway = twin_gateway(file, None, names=(), api_key=None, body_bytes=2**20)
    assert gateway.classes.of(None, "chat") == ("chat", 3)


@pytest.mark.parametrize("told", ["chat", "=1", "chat=high", "chat=1.5"])
def test_a_class_without_a_whole_priority_is_refused(told: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(build(), ["serve", str(tmp_path), "--class", told])
    assert result.exit_code != 0
    assert "NAME=PRIORITY" in str(result.exception) + result.output
