"""Find out how to load an endpoint: its model, and how to hand it a prompt of exact length.

Token ids are exact wherever they are accepted. Elsewhere prompts are words whose token
counts the endpoint itself reports. Nothing here is timed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tongyun.cloud.http import Answer, Client, Origin
from tongyun.cloud.sched.request import Request
from tongyun.cloud.streamed import read_refusal
from tongyun.errors import InputError, ServiceError, unknown

Api = Literal["completions", "chat"]
APIS: tuple[Api, ...] = ("completions", "chat")
_PATH = {"completions": "/completions", "chat": "/chat/completions"}

# Ids that every vocabulary has, where a server does not say how many it has.
_SAFE_VOCABULARY = 1000
_WORDS = (
    *(" the", " of", " and", " to", " in", " is", " for", " on", " with", " as", " at", " by"),
    *("a", "e", "i", "o", "u", "x", "z", "0", "1", "2"),
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """An endpoint as the user names it."""

    url: str
    model: str | None = None
    """None: the first that the endpoint lists."""
    api: Api = "completions"
    api_key: str | None = None

    def client(self) -> Client:
        """Connections to the endpoint, none open yet."""
        if self.api not in APIS:
            raise InputError(unknown("endpoint", self.api, APIS))
        headers = {"content-type": "application/json", "user-agent": "tongyun"}
        if self.api_key:
            headers["authorization"] = f"Bearer {self.api_key}"
        return Client(Origin.parse(self.url), headers)


@dataclass(frozen=True, kw_only=True)
class Words:
    """Text of a known number of tokens: `texts` of one token each, around a fixed `overhead`."""

    texts: tuple[str, ...]
    overhead: int

    def spell(self, prompt: Sequence[int]) -> str:
        """One word a token, the same word for the same token, so that shared beginnings stay shared."""
        return "".join(self.texts[token % len(self.texts)] for token in prompt[: len(prompt) - self.overhead])


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """How to speak to a probed endpoint."""

    target: Target
    model: str
    vocabulary: int
    context_tokens: int | None = None
    words: Words | None = None
    """How prompts are spelled; `None` where token ids are accepted."""
    ignore_eos: bool = True
    """Whether the endpoint can be told to go on to the asked length."""

    @property
    def path(self) -> str:
        return _PATH[self.target.api]

    def body(self, request: Request) -> bytes:
        """The streamed request's body."""
        prompt: Sequence[int] | str = (
            request.prompt if self.words is None else self.words.spell(request.prompt)
        )
        body = _ask(self.target.api, self.model, prompt, request.output_tokens, self.ignore_eos)
        return json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()


async def probe(target: Target, client: Client) -> Endpoint:
    """Ask an endpoint what it serves and how it takes prompts; `ServiceError` where it does not answer."""
    model, card = await _model(target, client)
    vocabulary = card.get("vocab_size") or _SAFE_VOCABULARY
    context = card.get("max_model_len")
    found = _Prober(target, client, model)
    ignore_eos = await found.takes_ignore_eos()
    words = None
    if target.api == "chat" or not await found.takes_tokens(ignore_eos):
        words = await found.words(ignore_eos)
    return Endpoint(
        target=target,
        model=model,
        vocabulary=vocabulary,
        context_tokens=context,
        words=words,
        ignore_eos=ignore_eos,
    )


async def _model(target: Target, client: Client) -> tuple[str, dict[str, Any]]:
    """The model to ask for and what the endpoint says of it."""
    answer = await client.send("GET", "/models")
    if answer.status != 200:
        if target.model is not None and answer.status in (404, 405):
            return target.model, {}
        raise _failed("GET /models", answer)
    try:
        cards = {card["id"]: card for card in json.loads(answer.body)["data"]}
    except (ValueError, KeyError, TypeError):
        raise ServiceError(f"{target.url}: GET /models is not a list of models") from None
    if target.model is None:
        if not cards:
            raise ServiceError(f"{target.url}: serves no model")
        return next(iter(cards.items()))
    if target.model not in cards:
        raise InputError(f"--model: {unknown('model', target.model, cards)}")
    return target.model, cards[target.model]


class _Prober:
    """Asks one-token questions."""

    def __init__(self, target: Target, client: Client, model: str) -> None:
        self._target, self._client, self._model = target, client, model

    async def takes_ignore_eos(self) -> bool:
        """Whether `ignore_eos` is accepted; OpenAI itself refuses it."""
        if (await self._send("a", True)).status == 200:
            return True
        answer = await self._send("a", False)
        if answer.status != 200:
            raise _failed("a first request", answer)
        return False

    async def takes_tokens(self, ignore_eos: bool) -> bool:
        answer = await self._send([0, 1, 2, 3], ignore_eos)
        return answer.status == 200 and _prompt_tokens(answer) == 4

    async def words(self, ignore_eos: bool) -> Words:
        """Words of one token each; the difference of two lengths cancels what the endpoint adds."""
        kept, overhead = [], 0
        for word in _WORDS:
            short = _prompt_tokens(await self._send(word * 16, ignore_eos))
            long = _prompt_tokens(await self._send(word * 48, ignore_eos))
            if long - short == 32:
                kept.append(word)
                overhead = short - 16
        if not kept:
            raise ServiceError(
                f"{self._target.url}: cannot build prompts of exact length: it takes no token ids, "
                "and none of the words tried is one token"
            )
        together = _prompt_tokens(await self._send("".join(kept) * 4, ignore_eos))
        # Words that melt into each other are worth less than one repeated word.
        texts = tuple(kept) if together == overhead + 4 * len(kept) else (kept[0],)
        return Words(texts=texts, overhead=overhead)

    async def _send(self, prompt: Sequence[int] | str, ignore_eos: bool) -> Answer:
        body = _ask(self._target.api, self._model, prompt, 1, ignore_eos)
        return await self._client.send("POST", _PATH[self._target.api], json.dumps(body).encode())


def _ask(
    api: Api, model: str, prompt: Sequence[int] | str, output_tokens: int, ignore_eos: bool
) -> dict[str, object]:
    body: dict[str, object] = {"model": model, "max_tokens": output_tokens, "temperature": 0}
    if api == "chat":
        body["messages"] = [{"role": "user", "content": prompt}]
    else:
        body["prompt"] = list(prompt) if not isinstance(prompt, str) else prompt
    if ignore_eos:
        body["ignore_eos"] = True
    return body


def _prompt_tokens(answer: Answer) -> int:
    if answer.status != 200:
        raise _failed("a probe of its token counts", answer)
    try:
        return int(json.loads(answer.body)["usage"]["prompt_tokens"])
    except (ValueError, KeyError, TypeError):
        raise ServiceError(
            "the endpoint does not report usage.prompt_tokens; exact prompts need it"
        ) from None


def _failed(what: str, answer: Answer) -> ServiceError:
    outcome = read_refusal(answer)
    return ServiceError(f"{what} failed: {outcome.error}: {outcome.detail}")
