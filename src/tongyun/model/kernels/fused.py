"""Triton kernels for what PyTorch cuts into many launches: heads made ready, the cache, attention over it.

Of attention there is one kernel for prompts, later pieces of prompts and decoding. Its
programs each have a tile of tokens of one piece and the query heads that share one key
head, and go over the piece's blocks up to the last of their tokens. Where a step has too few
tiles to fill a GPU, several programs share one and their parts are put together.

Only bfloat16 with heads as wide as a power of two; see `covers`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64
"""Keys that a program looks at together."""
PROGRAMS = 528
"""So many programs and more fill a GPU: four for each multiprocessor of the largest."""
MOST_SPLITS = 16


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the tokens of a step are: all int32, on the device."""

    slots_T: Tensor
    rows_P1: Tensor
    starts_P: Tensor
    blocks: Tensor
    """Blocks of the pieces, one row after the other."""
    width: Tensor
    """How long such a row is, one number."""
    tile_piece: Tensor
    tile_row: Tensor
    """The piece of each tile of tokens, and the first row of the tile."""


def covers(q_THd: Tensor, keys: Tensor) -> bool:
    """Whether the kernels are made for such queries and such a cache."""
    width = q_THd.shape[2]
    return q_THd.dtype == keys.dtype == torch.bfloat16 and width >= 16 and width & (width - 1) == 0


def tile_rows(group: int) -> int:
    """Rows of a tile, `group` of them for each token: what a product needs at least."""
    return max(16, 1 << (group - 1).bit_length())


def tile_tokens(group: int) -> int:
    """Tokens of a tile."""
    return tile_rows(group) // group


def prepare(
    heads_THd: Tensor, norms: tuple[Tensor, Tensor, float], cos_Td: Tensor, sin_Td: Tensor, kv_heads: int
) -> None:
    """Normalise and rotate queries and keys within their joint projection, in place."""
    q_weight, k_weight, eps = norms
    tokens, heads, width = heads_THd.shape
    _prepare[(tokens, heads - kv_heads)](
        heads_THd, q_weight, k_weight, cos_Td, sin_Td, heads_THd.stride(0), heads - 2 * kv_heads, eps,
        HALF=width // 2, num_warps=1,
    )  # fmt: skip


def store(k_TKd: Tensor, v_TKd: Tensor, keys: Tensor, values: Tensor, slots_T: Tensor) -> None:
    """Keys and values of the step's tokens into their slots."""
    tokens, kv_heads, width = k_TKd.shape
    _store[(tokens, kv_heads)](
        k_TKd, v_TKd, keys, values, slots_T, k_TKd.stride(0), v_TKd.stride(0),
        KV_HEADS=kv_heads, BLOCK=keys.shape[2], WIDTH=width, num_warps=1,
    )  # fmt: skip


