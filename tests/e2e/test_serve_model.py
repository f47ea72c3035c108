"""`tongyun serve` whole: a model of random weights, the real engine, the openai client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tongyun.cli.engines import ServeOptions, build_gateway
from tongyun.cloud.gateway.app import build_app
from tongyun.cloud.gateway.server import bind, serving
from tongyun.errors import InputError
from tongyun.model.config import ModelConfig
from tongyun.model.tokenizer import Tokenizer, write_byte_tokenizer
from tongyun.model.weights import write_random_checkpoint

CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": 300,
    "max_position_embeddings": 4000,
    "tie_word_embeddings": True,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "eos_token_id": 256,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hub") / "tiny"
    write_byte_tokenizer(directory)
    write_random_checkpoint(directory, ModelConfig.from_hf(CONFIG, name="tiny"))
    return directory


def options(model: Path, **more: Any) -> ServeOptions:
    # 4,096 tokens of cache, two thirds of what 64 requests want at once: waiting is part of the test.
    return ServeOptions(model=str(model), kernels="torch", threads=1, kv_bytes=2**20, **more)


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with serving(build_app(build_gateway(options(model))), bind("127.0.0.1", 0)) as url:
        yield url


def gauge(url: str, name: str) -> float:
    page = httpx.get(f"{url}/metrics").text
    return float(next(line for line in page.splitlines() if line.startswith(f"tongyun_{name} ")).split()[-1])


def test_greedy_answers_agree_however_they_are_asked(url: str, model: Path) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        ask: dict[str, Any] = {
            "model": "tiny",
            "prompt": "def add(a, b):",
            "max_tokens": 24,
            "temperature": 0,
        }
        whole = client.completions.create(**ask)
        streamed = client.completions.create(**ask, stream=True)
        assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text
        again = client.completions.create(**ask)
        assert again.choices[0].text == whole.choices[0].text
        tokens = client.completions.create(
            **ask | {"prompt": list(Tokenizer(model).encode("def add(a, b):"))}
        )
        assert tokens.choices[0].text == whole.choices[0].text
        chat = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=5,
            logprobs=True,
            top_logprobs=2,
        )
        assert chat.usage is not None
        assert chat.usage.prompt_tokens == len("user: hi\nassistant: ")


async def _ask(client: openai.AsyncOpenAI, number: int) -> tuple[int, int, int]:
    """One streamed or whole request; (asked output, chunks or output, counted output) tokens."""
    length = 5 + 7 * (number % 13)
    ask: dict[str, Any] = {
        "model": "tiny",
        "prompt": f"request {number} " * (1 + number % 9),
        "max_tokens": length,
        "temperature": number % 3 / 2,
        "seed": number,
        "extra_body": {"ignore_eos": True},
    }
    if number % 2:
        answer = await client.completions.create(**ask)
        return length, length, answer.usage.completion_tokens
    chunks, usage = 0, None
    async for chunk in await client.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    ):
        chunks += bool(chunk.choices)
        usage = chunk.usage or usage
    assert usage is not None
    return length, chunks, usage.completion_tokens


def test_64_at_once_all_finish_and_no_block_stays_taken(url: str) -> None:
    async def all_of_them() -> list[tuple[int, int, int]]:
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=120
        ) as client:
            return await asyncio.gather(*(_ask(client, number) for number in range(64)))

    counts = asyncio.run(all_of_them())
    assert len(counts) == 64
    assert all(asked == chunks == counted for asked, chunks, counted in counts)
    assert gauge(url, "running") == gauge(url, "waiting") == gauge(url, "kv_blocks_used") == 0


def test_a_request_beyond_the_context_is_refused(url: str) -> None:
    answer = httpx.post(
        f"{url}/v1/completions", json={"model": "tiny", "prompt": "x" * 3988, "max_tokens": 13}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_a_hang_up_frees_the_blocks_of_the_real_engine(url: str) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 3900, "stream": True, "ignore_eos": True}
    with httpx.Client() as client, client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert gauge(url, "kv_blocks_used") > 0
    for _ in range(500):
        if gauge(url, "kv_blocks_used") == 0:
            return
    raise AssertionError("blocks are still taken")


@pytest.mark.parametrize("context", [1, 4001])
def test_a_context_that_does_not_fit_is_refused(model: Path, context: int) -> None:
    with pytest.raises(InputError, match="accepted: 2 … 4000"):
        build_gateway(options(model, context_tokens=context))


def test_sampling_options_reach_the_model(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        ask: dict[str, Any] = {
            "model": "tiny",
            "prompt": "abc",
            "max_tokens": 30,
            "extra_body": {"ignore_eos": True},
        }
        seeded = [client.completions.create(**ask, seed=seed).choices[0].text for seed in (1, 1, 2)]
        assert seeded[0] == seeded[1] != seeded[2]
        pair = client.completions.create(**ask, seed=1, n=2)
        assert [choice.text for choice in pair.choices] == [seeded[0], seeded[2]]
        scored = client.completions.create(**ask, temperature=0, logprobs=2).choices[0].logprobs
        assert scored is not None
        assert scored.top_logprobs is not None
        for own, top in zip(scored.token_logprobs or [], scored.top_logprobs, strict=True):
            assert own == max(top.values()) < 0
