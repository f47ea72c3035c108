"""From a body to an `Ask`: tokenise the prompts and hold them against the context."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tongyun.cloud.gateway.exchange import Ask, Kind
from tongyun.cloud.gateway.faults import Refused
from tongyun.cloud.gateway.ports import Tokenizer, Vocabulary
from tongyun.cloud.gateway.wire import Body, ChatBody, CompletionBody
from tongyun.errors import RequestError, unknown
from tongyun.model.options import SamplingOptions

# Tokenising runs at roughly a megabyte a second: below this it is cheaper than a thread hop.
_LONG_CHARACTERS = 20_000
_DEFAULT_OUTPUT_TOKENS = 16  # of a completion; OpenAI's default


@dataclass(frozen=True, kw_only=True)
class Served:
    """The model behind the endpoint. `names` are what a client may call it; the first is its own."""

    names: tuple[str, ...]
    context_tokens: int
    vocab: int
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    created: int
    answer_tokens: int | None = None
    """Of a chat that names no limit; None: as many as the context leaves."""


def find(name: str, models: Sequence[Served]) -> Served:
    """The model that is called `name`; `model_not_found` where none is."""
    for one in models:
        if name in one.names:
            return one
    names = [each for one in models for each in one.names]
    raise Refused(404, unknown("model", name, names), param="model", code="model_not_found")


async def ask_completion(body: CompletionBody, served: Served) -> Ask:
    """A completion's ask; every prompt of a list is a prompt of its own."""
    prompts = [await _tokens(prompt, served) for prompt in body.prompts]
    echoes = (
        [p if isinstance(p, str) else served.tokenizer.decode(p) for p in body.prompts] if body.echo else []
    )
    sampling = body.sampling(body.logprobs)
    return _ask(
        body,
        "text_completion",
        served,
        prompts,
        _Extra(body.max_tokens or _DEFAULT_OUTPUT_TOKENS, sampling, echoes),
    )


async def ask_chat(body: ChatBody, served: Served) -> Ask:
    """A chat's ask; without a limit of its own it may fill the context."""
    prompt = await asyncio.to_thread(_chat, body.turns, body.chat_template_kwargs or {}, served.tokenizer)
    limit = body.max_completion_tokens or body.max_tokens
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = body.sampling(top_logprobs)
    return _ask(body, "chat.completion", served, [prompt], _Extra(limit, sampling, []))


@dataclass(frozen=True)
class _Extra:
    """What the two endpoints derive each in its own way."""

    output_tokens: int | None
    sampling: SamplingOptions
    echoes: Sequence[str]


def _ask(body: Body, kind: Kind, served: Served, prompts: Sequence[tuple[int, ...]], extra: _Extra) -> Ask:
    prefix = "chatcmpl" if kind == "chat.completion" else "cmpl"
    return Ask(
        id=f"{prefix}-{uuid.uuid4().hex}",
        kind=kind,
        model=body.model,
        created=int(time.time()),
        prompts=tuple(prompts),
        n=body.n or 1,
        output_tokens=tuple(_room(len(prompt), extra.output_tokens, served) for prompt in prompts),
        sampling=extra.sampling,
        stops=body.stops,
        stop_token_ids=frozenset(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        stream=bool(body.stream),
        include_usage=body.include_usage,
        echoes=tuple(extra.echoes),
    )


def _room(prompt_tokens: int, asked: int | None, served: Served) -> int:
    """Tokens a sequence may produce: what was asked for, else what the context leaves."""
    left = served.context_tokens - prompt_tokens
    if left < (asked or 1):
        wanted = "" if asked is None else f" and asks for {asked} more"
        raise RequestError(
            f"this model's context is {served.context_tokens} tokens; the prompt has {prompt_tokens}{wanted}",
            param="max_tokens" if left > 0 else "prompt",
            code="context_length_exceeded",
        )
    return min(left, served.answer_tokens or left) if asked is None else asked


async def _tokens(prompt: str | list[int], served: Served) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        if max(prompt) >= served.vocab:
            raise RequestError(
                f"'prompt': {max(prompt)} is no token id; accepted: 0 … {served.vocab - 1}",
                param="prompt",
                code="invalid_value",
            )
        return tuple(prompt)
    if len(prompt) > _LONG_CHARACTERS:
        return tuple(await asyncio.to_thread(served.tokenizer.encode, prompt))
    return tuple(served.tokenizer.encode(prompt))


def _chat(
    turns: Sequence[Mapping[str, Any]], options: Mapping[str, Any], tokenizer: Tokenizer
) -> tuple[int, ...]:
    return tuple(tokenizer.chat(turns, **options))
