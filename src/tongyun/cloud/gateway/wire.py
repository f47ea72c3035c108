"""Read a request's body: what OpenAI's two generation endpoints accept, and what we refuse by name.

Unknown fields are refused, because a client that asked for a tool call or a JSON schema
and silently got prose has been lied to. Fields that change nothing about the answer
(`user`, `metadata`, …) are accepted, and so is any field at the value that means "off".
Knows no tokenizer: prompts leave here as text, token lists or messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tongyun.cloud.gateway.faults import from_validation
from tongyun.errors import RequestError
from tongyun.model.options import SamplingOptions

# They name the caller, the bill or the cache, never the text.
INERT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)
# The value at which a field we do not implement asks for nothing.
OFF: Mapping[str, tuple[object, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "logit_bias": ({},),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "min_tokens": (0,),
    "length_penalty": (1, 1.0),
}

Stop = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    include_usage: bool = False


class Body(BaseModel):
    """The fields both endpoints share. Ranges are OpenAI's, widened where vLLM's users rely on more."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    service_tier: str | None = None
    """A class of service, where the server has any."""

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, top_logprobs: int | None) -> SamplingOptions:
        """The sampling of one sequence; `top_k` of 0 or −1 means all, as elsewhere."""
        return SamplingOptions(
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            top_k=self.top_k if self.top_k is not None and self.top_k > 0 else None,
            min_p=_or(self.min_p, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            seed=self.seed,
            logprobs=top_logprobs is not None,
            top_logprobs=top_logprobs or 0,
        )


class CompletionBody(Body):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt; a flat list of numbers is one prompt of tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [part for part in self.prompt if not isinstance(part, int)]


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    type: str
    text: str | None = None


class Message(BaseModel):
    """One turn. Extra fields are judged in `_turn`."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None


class ChatBody(Body):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The messages as a chat template wants them: plain text, and `system` for `developer`."""
        return [_turn(message, index) for index, message in enumerate(self.messages)]


def read_completion(body: bytes) -> CompletionBody:
    """Parse and judge a completion's body; `RequestError` names the field."""
    parsed = _parse(CompletionBody, body)
    assert isinstance(parsed, CompletionBody)
    if parsed.best_of is not None and parsed.best_of != (parsed.n or 1):
        raise _unsupported("best_of", "differs from 'n': every sequence made is returned here")
    if parsed.echo and parsed.logprobs is not None:
        raise _unsupported("logprobs", "is not available for a prompt (with 'echo')")
    if not parsed.prompt or any(len(prompt) == 0 for prompt in parsed.prompts):
        raise RequestError("'prompt' is empty", param="prompt", code="invalid_value")
    return parsed


def read_chat(body: bytes) -> ChatBody:
    """Parse and judge a chat's body; `RequestError` names the field."""
    parsed = _parse(ChatBody, body)
    assert isinstance(parsed, ChatBody)
    if parsed.top_logprobs is not None and not parsed.logprobs:
        raise RequestError(
            "'top_logprobs' needs 'logprobs': true", param="top_logprobs", code="invalid_value"
        )
    return parsed


def _parse(kind: type[Body], body: bytes) -> Body:
    try:
        parsed = kind.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from None
    for name, value in (parsed.model_extra or {}).items():
        if name not in INERT and value is not None and value not in OFF.get(name, ()):
            raise _unsupported(name, f"is not supported by this server{_accepted(name)}")
    if parsed.stream_options is not None and not parsed.stream:
        raise RequestError(
            "'stream_options' needs 'stream': true", param="stream_options", code="invalid_value"
        )
    return parsed


def _accepted(name: str) -> str:
    values = [repr(value) for value in OFF.get(name, ()) if value is not None]
    return f"; accepted: {', '.join(values)}" if values else ""


def _unsupported(name: str, why: str) -> RequestError:
    return RequestError(f"'{name}' {why}", param=name, code="unsupported_parameter")


def _turn(message: Message, index: int) -> dict[str, Any]:
    where = f"messages.{index}"
    for name, value in (message.model_extra or {}).items():
        # A client that sends an assistant's answer back includes the empty fields it came with.
        if value not in (None, [], {}):
            raise RequestError(
                f"'{where}.{name}' is not supported by this server", param=where, code="unsupported_parameter"
            )
    role = "system" if message.role == "developer" else message.role
    turn: dict[str, Any] = {"role": role, "content": _text(message, where)}
    if message.name is not None:
        turn["name"] = message.name
    return turn


def _text(message: Message, where: str) -> str:
    if message.content is None:
        if message.role == "assistant":
            return ""
        raise RequestError(f"'{where}.content' is missing", param=where, code="invalid_value")
    if isinstance(message.content, str):
        return message.content
    for number, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            raise RequestError(
                f"'{where}.content.{number}': only parts {{'type': 'text', 'text': …}} are read here, "
                f"not type '{part.type}'",
                param=where,
                code="unsupported_content",
            )
    return "".join(part.text or "" for part in message.content)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
