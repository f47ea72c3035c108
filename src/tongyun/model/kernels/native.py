"""The operations of the model on the C++ kernels, for a CPU with float32 activations.

A row's result does not depend on the rows it is computed with, so that a request's
tokens are the same in every batch, chunking and cache state. What the kernels do not
cover (half-precision floats, unusual head widths) falls back to PyTorch.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from tongyun.model.kernels import TorchOps
from tongyun.model.kernels.attention import Layout

COVERED = (torch.bfloat16, torch.float32)


class NativeOps(TorchOps):
    """`TorchOps` with a C++ kernel behind each operation; for inference only."""

    name = "native"

    def __init__(self, kernels: ModuleType, threads: int | None = None) -> None:
        """`threads` is for the whole process; None takes as many as PyTorch has now."""
        self.kernels = kernels
        kernels.set_threads(threads or torch.get_num_threads())

    def linear(self, x_TD: Tensor, weight_OD: Tensor, add_TO: Tensor | None = None) -> Tensor:
        if weight_OD.dtype not in COVERED or x_TD.dtype != torch.float32:
            return super().linear(x_TD, weight_OD, add_TO)
        y_TO: Tensor = self.kernels.linear(x_TD, weight_OD, add_TO)
        return y_TO

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if weight.dtype not in COVERED or x.dtype != torch.float32:
            return super().rms_norm(x, weight, eps)
        y: Tensor = self.kernels.rms_norm(x.contiguous(), weight, eps)
        return y

    def attention_inputs(
        self,
        heads_THd: Tensor,
        norms: tuple[Tensor, Tensor, float],
        cos_Td: Tensor,
        sin_Td: Tensor,
        kv_heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if norms[0].dtype not in COVERED or heads_THd.dtype != torch.float32:
            return super().attention_inputs(heads_THd, norms, cos_Td, sin_Td, kv_heads)
        q_weight, k_weight, eps = norms
        q, k, v = self.kernels.attention_inputs(heads_THd, q_weight, k_weight, cos_Td, sin_Td, kv_heads, eps)
        return q, k, v

    def swiglu(self, gate_up: Tensor) -> Tensor:
        if gate_up.dtype != torch.float32:
            return super().swiglu(gate_up)
        y: Tensor = self.kernels.swiglu(gate_up.contiguous())
        return y

    def linear_swiglu(self, x_TD: Tensor, gate_up_OD: Tensor) -> Tensor:
        if gate_up_OD.dtype not in COVERED or x_TD.dtype != torch.float32:
            return super().linear_swiglu(x_TD, gate_up_OD)
        y_TI: Tensor = self.kernels.linear_swiglu(x_TD, gate_up_OD)
        return y_TI

    def choose(self, scores_TE: Tensor, per_token: int, normalise: bool) -> tuple[Tensor, Tensor]:
        if scores_TE.dtype != torch.float32:
            return super().choose(scores_TE, per_token, normalise)
        chosen_TN, weight_TN = self.kernels.choose(scores_TE, per_token, normalise)
        return chosen_TN, weight_TN

    def experts(
        self,
        x_TD: Tensor,
        gate_up_EOD: Tensor,
        down_EDI: Tensor,
        chosen_TN: Tensor,
        weight_TN: Tensor,
    ) -> Tensor:
        if gate_up_EOD.dtype not in COVERED or x_TD.dtype != torch.float32:
            return super().experts(x_TD, gate_up_EOD, down_EDI, chosen_TN, weight_TN)
        y_TD: Tensor = self.kernels.experts(x_TD, gate_up_EOD, down_EDI, chosen_TN, weight_TN)
        return y_TD

    def argmax(self, scores_TV: Tensor) -> Tensor:
        if scores_TV.dtype != torch.float32:
            return super().argmax(scores_TV)
        y_T: Tensor = self.kernels.argmax(scores_TV)
        return y_T

    def paged_attention(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, keys: Tensor, values: Tensor, layout: Layout
    ) -> Tensor:
        if keys.dtype not in COVERED or q_THd.dtype != torch.float32 or q_THd.shape[2] % self.kernels.lanes:
            return super().paged_attention(q_THd, k_TKd, v_TKd, keys, values, layout)
        y_THd: Tensor = self.kernels.paged_attention(
            q_THd,
            k_TKd,
            v_TKd,
            keys,
            values,
            layout.slots_T,
            layout.rows_P1,
            layout.starts_P,
            layout.blocks_PB,
        )
        return y_THd
