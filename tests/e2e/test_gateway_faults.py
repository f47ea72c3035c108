"""Every refusal is OpenAI's error object with the right status, and nothing refused reaches the engine."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

BASE: dict[str, Any] = {"model": "fake", "prompt": "hello"}
CHAT: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}


def check(answer: httpx.Response, status: int, code: str | None, param: str | None = None) -> str:
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    error = answer.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert (error["code"], error["param"]) == (code, param)
    assert "x-request-id" in answer.headers
    return str(error["message"])


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"model": "other"}, 404, "model_not_found", "model"),
        ({"model": None}, 400, "invalid_value", "model"),
        ({"prompt": None}, 400, "invalid_value", "prompt"),
        ({"prompt": ""}, 400, "invalid_value", "prompt"),
        ({"prompt": []}, 400, "invalid_value", "prompt"),
        ({"prompt": [[1], []]}, 400, "invalid_value", "prompt"),
        ({"prompt": [1, "a"]}, 400, "invalid_value", "prompt"),
        ({"prompt": [300]}, 400, "invalid_value", "prompt"),
        ({"prompt": [-1]}, 400, "invalid_value", "prompt"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"max_tokens": "10"}, 400, "invalid_value", "max_tokens"),
        ({"max_tokens": 4092}, 400, "context_length_exceeded", "max_tokens"),
        ({"prompt": "x" * 4096}, 400, "context_length_exceeded", "prompt"),
        ({"temperature": -0.1}, 400, "invalid_value", "temperature"),
        ({"temperature": 2.1}, 400, "invalid_value", "temperature"),
        ({"top_p": 0}, 400, "invalid_value", "top_p"),
        ({"top_k": -2}, 400, "invalid_value", "top_k"),
        ({"min_p": 1.5}, 400, "invalid_value", "min_p"),
        ({"repetition_penalty": 0}, 400, "invalid_value", "repetition_penalty"),
        ({"presence_penalty": 3}, 400, "invalid_value", "presence_penalty"),
        ({"n": 0}, 400, "invalid_value", "n"),
        ({"n": True}, 400, "invalid_value", "n"),
        ({"stop": ""}, 400, "invalid_value", "stop"),
        ({"stop": ["a", ""]}, 400, "invalid_value", "stop"),
        ({"seed": "x"}, 400, "invalid_value", "seed"),
        ({"logprobs": 21}, 400, "invalid_value", "logprobs"),
        ({"logprobs": 1, "echo": True}, 400, "unsupported_parameter", "logprobs"),
        ({"best_of": 3}, 400, "unsupported_parameter", "best_of"),
        ({"suffix": "end"}, 400, "unsupported_parameter", "suffix"),
        ({"logit_bias": {"1": 5}}, 400, "unsupported_parameter", "logit_bias"),
        ({"stream_options": {"include_usage": True}}, 400, "invalid_value", "stream_options"),
        ({"stream": "yes"}, 400, "invalid_value", "stream"),
        ({"guided_json": {}}, 400, "unsupported_parameter", "guided_json"),
        ({"response_format": {"type": "json_schema"}}, 400, "unsupported_parameter", "response_format"),
    ],
)
def test_completions(gateway: Any, change: Any, status: int, code: str, param: str) -> None:
    before = len(gateway.engine.submitted)
    answer = httpx.post(f"{gateway.url}/v1/completions", json=BASE | change)
    message = check(answer, status, code, param)
    assert param.split(".", maxsplit=1)[0] in message or code in (
        "context_length_exceeded",
        "model_not_found",
    )
    assert len(gateway.engine.submitted) == before


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "hi"}, "invalid_value", "messages"),
        ({"messages": [{"content": "hi"}]}, "missing_required_parameter", "messages.0.role"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "invalid_value", "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "invalid_value", "messages.0"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "unsupported_content",
            "messages.0",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "unsupported_parameter",
            "messages.0",
        ),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, None, "messages"),
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"audio": {"voice": "a"}}, "unsupported_parameter", "audio"),
        ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
        ({"reasoning_effort": "high"}, "unsupported_parameter", "reasoning_effort"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"logprobs": 2}, "invalid_value", "logprobs"),
    ],
)
def test_chat(gateway: Any, change: Any, code: str | None, param: str) -> None:
    check(httpx.post(f"{gateway.url}/v1/chat/completions", json=CHAT | change), 400, code, param)


def test_what_changes_nothing_is_accepted(gateway: Any) -> None:
    neutral = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "logit_bias": {},
        "audio": None,
        "stop": None,
        "max_tokens": 2,
    }
    assert httpx.post(f"{gateway.url}/v1/chat/completions", json=CHAT | neutral).status_code == 200


def test_bodies_that_are_no_json(gateway: Any) -> None:
    url = f"{gateway.url}/v1/completions"
    check(httpx.post(url, content=b"{"), 400, "invalid_json")
    check(httpx.post(url, content=b""), 400, "invalid_json")
    check(
        httpx.post(url, content=b'{"model": "fake", "prompt": "a", "temperature": NaN}'),
        400,
        "invalid_value",
        "temperature",
    )
    assert httpx.post(url, content=b"[]").status_code == 400
    # A form's content type is what curl sends with -d.
    good = httpx.post(
        url,
        content=b'{"model": "fake", "prompt": "a", "max_tokens": 1}',
        headers={"content-type": "application/x-www-form-urlencoded"},
    )
    assert good.status_code == 200


def test_routes_and_methods(gateway: Any) -> None:
    check(httpx.get(f"{gateway.url}/v1/nothing"), 404, "unknown_url")
    check(httpx.get(f"{gateway.url}/nothing"), 404, "unknown_url")
    wrong = httpx.get(f"{gateway.url}/v1/completions")
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["message"]


def test_the_engine_may_refuse(open_gateway: Any) -> None:
    with open_gateway(capacity=100) as running:
        answer = httpx.post(f"{running.url}/v1/completions", json=BASE | {"max_tokens": 200, "n": 2})
        check(answer, 400, "context_length_exceeded")
        assert running.engine.running == {}


def test_api_key(open_gateway: Any) -> None:
    with open_gateway(api_key="secret") as running:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
            refused = httpx.get(f"{running.url}/v1/models", headers=headers)
            check(refused, 401, "invalid_api_key")
        check(httpx.post(f"{running.url}/v1/nothing"), 401, "invalid_api_key")
        assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}
        assert running.client(api_key="secret").models.list().data[0].id == "fake"
        with pytest.raises(openai.AuthenticationError):
            running.client(api_key="none").models.list()


def test_body_limit(open_gateway: Any) -> None:
    with open_gateway(body_bytes=1000) as running:
        url = f"{running.url}/v1/completions"
        check(httpx.post(url, content=b"x" * 1001), 413, "body_too_large")

        def drip() -> Any:
            for _ in range(20):
                yield b"x" * 100

        check(httpx.post(url, content=drip()), 413, "body_too_large")
        assert httpx.post(url, json=BASE).status_code == 200


def test_request_id(gateway: Any) -> None:
    given = httpx.get(f"{gateway.url}/version", headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    made = [httpx.get(f"{gateway.url}/version").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    bad = httpx.get(f"{gateway.url}/version", headers={"x-request-id": "x" * 200})
    assert bad.headers["x-request-id"].startswith("req-")


def test_state_routes(gateway: Any) -> None:
    assert httpx.get(f"{gateway.url}/ready").status_code == 200
    assert httpx.get(f"{gateway.url}/version").json() == {"version": "0.1.0"}
    schemas = httpx.get(f"{gateway.url}/openapi.json").json()["components"]["schemas"]
    assert "prompt" in schemas["CompletionBody"]["properties"]
    assert "messages" in schemas["ChatBody"]["properties"]
