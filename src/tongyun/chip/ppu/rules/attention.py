"""Attention, rotation, and where keys and values are kept."""

from __future__ import annotations

import math

import numpy as np
from torch.fx import Node

from tongyun.chip.ppu import patterns
from tongyun.chip.ppu.emit import attention as attend
from tongyun.chip.ppu.emit import paged, rows
from tongyun.chip.ppu.program import Tensor
from tongyun.chip.ppu.rules.lowering import Lowering


def written(low: Lowering, node: Node) -> Tensor | None:
    """Keys or values written into the cache, which stays where it is."""
    cached = patterns.cached_of(node)
    if cached is None or cached.written is not node:
        return None
    if cached.cache is None:
        cache = low.new(*patterns.shape_of(node), role="state")
    else:
        cache = low.value(cached.cache)
    keep(low, cached.fresh, cache, low.start(cached.start))
    return cache


def keep(low: Lowering, fresh: Node, cache: Tensor, start: Tensor) -> None:
    tokens = by_head(low, fresh)
    with low.kernel("keep"):
        rows.keep(low.b, tokens, cache, start)


def by_head(low: Lowering, node: Node) -> Tensor:
    """Queries, keys or values as [tokens, heads · width], rotated if they are."""
    rotation = patterns.rotation_of(node)
    if rotation is None:
        if patterns.name_of(node) != "aten.transpose.int":
            raise low.refused(node)
        return low.value(node.args[0])  # type: ignore[arg-type]
    if node in low.made:
        return low.made[node]
    *batch, tokens, heads, width = patterns.shape_of(rotation.x)
    norm = patterns.norm_of(rotation.x) if low.fusions.rotate else None
    x = low.rows(norm.x if norm else rotation.x, heads * width)
    head = rows.HeadNorm(gain=low.value(norm.gain), eps=norm.eps) if norm else None
    cos, sin = angled(low, rotation, math.prod(batch), tokens)
    out = low.new(x.rows, heads * width)
    low.here = node
    with low.kernel("rotate"):
        rows.rotate(low.b, x, cos, sin, rows.Rows.of(out), heads=heads, norm=head)
    low.made[node] = out
    return out


def angled(low: Lowering, rotation: patterns.Rotation, sequences: int, tokens: int) -> tuple[Tensor, Tensor]:
    cos, sin = patterns.angles_of(rotation.cos), patterns.angles_of(rotation.sin)
    if cos is None or sin is None or (cos.function, sin.function) != ("cos", "sin"):
        raise low.refused(rotation.cos)
    key = (cos.frequency, cos.start or cos.positions, sequences, tokens)
    if key not in low.angles:
        frequency, start = low.value(cos.frequency), low.start(cos.start)
        count = (
            low.value(cos.positions)
            if cos.positions is not None
            else low.constant(
                f"count_{sequences}_{tokens}",
                lambda: np.tile(np.arange(tokens, dtype=np.int32), sequences),
            )
        )
        wide = 2 * frequency.shape[-1]
        both = low.new(sequences * tokens, wide), low.new(sequences * tokens, wide)
        low.here = rotation.cos
        with low.kernel("angles"):
            rows.angles(low.b, frequency, start, count, *both)
        low.angles[key] = both
    return low.angles[key]


def attended(low: Lowering, node: Node) -> Tensor | None:
    found = patterns.attention_of(node)
    if found is None:
        return None
    q = by_head(low, found.q)
    sequences, heads, tokens, width = patterns.shape_of(found.q)
    caches = []
    for item in (found.k, found.v):
        cached = patterns.cached_of(item)
        if cached is None:
            raise low.refused(item)
        if cached.written is not None:
            caches.append(low.value(cached.written))
            continue
        cache = low.new(*patterns.shape_of(cached.fresh))
        keep(low, cached.fresh, cache, low.start(None))
        caches.append(cache)
    shape = attend.Attention(
        sequences=sequences, tokens=tokens, heads=heads, kv_heads=caches[0].shape[1], width=width,
        room=caches[0].shape[2], scale=found.scale, query_stride=heads * width * 2,
    )  # fmt: skip
    out = low.new(sequences * tokens, heads * width)
    start = low.start(found.start)
    low.here = node
    with low.kernel("attention"):
        attend.attention(low.b, shape, q, caches[0], caches[1], out, start)
    return out


def paged_attended(low: Lowering, node: Node) -> Tensor | None:
    """Attention over blocks: the step's keys and values go to their slots first."""
    found = patterns.paged_of(node)
    if found is None:
        return None
    caches = low.value(found.caches[0]), low.value(found.caches[1])
    slots, first, starts, blocks = (
        low.value(item) for item in (found.slots, found.rows, found.starts, found.blocks)
    )
    pages = paged.Pages(slots=slots, rows=first, starts=starts, blocks=blocks)
    q, k = by_head(low, found.q), by_head(low, found.k)
    width, heads = caches[0].shape[3], caches[0].shape[1]
    out = low.new(*q.shape)
    low.here = found.call
    with low.kernel("keep"):
        paged.store(low.b, (rows.Rows.of(k), low.rows(found.v, heads * width)), caches, slots)
    with low.kernel("attention"):
        paged.attention(low.b, q, caches, out, pages, width**-0.5)
    for item in found.call.users:
        low.made[item] = (out, *caches)[item.args[1]]  # type: ignore[index]
    return low.made[node]
