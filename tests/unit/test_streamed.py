"""What the load generator reads out of an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tongyun.cloud.http import Answer
from tongyun.cloud.streamed import read_stream


def event(choice: dict[str, Any] | None, **more: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [choice] if choice else [], **more}).encode() + b"\n\n"


def streamed(*pieces: tuple[float, bytes]) -> Answer:
    return Answer(200, {}, list(pieces))


def refusal(status: int, body: bytes) -> Answer:
    return Answer(status, {}, [(1.0, body)])


USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
TEXT, LAST = {"text": "a", "finish_reason": None}, {"text": "", "finish_reason": "length"}


@pytest.mark.parametrize("gap", [b"\n\n", b"\r\n\r\n"])
def test_first_and_last_token_and_usage(gap: bytes) -> None:
    pieces = [(1.0, event(TEXT)), (2.0, event(TEXT)), (3.0, event(LAST)), (4.0, event(None, usage=USAGE))]
    answer = streamed(
        *((at, data.replace(b"\n\n", gap)) for at, data in pieces), (5.0, b"data: [DONE]" + gap)
    )
    outcome = read_stream(answer)
    assert (outcome.first_token_s, outcome.last_token_s, outcome.chunks) == (1.0, 3.0, 3)
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.cached_tokens) == (7, 3, 4)
    assert (outcome.finish, outcome.error) == ("length", None)


def test_an_event_arrives_with_its_last_byte() -> None:
    whole = event(TEXT)
    outcome = read_stream(
        streamed((1.0, whole[:9]), (2.0, whole[9:] + event(LAST)[:5]), (3.0, event(LAST)[5:]))
    )
    assert (outcome.first_token_s, outcome.last_token_s) == (2.0, 3.0)
    assert outcome.output_tokens is None


def test_the_event_that_names_the_role_is_no_token() -> None:
    role = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    content = {"delta": {"content": "a"}, "finish_reason": None}
    end = {"delta": {}, "finish_reason": "stop"}
    outcome = read_stream(streamed((1.0, event(role)), (2.0, event(content)), (3.0, event(end))))
    assert (outcome.first_token_s, outcome.last_token_s, outcome.finish) == (2.0, 3.0, "stop")


@pytest.mark.parametrize(
    ("answer", "error", "detail"),
    [
        (refusal(429, b'{"error": {"message": "slow", "code": "limit"}}'), "HTTP 429 limit", "slow"),
        (refusal(502, b"<html>"), "HTTP 502", "<html>"),
        (refusal(500, b'{"error": "boom"}'), "HTTP 500", '{"error": "boom"}'),
        (streamed(), "empty stream", "no events in the answer"),
        (streamed((1.0, event(TEXT))), "stream cut", "the stream ended without a finish reason or [DONE]"),
        (
            streamed((1.0, event(TEXT)), (2.0, b'data: {"error": {"message": "oom", "code": "engine"}}\n\n')),
            "stream error engine",
            "oom",
        ),
    ],
)
def test_failures_have_a_kind_and_a_detail(answer: Answer, error: str, detail: str) -> None:
    outcome = read_stream(answer)
    assert (outcome.error, outcome.detail) == (error, detail)
