"""Measure the engine's paged attention: one query against a context, and prompts in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from tongyun.cloud.engine.calibrate.bench import Bench, Probe
from tongyun.model.kernels.attention import lay_out
from tongyun.specs.samples import AttentionSample
from tongyun.units import DType

BLOCK_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Query heads, key/value heads, and the width of both."""

    queries: int
    keys: int
    width: int


HEADS = (
    Heads(queries=4, keys=2, width=64),
    Heads(queries=16, keys=8, width=128),
    Heads(queries=16, keys=2, width=128),
)
DECODES = tuple((batch, 1, context) for batch in (1, 4, 16, 32) for context in (15, 63, 255, 1023))
DECODES_QUEUED = tuple((64, 1, context) for context in (63, 255, 1023))
"""On a GPU too: there it is large batches that take time."""
PREFILLS = tuple((1, queries, context) for queries in (8, 32, 128, 512) for context in (0, 512))
QUICK = ((1, 1, 63), (8, 1, 63), (1, 64, 0))


def attention(bench: Bench) -> Iterator[Probe[AttentionSample]]:
    """Storing the step's keys and values and attending, for one layer."""
    shapes = DECODES + (DECODES_QUEUED if bench.queued else ()) + PREFILLS
    for heads in HEADS if not bench.quick else HEADS[:1]:
        for batch, queries, context in shapes if not bench.quick else QUICK:
            yield Probe(
                call=_call(bench, heads, batch, queries, context),
                sample=partial(_sample, bench.kv_type, heads, batch, queries, context),
            )


def _sample(
    kv_type: DType, heads: Heads, batch: int, queries: int, context: int, seconds: float
) -> AttentionSample:
    return AttentionSample(
        dtype=kv_type,
        batch=batch,
        queries=queries,
        context=context,
        heads=heads.queries,
        kv_heads=heads.keys,
        head_dim=heads.width,
        seconds=seconds,
    )


def _call(bench: Bench, heads: Heads, batch: int, queries: int, context: int) -> Callable[[], Tensor]:
    each = -(-(context + queries) // BLOCK_TOKENS)
    # Blocks of one sequence lie apart in a cache that has been in use; a stride of `batch` does that.
    pieces = [(context, queries, range(i, i + each * batch, batch)) for i in range(batch)]
    layout = lay_out(pieces, BLOCK_TOKENS, bench.device)
    keys, values = (bench.cache(each * batch, heads.keys, BLOCK_TOKENS, heads.width) for _ in range(2))
    q_THd = bench.activation(batch * queries, heads.queries, heads.width)
    k_TKd, v_TKd = (bench.activation(batch * queries, heads.keys, heads.width) for _ in range(2))
    return partial(bench.ops.paged_attention, q_THd, k_TKd, v_TKd, keys, values, layout)
