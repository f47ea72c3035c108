"""Operations that a compiler is to take as one node each: paged attention and the experts.

Traced by their arithmetic they would fall apart into gathers and masks whose sizes depend on numbers in
memory. As operators of PyTorch with a shape rule they stay whole, one graph a step; what they compute is
`TorchOps`, unchanged. The engine's own operations do not go through here.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from tongyun.model.kernels import TorchOps, attention
from tongyun.model.kernels.attention import Layout


class WholeOps(TorchOps):
    """`TorchOps` as a compiler is given them."""

    name = "whole"

    def experts(
        self, x_TD: Tensor, gate_up_EOD: Tensor, down_EDI: Tensor, chosen_TN: Tensor, weight_TN: Tensor
    ) -> Tensor:
        y_TD: Tensor = experts(x_TD, gate_up_EOD, down_EDI, chosen_TN, weight_TN)
        return y_TD

    def paged_attention(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, keys: Tensor, values: Tensor, layout: Layout
    ) -> Tensor:
        where = layout.slots_T, layout.rows_P1, layout.starts_P, layout.blocks_PB
        out_THd: Tensor = paged_attention(q_THd, k_TKd, v_TKd, keys, values, *where)
        return out_THd


@torch.library.custom_op("tongyun::experts", mutates_args=())
def experts(
    x_TD: Tensor, gate_up_EOD: Tensor, down_EDI: Tensor, chosen_TN: Tensor, weight_TN: Tensor
) -> Tensor:
    """Each token through its chosen experts, summed by weight."""
    return TorchOps().experts(x_TD, gate_up_EOD, down_EDI, chosen_TN, weight_TN)


@experts.register_fake
def _(x_TD: Tensor, gate_up_EOD: Tensor, down_EDI: Tensor, chosen_TN: Tensor, weight_TN: Tensor) -> Tensor:
    return torch.empty_like(x_TD)


@torch.library.custom_op("tongyun::paged_attention", mutates_args=("keys", "values"))
def paged_attention(
    q_THd: Tensor,
    k_TKd: Tensor,
    v_TKd: Tensor,
    keys: Tensor,
    values: Tensor,
    slots_T: Tensor,
    rows_P1: Tensor,
    starts_P: Tensor,
    blocks_PB: Tensor,
) -> Tensor:
    """Keys and values into the cache's `slots_T`, then attention of each piece over its blocks.

    The last four are those of `Layout`. Rows behind the last piece belong to nobody: their keys and values
    are stored, their result is zero. A piece may be empty.
    """
    rows, starts = rows_P1.tolist(), starts_P.tolist()
    layout = Layout(
        positions_T=slots_T, slots_T=slots_T, rows_P1=rows_P1, starts_P=starts_P, blocks_PB=blocks_PB,
        lengths=tuple(end - begin for begin, end in pairwise(rows)), starts=tuple(starts),
        block_tokens=keys.shape[2],
    )  # fmt: skip
    attention.store(k_TKd, v_TKd, keys, values, layout)
    out_THd = torch.zeros_like(q_THd)
    return attention.attend_pieces(q_THd, keys, values, layout, out_THd)


@paged_attention.register_fake
def _(q_THd: Tensor, *_: Tensor) -> Tensor:
    return torch.empty(q_THd.shape, dtype=q_THd.dtype, device=q_THd.device)
