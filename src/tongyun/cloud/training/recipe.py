"""What a training run is, read from a recipe in TOML.

A recipe names data, tokenizer, shape, optimizer and evaluation; together with the
Python and PyTorch versions it decides the weights. It knows no file system beyond
its own file and holds no tensors.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tongyun.errors import SpecError, unknown
from tongyun.model.config import Experts, ModelConfig

SOURCES = ("stdlib", "directory")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which files are text to learn from, and which are kept for evaluation."""

    source: str
    path: str | None = None
    """Root of the files when `source` is `directory`; relative to the recipe."""
    exclude: tuple[str, ...] = ()
    """Shell patterns; a file is left out if any part of its path below the root matches."""
    held_out: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    vocab: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The numbers of a Qwen3-MoE; widths in elements."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    experts_per_token: int
    expert_intermediate: int
    max_positions: int
    rope_theta: float = 10_000.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Rows are `sequence` tokens long from the part `start` of the run on."""

    start: float
    sequence: int


@dataclass(frozen=True, kw_only=True)
class Training:
    tokens: int
    batch_tokens: int
    micro_tokens: int
    stages: tuple[Stage, ...]
    warmup: float = 0.02
    decay: float = 0.5
    balance: float = 0.01
    evaluate_every: int = 50
    checkpoint_every: int = 50

    @property
    def steps(self) -> int:
        return max(1, self.tokens // self.batch_tokens)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Muon for the matrices, AdamW for everything else."""

    matrix_lr: float = 0.02
    matrix_momentum: float = 0.95
    matrix_decay: float = 0.0
    other_lr: float = 0.003
    other_betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out text is read in windows of `context` tokens that move on by `stride`."""

    context: int
    stride: int
    quick_tokens: int = 16_384
    """Held-out tokens read by the evaluations during training."""
    prompts: tuple[str, ...] = ()
    """Continued by the finished model, for people to read."""
    prompt_tokens: int = 48
    temperature: float = 0.0
    """Of the continuations; 0 takes the likeliest token."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    seed: int
    data: Data
    tokenizer: Tokenizer
    model: Shape
    training: Training
    optimizer: Optimizer
    evaluation: Evaluation
    file: Path

    @classmethod
    def load(cls, file: Path) -> Recipe:
        """Read and check a recipe; every mistake is a `SpecError` with its file and key."""
        try:
            raw = tomllib.loads(file.read_text())
        except FileNotFoundError:
            raise SpecError(file, "", "no such recipe; one comes in recipes/stdlib-moe.toml") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SpecError(file, "", f"not TOML: {error}") from None
        recipe: Recipe = _build(cls, {**raw, "file": file}, file, "", hidden=("file",))
        _check(recipe)
        return recipe

    @property
    def model_config(self) -> ModelConfig:
        """The model to build. Tokens 0 and 2 end a text and a turn: see `bpe.SPECIAL`."""
        shape = self.model
        return ModelConfig(
            name=self.name,
            family="qwen3_moe",
            layers=shape.layers,
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate=shape.expert_intermediate * shape.experts_per_token,
            vocab=self.tokenizer.vocab,
            max_positions=shape.max_positions,
            rope_theta=shape.rope_theta,
            norm_eps=1e-6,
            tied=True,
            qk_norm=True,
            experts=Experts(
                count=shape.experts, per_token=shape.experts_per_token, intermediate=shape.expert_intermediate
            ),
            eos_token_ids=(0, 2),
        )


_TOML_NAMES = {"start": "from"}


def _build(kind: type, raw: Mapping[str, Any], file: Path, prefix: str, hidden: tuple[str, ...] = ()) -> Any:
    """A dataclass from a TOML table, refusing unknown, missing and mistyped keys."""
    fields = {_TOML_NAMES.get(f.name, f.name): f for f in dataclasses.fields(kind)}
    accepted = [name for name in fields if name not in hidden]
    for key in raw:
        if key not in fields:
            raise SpecError(file, prefix + key, unknown("key", key, accepted))
    types_of = typing.get_type_hints(kind)
    values = {}
    for key, field in fields.items():
        if key in raw:
            values[field.name] = _value(types_of[field.name], raw[key], file, prefix + key)
        elif field.default is dataclasses.MISSING:
            raise SpecError(file, prefix + key, f"missing; accepted keys here: {', '.join(sorted(accepted))}")
    return kind(**values)


