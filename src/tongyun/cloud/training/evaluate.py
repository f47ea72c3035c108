"""Bits per byte of held-out text.

Text is read in windows; every token is scored exactly once, with at least
`context − stride` tokens before it where the text has them. It knows no optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tongyun.cloud.training.corpus import Document, Encoder, encode
from tongyun.cloud.training.forward import token_losses
from tongyun.model.qwen3 import Qwen3


@dataclass(frozen=True, kw_only=True)
class Score:
    """Nats over the tokens that were scored, and the bytes of text those tokens spell."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """nats / ln 2 / bytes: comparable between tokenizers, unlike loss per token."""
        return self.nats / math.log(2) / self.bytes

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    def __add__(self, other: Score) -> Score:
        return Score(
            nats=self.nats + other.nats, tokens=self.tokens + other.tokens, bytes=self.bytes + other.bytes
        )


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first scored) over the targets 1 … length−1 of a row of `length` tokens.

    The inputs are start … stop−1, the targets one further; every target is scored once.
    """
    scored = 0
    while scored < length - 1:
        stop = min(length - 1, context if scored == 0 else scored + stride)
        yield max(0, stop - context), stop, scored
        scored = stop


@torch.no_grad()
def score_tokens(model: Qwen3, tokens: NDArray[np.uint16], *, context: int, stride: int) -> tuple[float, int]:
    """Nats and number of all tokens after the first, each seen once."""
    row = torch.from_numpy(tokens.astype(np.int64))
    nats, count = 0.0, 0
    for start, stop, scored in windows(len(row), context, stride):
        losses = token_losses(model, row[None, start:stop], row[None, start + 1 : stop + 1])
        nats += float(losses[scored - start :].double().sum())
        count += stop - scored
    return nats, count


def score(
    model: Qwen3, documents: Iterable[Document], encoder: Encoder, *, context: int, stride: int
) -> dict[str, Score]:
    """A score for every document, each read from its own beginning.

    A document starts and ends with `<|endoftext|>`; predicting that end costs nats but
    adds no bytes, as an archive's length field would.
    """
    scores = {}
    for document in documents:
        tokens = encode([document], encoder)
        nats, count = score_tokens(model, tokens, context=context, stride=stride)
        scores[document.name] = Score(nats=nats, tokens=count, bytes=document.size_bytes)
    return scores


def total(scores: Iterable[Score]) -> Score:
    """All scores as one: bits per byte are weighted by bytes, not by files."""
    return sum(scores, start=Score(nats=0.0, tokens=0, bytes=0))
