"""Paged attention in plain PyTorch: the twin that the native kernels are tested against.

A `Layout` says where the tokens of one step sit: which rows belong to which piece,
at which positions, and in which cache blocks. It knows no request and no scheduler.

Shapes: keys and values of a layer are (blocks, K, block tokens, head width).
P pieces, T tokens of the step, C context tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Index tensors of one step, on the device of the cache."""

    positions_T: Tensor
    slots_T: Tensor
    """Where each token's key and value go: block × block tokens + offset."""
    rows_P1: Tensor
    """First row of each piece, and the end of the last: int32."""
    starts_P: Tensor
    """Context tokens before each piece: int32."""
    blocks_PB: Tensor
    """Blocks of each piece in order, padded with 0: int32."""
    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    block_tokens: int

    @property
    def decode_only(self) -> bool:
        return max(self.lengths) == 1


def lay_out(
    pieces: Sequence[tuple[int, int, Sequence[int]]], block_tokens: int, device: str | torch.device = "cpu"
) -> Layout:
    """Index tensors for pieces of (start, tokens, blocks), in the order of their rows.

    Raises ValueError where a piece's blocks do not reach its last token.
    """
    start_P = np.array([start for start, _, _ in pieces])
    length_P = np.array([length for _, length, _ in pieces])
    needed_P = -(-(start_P + length_P) // block_tokens)
    blocks_PB = np.zeros((len(pieces), needed_P.max()), dtype=np.int32)
    for row, needed, (_, _, blocks) in zip(blocks_PB, needed_P.tolist(), pieces, strict=True):
        if len(blocks) < needed:
            raise ValueError(f"a piece needs {needed} blocks and lists {len(blocks)}")
        row[:needed] = blocks[:needed]
    rows_P1 = np.zeros(len(pieces) + 1, dtype=np.int32)
    length_P.cumsum(out=rows_P1[1:])
    if rows_P1[-1] == len(pieces):
        piece_T, positions_T = np.arange(len(pieces)), start_P
    else:
        piece_T = np.repeat(np.arange(len(pieces)), length_P)
        positions_T = np.arange(rows_P1[-1]) - rows_P1[piece_T] + start_P[piece_T]
    slots_T = blocks_PB[piece_T, positions_T // block_tokens] * block_tokens + positions_T % block_tokens

    def tensor(array: NDArray[np.integer[Any]]) -> Tensor:
        found = torch.from_numpy(array)
        return found if device_type == "cpu" else found.to(device)

    device_type = torch.device(device).type
    return Layout(
        positions_T=tensor(positions_T),
        slots_T=tensor(slots_T),
        rows_P1=tensor(rows_P1),
        starts_P=tensor(start_P.astype(np.int32)),
        blocks_PB=tensor(blocks_PB),
        lengths=tuple(length_P.tolist()),
        starts=tuple(start_P.tolist()),
        block_tokens=block_tokens,
    )


def paged_attention(
    q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, keys: Tensor, values: Tensor, layout: Layout
) -> Tensor:
    """Store the step's keys and values, then let every token attend to its context up to itself."""
    store(k_TKd, v_TKd, keys, values, layout)
    if layout.decode_only:
        return _decode(q_THd, keys, values, layout)
    return attend_pieces(q_THd, keys, values, layout, torch.empty_like(q_THd))


def store(k_TKd: Tensor, v_TKd: Tensor, keys: Tensor, values: Tensor, layout: Layout) -> None:
    """Keys and values of the step's tokens into their slots."""
    block, offset = layout.slots_T // layout.block_tokens, layout.slots_T % layout.block_tokens
    keys.transpose(1, 2)[block, offset] = k_TKd.to(keys.dtype)
    values.transpose(1, 2)[block, offset] = v_TKd.to(values.dtype)


def attend_pieces(q_THd: Tensor, keys: Tensor, values: Tensor, layout: Layout, out_THd: Tensor) -> Tensor:
    """Attention piece by piece into `out_THd`, which is returned; empty pieces are passed over."""
    row = 0
    for piece, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        if not length:
            continue
        k_KCd, v_KCd = (
            _context(cache, layout, piece, start + length, q_THd.dtype) for cache in (keys, values)
        )
        q_HTd = q_THd[row : row + length].transpose(0, 1)
        out_THd[row : row + length] = _attend(q_HTd, k_KCd, v_KCd, start).transpose(0, 1)
        row += length
    return out_THd


def _context(cache: Tensor, layout: Layout, piece: int, length: int, dtype: torch.dtype) -> Tensor:
    """The first `length` keys or values of a piece, gathered: (K, C, d)."""
    blocks = layout.blocks_PB[piece, : -(-length // layout.block_tokens)]
    return cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length].to(dtype)


def _attend(q_HTd: Tensor, k_KCd: Tensor, v_KCd: Tensor, start: int) -> Tensor:
    mask_TC = None
    if q_HTd.shape[1] > 1 and start:
        columns = torch.arange(k_KCd.shape[1], device=q_HTd.device)
        mask_TC = columns <= start + torch.arange(q_HTd.shape[1], device=q_HTd.device).unsqueeze(1)
    return functional.scaled_dot_product_attention(
        q_HTd.unsqueeze(0),
        k_KCd.unsqueeze(0),
        v_KCd.unsqueeze(0),
        attn_mask=mask_TC,
        is_causal=mask_TC is None and q_HTd.shape[1] > 1,
        enable_gqa=True,
    ).squeeze(0)


def _decode(q_PHd: Tensor, keys: Tensor, values: Tensor, layout: Layout) -> Tensor:
    """All pieces have one token: one padded batch, the padding masked."""
    # (P, B, K, block, d) → (P, K, C, d)
    k_PKCd, v_PKCd = (
        cache[layout.blocks_PB].transpose(1, 2).flatten(2, 3).to(q_PHd.dtype) for cache in (keys, values)
    )
    mask_PC = torch.arange(k_PKCd.shape[2], device=q_PHd.device) <= layout.starts_P.unsqueeze(1)
    return functional.scaled_dot_product_attention(
        q_PHd.unsqueeze(2), k_PKCd, v_PKCd, attn_mask=mask_PC[:, None, None], enable_gqa=True
    ).squeeze(2)
