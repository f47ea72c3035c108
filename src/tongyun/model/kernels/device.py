"""The operations of the model on a GPU: PyTorch's own kernels, few of them, and none waited for.

A step of a small model on a GPU is bound by the host that launches its kernels. What differs
from `TorchOps` is therefore how many there are and that no result is read back before the
last: experts are one grouped product instead of a loop over their counts, sequences that
decode beside prompts are one batch, and what a step's layers have in common is made once.
Where Triton is, attention and what prepares it are kernels of our own (`fused`), which makes
a step of decoding one that can be captured and replayed. For inference; on a CPU it computes
the same, which is how it is tested.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tongyun.model.kernels import TorchOps
from tongyun.model.kernels.attention import Layout

if TYPE_CHECKING:
    from tongyun.model.kernels.fused import Places


class DeviceOps(TorchOps):
    """`TorchOps` with fewer launches."""

    def __init__(self, *, fused: bool | None = None) -> None:
        """`fused` says whether Triton's kernels are used; None: on a GPU, where Triton is."""
        self._latest: _Step | None = None
        self.fused = torch.cuda.is_available() and find_spec("triton") is not None if fused is None else fused

    def fix(self, layout: Layout, places: Places) -> None:
        """Take these places for the layers that are given this layout next: nothing is made of it."""
        self._latest = _Step(layout=layout, places=places)

    def linear(self, x_TD: Tensor, weight_OD: Tensor, add_TO: Tensor | None = None) -> Tensor:
        if add_TO is None:
            return super().linear(x_TD, weight_OD)
        return torch.addmm(add_TO, x_TD, weight_OD.to(x_TD.dtype).t())

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As `TorchOps`, but rounded once: to the type of `x` after the weight."""
        return functional.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)

    def attention_inputs(
        self,
        heads_THd: Tensor,
        norms: tuple[Tensor, Tensor, float],
        cos_Td: Tensor,
        sin_Td: Tensor,
        kv_heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys are normalised and rotated together."""
        q_weight, k_weight, eps = norms
        turning = heads_THd.shape[1] - kv_heads
        queries, width = turning - kv_heads, heads_THd.shape[2]
        if self.fused and heads_THd.dtype == torch.bfloat16 and width & (width - 1) == 0:
            from tongyun.model.kernels import fused

            fused.prepare(heads_THd, norms, cos_Td, sin_Td, kv_heads)
            return heads_THd[:, :queries], heads_THd[:, queries:turning], heads_THd[:, turning:]
        weight_Hd = torch.cat((q_weight.expand(queries, width), k_weight.expand(kv_heads, width)))
        both = functional.rms_norm(heads_THd[:, :turning], (width,), None, eps) * weight_Hd.to(
            heads_THd.dtype
        )
        both = self.rotate(both, cos_Td, sin_Td)
        return both[:, :queries], both[:, queries:], heads_THd[:, turning:]

    def experts(
        self, x_TD: Tensor, gate_up_EOD: Tensor, down_EDI: Tensor, chosen_TN: Tensor, weight_TN: Tensor
    ) -> Tensor:
        """Two grouped products over the tokens sorted by expert; sums in a fixed order."""
        if not x_TD.dtype == gate_up_EOD.dtype == torch.bfloat16:
            return super().experts(x_TD, gate_up_EOD, down_EDI, chosen_TN, weight_TN)
        tokens, per_token = chosen_TN.shape
        expert_X, order_X = chosen_TN.flatten().sort(stable=True)
        numbers_E = torch.arange(len(gate_up_EOD), device=x_TD.device)
        ends_E = torch.searchsorted(expert_X, numbers_E, right=True, out_int32=True)
        x_XD = x_TD[order_X // per_token]
        inner_XI = self.swiglu(functional.grouped_mm(x_XD, gate_up_EOD.transpose(1, 2), offs=ends_E))
        y_XD = functional.grouped_mm(inner_XI, down_EDI.transpose(1, 2), offs=ends_E)
        back_XD = torch.empty_like(y_XD)
        back_XD[order_X] = y_XD
        weighted_TND = back_XD.view(tokens, per_token, -1) * weight_TN.to(x_TD.dtype).unsqueeze(2)
        return weighted_TND.sum(1)

    def paged_attention(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, keys: Tensor, values: Tensor, layout: Layout
    ) -> Tensor:
        step = self._latest
        if step is None or step.layout is not layout:
            step = self._latest = _Step(layout=layout)
        if self.fused:
            from tongyun.model.kernels import fused

            if fused.covers(q_THd, keys):
                places = step.placed(q_THd.shape[1] // keys.shape[1])
                fused.store(k_TKd, v_TKd, keys, values, places.slots_T)
                return fused.attend(q_THd, keys, values, places)
        return _attend_apart(q_THd, k_TKd, v_TKd, keys, values, step.parts(q_THd.dtype))


@dataclass(kw_only=True)
class _Step:
    """What the layers of one step have in common, made when it is first asked for."""

    layout: Layout
    places: Places | None = None
    _parts: _Parts | None = None

    def placed(self, group: int) -> Places:
        """As the kernels of our own have it, for so many query heads to a key head."""
        if self.places is None:
            self.places = _place(self.layout, group)
        return self.places

    def parts(self, dtype: torch.dtype) -> _Parts:
        """As PyTorch's attention has it."""
        if self._parts is None:
            self._parts = _part(self.layout, dtype)
        return self._parts


def _place(layout: Layout, group: int) -> Places:
    from tongyun.model.kernels.fused import Places, tile_tokens

    each, device = tile_tokens(group), layout.starts_P.device
    pieces: list[int] = []
    rows: list[int] = []
    row = 0
    for piece, length in enumerate(layout.lengths):
        rows.extend(range(row, row + length, each))
        pieces.extend([piece] * -(-length // each))
        row += length
    # Together, and each at a border of 16 bytes: one way to the device, one kernel for all steps.
    held = -(-len(rows) // 4) * 4
    told = np.zeros(4 + 2 * held, dtype=np.int32)
    told[0] = layout.blocks_PB.shape[1]
    told[4 : 4 + len(rows)] = pieces
    told[4 + held : 4 + held + len(rows)] = rows
    there = torch.from_numpy(told).to(device)
    return Places(
        slots_T=layout.slots_T,
        rows_P1=layout.rows_P1,
        starts_P=layout.starts_P,
        blocks=layout.blocks_PB,
        width=there,
        tile_piece=there[4 : 4 + len(rows)],
        tile_row=there[4 + held : 4 + held + len(rows)],
    )


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """A step as pieces of one token, which are one batch, and prompts, one after the other."""

    layout: Layout
    block_T: Tensor
    offset_T: Tensor
    prompts: tuple[tuple[int, int], ...]
    """Pieces of several tokens, and the first row of each."""
    rows_P: Tensor | None
    """Rows of the pieces of one token, where there are others; None where there are none of these."""
    blocks_PB: Tensor
    """Blocks of the pieces of one token, as many as the longest of them has."""
    mask_P11C: Tensor
    """What is added to the scores of pieces of one token: −∞ behind it."""


def _part(layout: Layout, dtype: torch.dtype) -> _Parts:
    decoding = [piece for piece, length in enumerate(layout.lengths) if length == 1]
    firsts = [0, *accumulate(layout.lengths)]
    prompts = tuple((piece, firsts[piece]) for piece, length in enumerate(layout.lengths) if length > 1)
    starts_P, blocks_PB, rows_P = layout.starts_P, layout.blocks_PB, None
    if decoding and prompts:
        pieces_P = torch.tensor(decoding, device=starts_P.device)
        most = max(layout.starts[piece] for piece in decoding) // layout.block_tokens + 1
        starts_P, blocks_PB = starts_P[pieces_P], blocks_PB[pieces_P, :most]
        rows_P = layout.rows_P1[pieces_P].long()
    columns = torch.arange(blocks_PB.shape[1] * layout.block_tokens, device=starts_P.device)
    behind_PC = columns > starts_P.unsqueeze(1)
    mask_PC = torch.zeros(behind_PC.shape, dtype=dtype, device=starts_P.device)
    return _Parts(
        layout=layout,
        block_T=layout.slots_T // layout.block_tokens,
        offset_T=layout.slots_T % layout.block_tokens,
        prompts=prompts,
        rows_P=rows_P,
        blocks_PB=blocks_PB,
        mask_P11C=mask_PC.masked_fill_(behind_PC, -torch.inf)[:, None, None],
    )


def _attend_apart(
    q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, keys: Tensor, values: Tensor, parts: _Parts
) -> Tensor:
    layout = parts.layout
    keys.transpose(1, 2)[parts.block_T, parts.offset_T] = k_TKd.to(keys.dtype)
    values.transpose(1, 2)[parts.block_T, parts.offset_T] = v_TKd.to(values.dtype)
    if not parts.prompts:
        return _decode(q_THd, keys, values, parts)
    out_THd = torch.empty_like(q_THd)
    if parts.rows_P is not None:
        out_THd[parts.rows_P] = _decode(q_THd[parts.rows_P], keys, values, parts)
    for piece, first in parts.prompts:
        last = first + layout.lengths[piece]
        k_KCd, v_KCd = (
            _context(new[first:last], cache, layout, piece, q_THd.dtype)
            for new, cache in ((k_TKd, keys), (v_TKd, values))
        )
        out_THd[first:last] = _attend(q_THd[first:last], k_KCd, v_KCd, layout.starts[piece])
    return out_THd


def _decode(q_PHd: Tensor, keys: Tensor, values: Tensor, step: _Parts) -> Tensor:
    """One token each. The queries of a group share their keys: they are rows of one product."""
    # (P, B, K, block, d) → (P, K, C, d)
    k_PKCd, v_PKCd = (
        cache[step.blocks_PB].transpose(1, 2).flatten(2, 3).to(q_PHd.dtype) for cache in (keys, values)
    )
    q_PKGd = q_PHd.view(len(q_PHd), keys.shape[1], -1, q_PHd.shape[2])
    mask = step.mask_P11C.expand(-1, -1, q_PKGd.shape[2], -1)
    return functional.scaled_dot_product_attention(q_PKGd, k_PKCd, v_PKCd, attn_mask=mask).flatten(1, 2)


def _context(new_TKd: Tensor, cache: Tensor, layout: Layout, piece: int, dtype: torch.dtype) -> Tensor:
    """Keys or values of a piece up to its last token, (K, C, d): just made ones where there are no others."""
    start, length = layout.starts[piece], layout.lengths[piece]
    if not start and new_TKd.dtype == cache.dtype:
        return new_TKd.transpose(0, 1)
    blocks = layout.blocks_PB[piece, : -(-(start + length) // layout.block_tokens)]
    return cache[blocks].transpose(0, 1).flatten(1, 2)[:, : start + length].to(dtype)


def _attend(q_THd: Tensor, k_KCd: Tensor, v_KCd: Tensor, start: int) -> Tensor:
    mask_TC = None
    if start:
        ends_T = start + torch.arange(len(q_THd), device=q_THd.device)
        mask_TC = torch.arange(k_KCd.shape[1], device=q_THd.device) <= ends_T.unsqueeze(1)
    out_HTd = functional.scaled_dot_product_attention(
        q_THd.transpose(0, 1).unsqueeze(0),
        k_KCd.unsqueeze(0),
        v_KCd.unsqueeze(0),
        attn_mask=mask_TC,
        is_causal=not start,
        enable_gqa=True,
    )
    return out_HTd.squeeze(0).transpose(0, 1)
