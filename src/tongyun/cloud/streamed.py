"""Read a streamed completion after the fact: its first and last token, its counts, its errors.

Only the two ends are parsed. What lies between tells nothing that a request's latencies
need, and parsing it would cost the machine that is being measured.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from tongyun.cloud.http import Answer


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one answer says; `None` where it does not say."""

    first_token_s: float | None = None
    last_token_s: float | None = None
    chunks: int = 0
    """Events that carried a choice."""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int = 0
    finish: str | None = None
    error: str | None = None
    """The kind of failure, the same for failures of one kind."""
    detail: str | None = None
    """The failure in the server's words."""


def read_stream(answer: Answer) -> Outcome:
    """The outcome of a server-sent event stream, or of the error that came in its place."""
    if answer.status != 200:
        return read_refusal(answer)
    events = _Events(answer)
    if not events.found:
        return Outcome(error="empty stream", detail="no events in the answer")
    first = next((i for i in range(len(events.found)) if _has_token(events.parsed(i))), None)
    tail = _Tail(events)
    if tail.problem is not None:
        error, detail = tail.problem
        last_s = None if tail.last is None else events.moment(tail.last)
        return Outcome(
            first_token_s=None if first is None else events.moment(first),
            last_token_s=last_s,
            chunks=len(events.found),
            error=error,
            detail=detail,
        )
    usage = tail.usage or {}
    return Outcome(
        first_token_s=None if first is None else events.moment(first),
        last_token_s=None if tail.last is None else events.moment(tail.last),
        chunks=0 if first is None or tail.last is None else tail.last - first + 1,
        prompt_tokens=usage.get("prompt_tokens"),
        output_tokens=usage.get("completion_tokens"),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        finish=tail.finish,
    )


def read_refusal(answer: Answer) -> Outcome:
    """A status other than 200 with OpenAI's error object, or with anything else."""
    try:
        error = json.loads(answer.body)["error"]
        kind, message = error.get("code") or error.get("type"), str(error.get("message"))
    except (ValueError, KeyError, TypeError, AttributeError):
        kind, message = None, answer.body[:200].decode(errors="replace")
    return Outcome(error=f"HTTP {answer.status}" + (f" {kind}" if kind else ""), detail=message)


class _Events:
    """The `data:` payloads of a stream and when each was complete."""

    def __init__(self, answer: Answer) -> None:
        body = answer.body
        gap = b"\r\n\r\n" if b"\r\n\r\n" in body else b"\n\n"
        self._moments = [moment for moment, _ in answer.pieces]
        self._ends = list(accumulate(len(data) for _, data in answer.pieces))
        self.found: list[bytes] = []
        self._end_of: list[int] = []
        self.done = False
        at = 0
        while (end := body.find(gap, at)) >= 0:
            self._add(body[at:end], end + len(gap))
            at = end + len(gap)

    def _add(self, event: bytes, end: int) -> None:
        if not event.startswith(b"data:"):
            return
        payload = event[5:].strip()
        if payload == b"[DONE]":
            self.done = True
            return
        self.found.append(payload)
        self._end_of.append(end)

    def moment(self, index: int) -> float:
        """When the last byte of an event arrived."""
        return self._moments[bisect_left(self._ends, self._end_of[index])]

    def parsed(self, index: int) -> dict[str, Any]:
        """One event; an unreadable one is empty."""
        try:
            event = json.loads(self.found[index])
        except ValueError:
            return {}
        return event if isinstance(event, dict) else {}


class _Tail:
    """What the end of a stream says, read backwards to the last choice."""

    def __init__(self, events: _Events) -> None:
        self.usage: dict[str, Any] | None = None
        self.finish: str | None = None
        self.last: int | None = None
        self.problem: tuple[str, str] | None = None
        for index in reversed(range(len(events.found))):
            event = events.parsed(index)
            if event.get("error"):
                self.problem = _stream_error(event["error"])
            self.usage = self.usage or event.get("usage")
            if event.get("choices"):
                self.last = index
                self.finish = event["choices"][0].get("finish_reason")
                break
        if self.problem is None and self.finish is None and not events.done:
            self.problem = ("stream cut", "the stream ended without a finish reason or [DONE]")


def _stream_error(error: Any) -> tuple[str, str]:
    if not isinstance(error, dict):
        return "stream error", str(error)
    kind = error.get("code") or error.get("type")
    return "stream error" + (f" {kind}" if kind else ""), str(error.get("message"))


def _has_token(event: dict[str, Any]) -> bool:
    """A completion's event with a choice; a chat's, unless it only names the role."""
    for choice in event.get("choices") or ():
        delta = choice.get("delta")
        if delta is None:
            return True
        content = [value for key, value in delta.items() if key != "role"]
        if any(content) or ("role" not in delta and any(value is not None for value in content)):
            return True
    return False
