"""The bytes that leave: server-sent events written from a template, and whole answers.

A chunk differs from its neighbour in one string, so the JSON around it is written once
a request; the string is quoted by the C encoder of the standard library. It stays ASCII.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from tongyun.cloud.gateway.faults import fault_object
from tongyun.cloud.gateway.scores import ScoredToken, chat_logprobs, completion_logprobs
from tongyun.errors import RequestError

quote = json.encoder.encode_basestring_ascii
DONE = "data: [DONE]\n\n"


class Frames:
    """Writes one stream's events."""

    __slots__ = ("_begun", "_chat", "_head", "_tail")

    def __init__(self, kind: str, id: str, created: int, model: str, usage: bool) -> None:
        self._chat = kind == "chat.completion"
        name = "chat.completion.chunk" if self._chat else kind
        fixed = json.dumps({"id": id, "object": name, "created": created, "model": model})
        self._head = f'data: {fixed[:-1]}, "choices": ['
        # OpenAI sends a null usage on every chunk of a stream that will end with one.
        self._tail = '], "usage": null}\n\n' if usage else "]}\n\n"
        self._begun: set[int] = set()

    def chunk(
        self, index: int, text: str, finish: str | None = None, scores: Sequence[ScoredToken] | None = None
    ) -> str:
        """One token of one choice. A chat choice begins with the event that names its role."""
        end = "null" if finish is None else f'"{finish}"'
        if not self._chat:
            logprobs = "null" if scores is None else json.dumps(completion_logprobs(scores))
            return (
                f'{self._head}{{"index": {index}, "text": {quote(text)}, "logprobs": {logprobs}, '
                f'"finish_reason": {end}}}{self._tail}'
            )
        logprobs = "null" if scores is None else json.dumps(chat_logprobs(scores))
        event = (
            f'{self._head}{{"index": {index}, "delta": {{"content": {quote(text)}}}, "logprobs": {logprobs}, '
            f'"finish_reason": {end}}}{self._tail}'
        )
        return event if index in self._begun else self._role(index) + event

    def _role(self, index: int) -> str:
        self._begun.add(index)
        return (
            f'{self._head}{{"index": {index}, "delta": {{"role": "assistant", "content": ""}}, '
            f'"logprobs": null, "finish_reason": null}}{self._tail}'
        )

    def usage(self, usage: Mapping[str, object]) -> str:
        """The event without choices that closes a stream which asked for its usage."""
        return f'{self._head}], "usage": {json.dumps(usage)}}}\n\n'


def fault_event(fault: RequestError) -> str:
    """An error in a stream whose status line is already gone."""
    return f"data: {json.dumps(fault_object(fault))}\n\n"


def whole(kind: str, id: str, created: int, model: str) -> dict[str, object]:
    """The envelope of an unstreamed answer."""
    return {"id": id, "object": kind, "created": created, "model": model}


def whole_choice(
    kind: str, index: int, text: str, finish: str | None, scores: Sequence[ScoredToken] | None
) -> dict[str, object]:
    """One choice of an unstreamed answer."""
    if kind == "chat.completion":
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None if scores is None else chat_logprobs(scores),
            "finish_reason": finish,
        }
    return {
        "index": index,
        "text": text,
        "logprobs": None if scores is None else completion_logprobs(scores),
        "finish_reason": finish,
    }
