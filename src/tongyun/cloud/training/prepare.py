"""From a recipe to the tokens that are trained on: read, split, learn the tokenizer, encode.

It decides the digest that ties a checkpoint to its recipe and data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

import numpy as np

from tongyun.cloud.training.bpe import Bpe
from tongyun.cloud.training.corpus import Corpus, encode, gather
from tongyun.cloud.training.loop import Tokens
from tongyun.cloud.training.recipe import Recipe
from tongyun.errors import SpecError


@dataclass(frozen=True, kw_only=True)
class Prepared:
    corpus: Corpus
    bpe: Bpe
    tokens: Tokens
    digest: str


def prepare(recipe: Recipe) -> Prepared:
    """Everything that comes before the first step; the same inputs give the same digest."""
    corpus = gather(recipe)
    bpe = Bpe.train(corpus.train, recipe.tokenizer.vocab)
    if bpe.size != recipe.tokenizer.vocab:
        raise SpecError(
            recipe.file, "tokenizer.vocab", f"the corpus yields only {bpe.size} tokens; ask for fewer"
        )
    train, held_out = encode(corpus.train, bpe), encode(corpus.held_out, bpe)
    context = recipe.evaluation.context
    # Stretches spread over all of it, so that the quick score has a little of many files.
    stretches = max(1, min(len(held_out), recipe.evaluation.quick_tokens) // context)
    starts = [i * len(held_out) // stretches for i in range(stretches)]
    quick = np.concatenate([held_out[start : start + context] for start in starts])
    tokens = Tokens(train=train, quick=quick)
    return Prepared(corpus=corpus, bpe=bpe, tokens=tokens, digest=_digest(recipe, tokens))


def _digest(recipe: Recipe, tokens: Tokens) -> str:
    """SHA-256 over what decides the weights: seed, shape, schedule, optimizer and tokens."""
    parts = {
        "seed": recipe.seed,
        "model": dataclasses.asdict(recipe.model),
        "training": dataclasses.asdict(recipe.training),
        "optimizer": dataclasses.asdict(recipe.optimizer),
    }
    total = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    total.update(tokens.train.astype("<u2").tobytes())
    return total.hexdigest()