def _value(kind: Any, raw: Any, file: Path, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(raw, dict):
            raise SpecError(file, key, f"expected a table, got {raw!r}")
        return _build(typing.cast(type, kind), raw, file, key + ".")
    if typing.get_origin(kind) is tuple:
        return _sequence(typing.get_args(kind), raw, file, key)
    if typing.get_origin(kind) is types.UnionType:
        kind = typing.get_args(kind)[0]
    if kind is float and isinstance(raw, int) and not isinstance(raw, bool):
        raw = float(raw)
    if not isinstance(raw, kind) or (isinstance(raw, bool) and kind is not bool):
        raise SpecError(file, key, f"expected {_KINDS[kind]}, got {raw!r}")
    if isinstance(raw, float) and not math.isfinite(raw):
        raise SpecError(file, key, f"expected a finite number, got {raw!r}")
    return raw


_KINDS = {int: "a whole number", float: "a number", str: "text", Path: "a path"}


def _sequence(items: tuple[Any, ...], raw: Any, file: Path, key: str) -> tuple[Any, ...]:
    if not isinstance(raw, list):
        raise SpecError(file, key, f"expected a list, got {raw!r}")
    kinds = (items[0],) * len(raw) if items[-1] is Ellipsis else items
    if len(kinds) != len(raw):
        raise SpecError(file, key, f"expected {len(kinds)} values, got {len(raw)}")
    return tuple(
        _value(kind, value, file, f"{key}[{i}]")
        for i, (kind, value) in enumerate(zip(kinds, raw, strict=True))
    )


def _check(recipe: Recipe) -> None:
    """Values that fit their type but not each other."""
    need = _Needs(recipe.file)
    need(recipe.seed >= 0, "seed", "expected 0 or more")
    _check_data(recipe, need)
    _check_shape(recipe.model, need)
    _check_training(recipe, need)
    for key in ("matrix_lr", "other_lr", "clip"):
        need(getattr(recipe.optimizer, key) > 0, f"optimizer.{key}", "expected a number above 0")
    betas = (recipe.optimizer.matrix_momentum, *recipe.optimizer.other_betas)
    need(all(0 <= beta < 1 for beta in betas), "optimizer", "momentum and betas go from 0 to below 1")
    evaluation = recipe.evaluation
    need(
        0 < evaluation.context <= recipe.model.max_positions, "evaluation.context", "from 1 to max_positions"
    )
    need(0 < evaluation.stride <= evaluation.context, "evaluation.stride", "from 1 to context")
    need(evaluation.temperature >= 0, "evaluation.temperature", "expected 0 or more")
    for key in ("quick_tokens", "prompt_tokens"):
        need(getattr(evaluation, key) > 0, f"evaluation.{key}", "expected a number above 0")


@dataclass(frozen=True)
class _Needs:
    """Refuses a key of one file unless a condition holds."""

    file: Path

    def __call__(self, good: bool, key: str, problem: str) -> None:
        if not good:
            raise SpecError(self.file, key, problem)


def _check_data(recipe: Recipe, need: _Needs) -> None:
    data, vocab = recipe.data, recipe.tokenizer.vocab
    need(data.source in SOURCES, "data.source", unknown("source", data.source, SOURCES))
    need(data.source == "stdlib" or bool(data.path), "data.path", "needed for source 'directory'")
    need(bool(data.held_out), "data.held_out", "name at least one file, or nothing can be evaluated")
    need(vocab >= 300, "tokenizer.vocab", "at least 300: 256 bytes and the special tokens")
    need(vocab <= 65_536, "tokenizer.vocab", "at most 65536: tokens are stored in 16 bits")


def _check_shape(shape: Shape, need: _Needs) -> None:
    for field in dataclasses.fields(shape):
        need(getattr(shape, field.name) > 0, f"model.{field.name}", "expected a number above 0")
    need(shape.heads % shape.kv_heads == 0, "model.kv_heads", f"must divide heads ({shape.heads})")
    need(shape.head_dim % 2 == 0, "model.head_dim", "must be even for rotary positions")
    few = f"at most experts ({shape.experts})"
    need(shape.experts_per_token <= shape.experts, "model.experts_per_token", few)


def _check_training(recipe: Recipe, need: _Needs) -> None:
    training = recipe.training
    for key in ("tokens", "batch_tokens", "micro_tokens", "evaluate_every", "checkpoint_every"):
        need(getattr(training, key) > 0, f"training.{key}", "expected a number above 0")
    need(
        training.batch_tokens % training.micro_tokens == 0,
        "training.micro_tokens",
        "must divide batch_tokens",
    )
    starts = [stage.start for stage in training.stages]
    need(bool(starts) and starts[0] == 0, "training.stages", "the first must be from 0.0")
    need(
        starts == sorted(set(starts)) and starts[-1] < 1,
        "training.stages",
        "`from` must rise and stay below 1",
    )
    for i, stage in enumerate(training.stages):
        fits = (
            0 < stage.sequence <= recipe.model.max_positions and training.micro_tokens % stage.sequence == 0
        )
        need(fits, f"training.stages[{i}].sequence", "must divide micro_tokens and be at most max_positions")
    for key in ("warmup", "decay"):
        need(0 <= getattr(training, key) <= 1, f"training.{key}", "a part of the run, from 0 to 1")
    need(training.balance >= 0, "training.balance", "expected 0 or more")
