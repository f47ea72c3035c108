"""Text where there is no model: words to answer with, and a stand-in for a tokenizer.

A fleet is simulated by numbers of tokens, so that any text of the right length will do.
The stand-in counts about as common tokenizers do on English (a short word is a token), gives
equal text equal tokens, and reads its own words back as the tokens they were: a
conversation that repeats them is found in the prefix cache.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

SENTENCE = (
    "the answer of this endpoint is filler no model ran and its words say nothing about your question "
    "only their number and moments are those a fleet would have given"
)
WORDS = tuple(dict.fromkeys(SENTENCE.split()))
"""Each a token of its own, in the stand-in's count and in those of most models."""
_PIECE = re.compile(r" ?[^\W_]{1,8}| ?[^\w\s]|\s|_")
"""A word of up to eight letters with the space before it, a sign, a white space."""


class Filler:
    """A tokenizer and a vocabulary of `size` tokens, of which the first are `words`."""

    def __init__(self, size: int) -> None:
        if size <= len(WORDS):
            raise ValueError(f"{size} tokens are too few; at least {len(WORDS) + 1}")
        self._size = size
        self._texts = [f" {word}" for word in WORDS]
        self._tokens = {text: token for token, text in enumerate(self._texts)}
        self.words = range(len(WORDS))
        """Tokens to answer with."""

    def encode(self, text: str) -> list[int]:
        known, own = self._tokens, len(self._texts)
        return [
            known[piece] if piece in known else own + crc32(piece.encode()) % (self._size - own)
            for piece in _PIECE.findall(text)
        ]

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.bytes_of, tokens)).decode()

    def chat(self, messages: Sequence[Mapping[str, Any]], **template: Any) -> list[int]:
        # No space after the colon: an answer brings its own, and is sent back with it.
        return self.encode("".join(f"{one['role']}:{one['content']}\n" for one in messages) + "assistant:")

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to the text; those that stand for others' text have a word for it too."""
        return self._texts[token % len(self._texts)].encode()

    def name_of(self, token: int) -> bytes:
        return self.bytes_of(token)
