"""One step of a model as operators, and what the operators add up to.

`step` is the one place that turns a model, a load and a cut into a graph; counts of
parameters, FLOPs and KV bytes are sums over it, so that what is priced and what is
counted cannot drift apart. It knows no chip.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from tongyun.model.config import ModelConfig
from tongyun.model.graph import Kind, Operator, Precision, StepShape
from tongyun.model.layers import Layers
from tongyun.model.products import elementwise, matmul
from tongyun.model.shard import Shard, Slice, slice_of
from tongyun.units import DType, Number

WHOLE = Shard()
PLAIN = Precision()


def step(
    config: ModelConfig,
    shape: StepShape,
    shard: Shard = WHOLE,
    precision: Precision = PLAIN,
    *,
    stage: int = 0,
) -> tuple[Operator, ...]:
    """The operators that one rank of pipeline stage `stage` runs for one step.

    `shape` is the load of one attention group (of the dp groups of a replica); experts
    see the tokens of all dp groups. An illegal cut raises `Infeasible`.
    """
    part = slice_of(config, shard, stage)
    layers = Layers(config=config, part=part, shape=shape, precision=precision)
    operators = [*_entry(layers), *layers.attention(), *layers.feed_forward(), *_exit(layers)]
    return tuple(operators)


def layer_operators(
    config: ModelConfig, shape: StepShape, shard: Shard, precision: Precision
) -> dict[str, tuple[Operator, ...]]:
    """The operators of one layer of each kind, of entry, exit and hand-over, each once.

    With `layer_counts` of a stage they make up `step`: pipeline stages differ only in how
    often each comes, so that many cuts share one price list.
    """
    whole = slice_of(config, replace(shard, pp=1))

    def of(**counts: int) -> Layers:
        none = replace(whole, full_layers=0, window_layers=0, dense_layers=0, sparse_layers=0)
        part = replace(none, shard=shard, first=shard.pp == 1, **counts)  # type: ignore[arg-type]
        return Layers(config=config, part=part, shape=shape, precision=precision)

    bare = of()
    return {
        "entry": tuple(_entry(replace(bare, part=replace(bare.part, first=True)))),
        "full": tuple(of(full_layers=1).attention()),
        "windowed": tuple(of(window_layers=1).attention()) if config.window_layers else (),
        "dense": tuple(of(dense_layers=1).feed_forward()) if whole.dense_layers else (),
        "sparse": tuple(of(sparse_layers=1).feed_forward()) if whole.sparse_layers else (),
        "exit": tuple(_exit(bare)),
        "hand_over": hand_overs(config, shape, shard, precision),
    }


def hand_overs(
    config: ModelConfig, shape: StepShape, shard: Shard, precision: Precision
) -> tuple[Operator, ...]:
    """What passes a step's activations on to the next stage; nothing where there is one stage."""
    if shard.pp == 1:
        return ()
    part = replace(slice_of(config, shard), last=False)
    return tuple(_exit(Layers(config=config, part=part, shape=shape, precision=precision)))


