"""Log-probabilities in the two shapes OpenAI gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tongyun.cloud.engine.protocol import TokenScore
from tongyun.cloud.gateway.ports import Vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredToken:
    """One produced token with its alternatives; `offset` is where its text begins, in characters."""

    data: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]
    offset: int


def scored(token: int, score: TokenScore, offset: int, vocabulary: Vocabulary) -> ScoredToken:
    """A token's score with the token ids spelled out."""
    return ScoredToken(
        data=vocabulary.name_of(token),
        logprob=score.logprob,
        top=tuple((vocabulary.name_of(other), logprob) for other, logprob in score.top),
        offset=offset,
    )


def chat_logprobs(tokens: Sequence[ScoredToken]) -> dict[str, object]:
    """`choices[].logprobs` of a chat completion."""
    content = [
        _entry(token.data, token.logprob)
        | {"top_logprobs": [_entry(data, logprob) for data, logprob in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[ScoredToken]) -> dict[str, object]:
    """`choices[].logprobs` of a completion: four lists side by side."""
    return {
        "tokens": [_spell(token.data) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{_spell(data): logprob for data, logprob in token.top} for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _entry(data: bytes, logprob: float) -> dict[str, object]:
    return {"token": _spell(data), "logprob": logprob, "bytes": list(data)}


def _spell(data: bytes) -> str:
    """A part of a character has no text of its own; `bytes:\\xe4\\xb8` is how OpenAI writes it."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
