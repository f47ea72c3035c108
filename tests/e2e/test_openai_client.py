"""The openai client, unchanged, against the gateway."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

import httpx
import openai
import pytest
from fakes import BLOCK, EOS

USER = [{"role": "user", "content": "hi there"}]
CHAT_PROMPT = "user:hi there"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt="hello ", max_tokens=10)
    assert answer.choices[0].text == "hello hell"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        6,
        10,
        16,
    )


def test_default_length_is_sixteen(client: openai.OpenAI) -> None:
    assert client.completions.create(model="fake", prompt="abc").usage.completion_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ([104, 105], ["hih"]),
        (["ab", "xyz"], ["aba", "xyz"]),
        ([[97, 98], [120, 121, 122]], ["aba", "xyz"]),
    ],
)
def test_prompt_forms(client: openai.OpenAI, prompt: Any, texts: list[str]) -> None:
    answer = client.completions.create(model="fake", prompt=prompt, max_tokens=3)
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == list(range(len(texts)))


def test_n_and_several_prompts(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt=["ab", "xyz"], n=2, max_tokens=4)
    assert [choice.text for choice in answer.choices] == ["abab", "abab", "xyzx", "xyzx"]
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize("prompt", ["ab", [97, 98]])
def test_echo(client: openai.OpenAI, prompt: Any) -> None:
    assert (
        client.completions.create(model="fake", prompt=prompt, max_tokens=3, echo=True).choices[0].text
        == "ababa"
    )
    stream = client.completions.create(model="fake", prompt=prompt, max_tokens=3, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "ababa"


def test_streamed_completion_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="fake", prompt="añ漢🐍", max_tokens=20, stream=True, stream_options={"include_usage": True}
        )
    )
    *tokens, last = chunks
    assert len(tokens) == 20
    assert "".join(chunk.choices[0].text for chunk in tokens) == "añ漢🐍añ漢🐍"
    assert [chunk.choices[0].finish_reason for chunk in tokens] == [None] * 19 + ["length"]
    assert all(chunk.usage is None for chunk in tokens)
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (10, 20)


def test_a_cut_character_is_replaced_at_the_end(client: openai.OpenAI) -> None:
    assert client.completions.create(model="fake", prompt="🐍", max_tokens=2).choices[0].text == "\ufffd"


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=USER, max_completion_tokens=14)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == CHAT_PROMPT
    assert answer.usage.prompt_tokens == len(CHAT_PROMPT) + 2
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "hi "}, {"type": "text", "text": "there"}]}
    ]
    assert client.chat.completions.create(model="fake", messages=parts, max_tokens=14).choices[0].message == (
        answer.choices[0].message
    )


def test_chat_runs_to_the_end_of_text(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=USER)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == CHAT_PROMPT
    # The end-of-text token is counted and not shown; the turn's opening token is not text either.
    assert answer.usage.completion_tokens == len(CHAT_PROMPT) + 2


def test_streamed_chat(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="fake", messages=USER, stream=True, n=2, max_tokens=5))
    assert all(chunk.object == "chat.completion.chunk" and chunk.id == chunks[0].id for chunk in chunks)
    for index in (0, 1):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert [choice.delta.role for choice in mine] == ["assistant"] + [None] * 5
        assert "".join(choice.delta.content or "" for choice in mine) == "user"
        assert mine[-1].finish_reason == "length"


def test_developer_is_system(client: openai.OpenAI) -> None:
    messages = [{"role": "developer", "content": "be"}]
    answer = client.chat.completions.create(model="fake", messages=messages, max_tokens=10)
    assert answer.choices[0].message.content == "system:be"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "stop", "text", "tokens"),
    [
        ("one two.", " t", "one", 5),
        ("one two.", ["o.one", "zzz"], "one tw", 11),
        ("aab", "ab", "a", 3),
        ("漢字。", "字", "漢", 6),
        # Held back as a possible beginning, then shown because it was none.
        ("abab#", "abc", "abab#abab#ab", 12),
    ],
)
def test_stop_strings(
    client: openai.OpenAI, stream: bool, prompt: str, stop: Any, text: str, tokens: int
) -> None:
    ask: dict[str, Any] = {"model": "fake", "prompt": prompt, "stop": stop, "max_tokens": 12}
    if not stream:
        answer = client.completions.create(**ask)
        assert answer.choices[0].text == text
        assert answer.choices[0].finish_reason == ("length" if tokens == 12 else "stop")
        assert answer.usage.completion_tokens == tokens
        return
    *chunks, last = client.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert last.usage.completion_tokens == tokens


def test_a_stop_string_ends_the_sequence_in_the_engine(open_gateway: Any) -> None:
    with open_gateway() as running, running.client() as client:
        client.completions.create(model="fake", prompt="ab.", stop=".", max_tokens=4000)
        assert running.engine.running == {}
        assert len(running.engine.aborted) == 1


def test_stop_token_ids_and_ignore_eos(client: openai.OpenAI) -> None:
    prompt = [97, 98, EOS, 99]
    plain = client.completions.create(model="fake", prompt=prompt, max_tokens=6)
    assert (plain.choices[0].text, plain.choices[0].finish_reason) == ("ab", "stop")
    on = client.completions.create(model="fake", prompt=prompt, max_tokens=6, extra_body={"ignore_eos": True})
    assert (on.choices[0].text, on.choices[0].finish_reason) == ("abcab", "length")
    stop = client.completions.create(
        model="fake", prompt=prompt, max_tokens=6, extra_body={"stop_token_ids": [98]}
    )
    assert (stop.choices[0].text, stop.choices[0].finish_reason, stop.usage.completion_tokens) == (
        "a",
        "stop",
        2,
    )


def test_cached_prompt_tokens_are_reported(client: openai.OpenAI) -> None:
    prompt = "only here" * 8
    first = client.completions.create(model="fake", prompt=prompt, max_tokens=1)
    again = client.completions.create(model="fake", prompt=prompt, max_tokens=1)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens == (72 - 1) // BLOCK * BLOCK


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    scores = (
        client.completions.create(model="fake", prompt="aé", max_tokens=4, logprobs=2).choices[0].logprobs
    )
    assert scores.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "a"]
    assert scores.token_logprobs == [-0.5] * 4
    assert scores.top_logprobs[0] == {"a": -0.5, "b": -1.5}
    assert scores.text_offset == [0, 1, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat(client: openai.OpenAI, stream: bool) -> None:
    ask: dict[str, Any] = {
        "model": "fake",
        "messages": USER,
        "max_tokens": 3,
        "logprobs": True,
        "top_logprobs": 1,
    }
    if stream:
        chunks = client.chat.completions.create(**ask, stream=True)
        content = [s for c in chunks if c.choices[0].logprobs for s in c.choices[0].logprobs.content]
    else:
        content = client.chat.completions.create(**ask).choices[0].logprobs.content
    assert [score.token for score in content] == ["<257>", "u", "s"]
    assert content[1].bytes == [117]
    assert content[1].top_logprobs[0].logprob == -0.5


def test_sampling_reaches_the_engine(open_gateway: Any) -> None:
    with open_gateway() as running, running.client() as client:
        client.completions.create(
            model="fake",
            prompt="a",
            n=2,
            max_tokens=1,
            temperature=0.5,
            top_p=0.25,
            presence_penalty=1,
            frequency_penalty=-1,
            seed=7,
            user="somebody",
            extra_body={"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.5, "metadata": {}, "store": True},
        )
        first, second = (request.sampling for request in running.engine.submitted)
        assert (first.temperature, first.top_p, first.top_k, first.min_p) == (0.5, 0.25, 3, 0.1)
        assert (first.presence_penalty, first.frequency_penalty, first.repetition_penalty) == (1, -1, 1.5)
        assert (first.seed, second.seed) == (7, 8)


async def _mixed(client: openai.AsyncOpenAI, number: int) -> tuple[int, int]:
    """One request of a kind chosen by its number; checks its text, returns (prompt, output) tokens."""
    rng = random.Random(number)
    prompt = "".join(rng.choices("abcdefgh ", k=rng.randint(3, 90)))
    length = rng.randint(1, 120)
    expected = (prompt * 100)[:length]
    if number % 4 == 0:
        answer = await client.completions.create(model="fake", prompt=prompt, max_tokens=length)
        assert answer.choices[0].text == expected
        return answer.usage.prompt_tokens, answer.usage.completion_tokens
    if number % 4 == 1:
        ask = {"model": "fake", "messages": [{"role": "user", "content": prompt}], "max_completion_tokens": 5}
        chat = await client.chat.completions.create(**ask)
        assert chat.choices[0].message.content == "user"
        assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (len(prompt) + 7, 5)
        return len(prompt), length
    streamed = await client.completions.create(
        model="fake", prompt=prompt, max_tokens=length, stream=True, stream_options={"include_usage": True}
    )
    text, usage = "", None
    async for chunk in streamed:
        text += chunk.choices[0].text if chunk.choices else ""
        usage = chunk.usage or usage
    assert text == expected
    assert usage is not None
    return usage.prompt_tokens, usage.completion_tokens


def test_64_mixed_requests_at_once(open_gateway: Any) -> None:
    with open_gateway() as running:

        async def all_of_them() -> list[tuple[int, int]]:
            async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0) as client:
                return await asyncio.gather(*(_mixed(client, number) for number in range(64)))

        counts = asyncio.run(all_of_them())
        assert len(counts) == len(running.engine.submitted) == 64
        for number, (prompt, output) in enumerate(counts):
            rng = random.Random(number)
            assert prompt == len(rng.choices("abcdefgh ", k=rng.randint(3, 90)))
            assert output == rng.randint(1, 120)
        assert running.engine.stats().kv_blocks_used == 0
        page = httpx.get(f"{running.url}/metrics").text
        assert 'tongyun_requests_total{endpoint="text_completion",outcome="length"} 48.0' in page
        assert "tongyun_kv_blocks_used 0.0" in page
        assert "tongyun_ttft_seconds_count 64.0" in page


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_blocks(open_gateway: Any, stream: bool) -> None:
    with open_gateway() as running:
        body = {"model": "fake", "prompt": "ab", "max_tokens": 4000, "stream": stream, "n": 2}
        with httpx.Client() as client:
            if stream:
                with client.stream("POST", f"{running.url}/v1/completions", json=body) as answer:
                    assert next(answer.iter_lines()).startswith("data:")
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{running.url}/v1/completions", json=body, timeout=0.3)
        assert wait_for(lambda: not running.engine.running)
        assert len(running.engine.aborted) == 2
        assert running.engine.stats().kv_blocks_used == 0
        counted = 'tongyun_requests_total{endpoint="text_completion",outcome="disconnected"} 1.0'
        assert wait_for(lambda: counted in httpx.get(f"{running.url}/metrics").text)


def wait_for(condition: Any, timeout_s: float = 5.0) -> bool:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_an_engine_that_fails_is_told_to_everyone(open_gateway: Any) -> None:
    with open_gateway() as running, httpx.Client(base_url=running.url) as client:
        body = {"model": "fake", "prompt": "ab", "max_tokens": 4000, "stream": True}
        assert client.get("/health").status_code == 200
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data:")
            running.engine.fail("out of memory")
            rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert rest[-1]["error"]["code"] == "engine_error"
        assert "out of memory" in rest[-1]["error"]["message"]
        assert client.get("/health").status_code == 503