def draft_operators(
    config: ModelConfig, shape: StepShape, shard: Shard, precision: Precision
) -> tuple[Operator, ...]:
    """One run of a module that drafts the token after next, as DeepSeek-V3's prediction layer does:
    hidden state and embedding joined, one layer, and the model's own norm and head."""
    kinds = layer_operators(config, shape, replace(shard, pp=1), precision)
    whole = slice_of(config, replace(shard, pp=1))
    layers = Layers(config=config, part=whole, shape=shape, precision=precision)
    size = (shape.tokens, 2 * config.hidden, config.hidden // shard.tp)
    join = matmul("join", size, layers.projection, repeat=1, bias=False)
    layer = (*kinds["full"], *kinds["sparse" if whole.sparse_layers else "dense"])
    head = (replace(op, resident_bytes=0) for op in kinds["exit"])
    return tuple(replace(op, name=f"draft_{op.name}") for op in (join, *layer, *head))


def drafting(
    config: ModelConfig, shape: StepShape, shard: Shard, precision: Precision, draft_tokens: int
) -> tuple[Operator, ...]:
    """What drafting so many tokens adds to a step of this shape on the last stage; nothing for none.

    The first draft also takes the chunk of prompt tokens; the others follow for decoding sequences.
    """
    if not draft_tokens:
        return ()
    if shape.decode is None:
        return draft_operators(config, shape, shard, precision)
    decode = replace(shape.decode, new=1)
    first = StepShape(decode=decode, prefill=shape.prefill, sampled=decode.count)
    found = draft_operators(config, first, shard, precision)
    if draft_tokens > 1:
        rest = StepShape(decode=decode, sampled=decode.count)
        each = draft_operators(config, rest, shard, precision)
        again = draft_tokens - 1
        found += tuple(replace(op, repeat=again * op.repeat, resident_bytes=0) for op in each)
    return found


def draft_bytes(config: ModelConfig, part: Slice, precision: Precision) -> tuple[float, float]:
    """Weights, and KV for a token of a sequence, that a draft module holds on a rank of `part`."""
    if not part.last:
        return 0.0, 0.0
    flat = replace(part.shard, pp=1)
    module = draft_operators(config, StepShape.decoding(1, 0), flat, precision)
    layer = replace(slice_of(config, flat), full_layers=1, window_layers=0)
    each = float(kv_bytes(config, 1, precision, layer))
    return sum(float(op.resident_bytes) for op in module), each


def layer_counts(part: Slice) -> dict[str, int]:
    """How often each of `layer_operators` comes in a stage."""
    return {
        "entry": int(part.first),
        "full": part.full_layers,
        "windowed": part.window_layers,
        "dense": part.dense_layers,
        "sparse": part.sparse_layers,
        "exit": int(part.last),
        "hand_over": int(not part.last),
    }


def _entry(layers: Layers) -> list[Operator]:
    """Embedding on the first stage, rows summed over the vocabulary's ranks."""
    if not layers.part.first:
        return []
    hidden, act, tokens = layers.config.hidden, layers.act, layers.shape.tokens
    stored = layers.exact.weights.bytes
    table_bytes = layers.part.vocab * hidden * stored
    embed = Operator(
        name="embed",
        kind=Kind.EMBED,
        m=tokens,
        n=hidden,
        weight_bytes=tokens * hidden * stored / layers.part.shard.tp,
        write_bytes=tokens * hidden * act,
        resident_bytes=table_bytes,
    )
    return [embed, *layers.collective("embed_sum", Kind.ALL_REDUCE, "tp", tokens * hidden * act, 1)]


def _exit(layers: Layers) -> list[Operator]:
    """Final norm, head and sampling on the last stage; elsewhere the hand-over to the next."""
    config, part, act = layers.config, layers.part, layers.act
    tokens, rows = layers.shape.tokens, layers.shape.sampled
    if not part.last:
        return layers.collective("hand_over", Kind.SEND, "pp", tokens * config.hidden * act, 1)
    head = matmul("head", (rows, config.hidden, part.vocab), layers.exact, repeat=1, bias=False)
    if config.tied and part.first:
        head = replace(head, resident_bytes=0)
    logits = rows * config.vocab * act
    return [
        layers.norm("final_norm", tokens, config.hidden, 1, into=layers.exact),
        replace(head, is_normed=True),
        *layers.collective("logits_gather", Kind.ALL_GATHER, "tp", logits, 1),
        elementwise("sample", Kind.SAMPLE, logits, rows * DType.F32.bytes, repeat=1),
    ]


_ONE = StepShape.prefilling(1)


def weight_bytes(config: ModelConfig, shard: Shard, precision: Precision, *, stage: int = 0) -> float:
    """Bytes of weights on one rank of `stage`."""
    # Cuts that differ in depth hold the same layers; only a lone stage may tie head and embedding.
    each = _layer_bytes(config, replace(shard, pp=min(shard.pp, 2)), precision)
    counts = layer_counts(slice_of(config, shard, stage))
    return float(sum(counts[kind] * resident for kind, resident in each.items()))


@lru_cache(maxsize=4096)
def _layer_bytes(config: ModelConfig, shard: Shard, precision: Precision) -> dict[str, float]:
    found = layer_operators(config, _ONE, shard, precision)
    return {kind: float(sum(op.resident_bytes for op in ops)) for kind, ops in found.items()}


def parameters(config: ModelConfig) -> int:
    """Parameters of the model as transformers builds it (without multi-token prediction layers)."""
    return round(weight_bytes(config, WHOLE, PLAIN) / DType.BF16.bytes)


def active_parameters(config: ModelConfig) -> int:
    """Parameters one token uses: all but the experts it does not run; the embedding counts whole."""
    operators = step(config, _ONE)
    idle = sum(
        op.resident_bytes - op.repeat * op.weight_bytes for op in operators if op.kind is Kind.GROUPED_MATMUL
    )
    return parameters(config) - round(float(idle) / DType.BF16.bytes)


def step_flops(config: ModelConfig, shape: StepShape) -> Number:
    """FLOPs of products in one step of the whole model."""
    return sum((op.repeat * op.flops for op in step(config, shape)), start=0.0)


def flops_per_token(config: ModelConfig, context: Number = 0) -> Number:
    """FLOPs of one new token behind `context` cached ones, head included, MLA absorbed."""
    return step_flops(config, StepShape.decoding(1, context))


def kv_bytes(config: ModelConfig, tokens: Number, precision: Precision, part: Slice | None = None) -> Number:
    """KV bytes of one sequence of `tokens` tokens, on one rank of `part` (default: the whole model).

    Full layers keep every token, sliding-window layers at most the window; MLA keeps its
    latent, which no axis but pp cuts.
    """
    part = slice_of(config, WHOLE) if part is None else part
    latent = config.latent
    width = 2 * part.kv_heads * config.head_dim if latent is None else latent.kv_rank + latent.rope_dim
    reach = tokens if config.window is None else np.minimum(tokens, config.window)
    return (part.full_layers * tokens + part.window_layers * reach) * (width * precision.kv.bytes)


def kv_bytes_per_token(config: ModelConfig, precision: Precision = PLAIN) -> int:
    """KV bytes that one more token takes in every layer, before any window is full."""
    return round(float(kv_bytes(config, 1, precision)))