def attend(q_THd: Tensor, keys: Tensor, values: Tensor, places: Places) -> Tensor:
    """Every token attends to its piece's context up to itself."""
    tokens, heads, width = q_THd.shape
    kv_heads, block = keys.shape[1], keys.shape[2]
    group, tiles = heads // kv_heads, len(places.tile_piece)
    splits = _splits(tiles * kv_heads)
    out_THd = torch.empty((tokens, heads, width), dtype=q_THd.dtype, device=q_THd.device)
    shape = (tokens, heads, splits) if splits > 1 else (1, 1, 1)
    parts = torch.empty((*shape, width), dtype=torch.float32, device=q_THd.device)
    most, total = (torch.empty(shape, dtype=torch.float32, device=q_THd.device) for _ in range(2))
    _attend[(tiles, kv_heads, splits)](
        q_THd, keys, values, out_THd, parts, most, total,
        places.blocks, places.width, places.starts_P, places.rows_P1, places.tile_piece, places.tile_row,
        q_THd.stride(0), q_THd.stride(1), width**-0.5,
        KV_HEADS=kv_heads, GROUP=group, ROWS=tile_rows(group), TOKENS=tile_tokens(group),
        BLOCK=block, WIDTH=width, TILE=TILE, SPLITS=splits, num_warps=4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        _combine[(tokens, heads)](parts, most, total, out_THd, SPLITS=splits, WIDTH=width, num_warps=2)
    return out_THd


def _splits(programs: int) -> int:
    """Programs that share a tile: a power of two, so that there are few kernels to compile."""
    return 1 << (min(MOST_SPLITS, max(1, PROGRAMS // programs)).bit_length() - 1)


# ── kernels ──────────────────────────────────────────────────────────────────────────


@triton.jit
def _prepare(
    heads, q_weight, k_weight, cos, sin, row, queries, eps,
    HALF: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, HALF)
    first = heads + token.to(tl.int64) * row + head * 2 * HALF + at
    second = first + HALF
    left, right = tl.load(first).to(tl.float32), tl.load(second).to(tl.float32)
    scale = tl.rsqrt((tl.sum(left * left) + tl.sum(right * right)) / (2 * HALF) + eps)
    query = head < queries
    left *= scale * tl.where(query, tl.load(q_weight + at), tl.load(k_weight + at)).to(tl.float32)
    after = HALF + at
    right *= scale * tl.where(query, tl.load(q_weight + after), tl.load(k_weight + after)).to(tl.float32)
    cos += token * 2 * HALF
    sin += token * 2 * HALF
    turned = left * tl.load(cos + at).to(tl.float32) - right * tl.load(sin + at).to(tl.float32)
    right = right * tl.load(cos + after).to(tl.float32) + left * tl.load(sin + after).to(tl.float32)
    tl.store(first, turned.to(heads.dtype.element_ty))
    tl.store(second, right.to(heads.dtype.element_ty))


@triton.jit
def _store(
    k, v, keys, values, slots, k_row, v_row,
    KV_HEADS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, WIDTH)
    slot = tl.load(slots + token).to(tl.int64)
    to = ((slot // BLOCK * KV_HEADS + head) * BLOCK + slot % BLOCK) * WIDTH + columns
    tl.store(keys + to, tl.load(k + token * k_row + head * WIDTH + columns))
    tl.store(values + to, tl.load(v + token * v_row + head * WIDTH + columns))


@triton.jit
def _attend(
    q, keys, values, out, parts, most, total,
    blocks, width, starts, rows, tile_piece, tile_row,
    q_row, q_head, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    piece, first = tl.load(tile_piece + tile), tl.load(tile_row + tile)
    begun, ended, start = tl.load(rows + piece), tl.load(rows + piece + 1), tl.load(starts + piece)
    each, columns, keyed = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, TILE)
    token = first + each // GROUP
    inside = (each < TOKENS * GROUP) & (token < ended)
    heads = head * GROUP + each % GROUP
    query = tl.load(
        q + token.to(tl.int64)[:, None] * q_row + heads[:, None] * q_head + columns[None, :],
        mask=inside[:, None],
        other=0.0,
    )
    position = start + token - begun
    last = start + tl.minimum(first + TOKENS, ended) - begun
    table = blocks + piece * tl.load(width)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for at in range(split * TILE, last, SPLITS * TILE):
        place = at + keyed
        there = place < last
        block = tl.load(table + place // BLOCK, mask=there, other=0).to(tl.int64)
        where = ((block * KV_HEADS + head) * BLOCK + place % BLOCK) * WIDTH
        key = tl.load(keys + where[:, None] + columns[None, :], mask=there[:, None], other=0.0)
        value = tl.load(values + where[:, None] + columns[None, :], mask=there[:, None], other=0.0)
        seen = place[None, :] <= position[:, None]
        score = tl.where(seen, tl.dot(query, tl.trans(key)) * scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        # A row that has seen nothing yet has no highest score to take away.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        chance = tl.exp(score - base[:, None])
        shrunk = tl.exp(highest - base)
        weight = weight * shrunk + tl.sum(chance, 1)
        sums = sums * shrunk[:, None] + tl.dot(chance.to(value.dtype), value)
        highest = higher
    to = token.to(tl.int64) * (KV_HEADS * GROUP) + heads
    if SPLITS == 1:
        result = sums / tl.where(weight == 0.0, 1.0, weight)[:, None]
        tl.store(
            out + to[:, None] * WIDTH + columns[None, :],
            result.to(out.dtype.element_ty),
            mask=inside[:, None],
        )
    else:
        part = to * SPLITS + split
        tl.store(parts + part[:, None] * WIDTH + columns[None, :], sums, mask=inside[:, None])
        tl.store(most + part, highest, mask=inside)
        tl.store(total + part, weight, mask=inside)


@triton.jit
def _combine(parts, most, total, out, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    to = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    split, columns = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    highest = tl.load(most + to * SPLITS + split)
    share = tl.exp(highest - tl.max(highest, 0))
    weight = tl.sum(share * tl.load(total + to * SPLITS + split), 0)
    sums = tl.load(parts + (to * SPLITS + split)[:, None] * WIDTH + columns[None, :])
    result = tl.sum(sums * share[:, None], 0) / weight
    tl.store(out + to * WIDTH + columns, result.to(out.dtype.element_ty))
