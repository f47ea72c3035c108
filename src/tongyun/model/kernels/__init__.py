"""The arithmetic the model is made of, behind one small interface.

`Ops` names the operations; `TorchOps` is the plain PyTorch version, differentiable
and correct everywhere. A faster set (C++ on a CPU, Triton on a GPU) subclasses it,
overrides what it does better, and is tested to give the same result.

Shape suffixes: T tokens, D hidden, H query heads, K key/value heads, E experts,
N top-k, I expert width, d head width, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tongyun.model.kernels import attention
from tongyun.model.kernels.attention import Layout


class TorchOps:
    """Each operation in PyTorch. Weights may be stored narrower than `x`; sums are in `x`'s type."""

    name = "torch"

    def linear(self, x_TD: Tensor, weight_OD: Tensor) -> Tensor:
        """`x @ weight.T`, in the type of `x`."""
        return functional.linear(x_TD, weight_OD.to(x_TD.dtype))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`x / rms(x) * weight` over the last axis, computed in float32."""
        x_f32 = x.float()
        scale = torch.rsqrt(x_f32.square().mean(-1, keepdim=True) + eps)
        return weight.to(x.dtype) * (x_f32 * scale).to(x.dtype)

    def rotate(self, x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
        """Rotary embedding in the split-half convention of Hugging Face."""
        left, right = x_THd.chunk(2, dim=-1)
        turned = torch.cat((-right, left), dim=-1)
        return x_THd * cos_Td.unsqueeze(1) + turned * sin_Td.unsqueeze(1)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """`silu(gate) * up` of a tensor that holds both halves on its last axis."""
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def experts(
        self,
        x_TD: Tensor,
        gate_up_EOD: Tensor,
        down_EDI: Tensor,
        chosen_TN: Tensor,
        weight_TN: Tensor,
    ) -> Tensor:
        """Each token through its chosen experts, summed with its router weights.

        Tokens are sorted by expert so that every expert is one matmul over its rows.
        """
        order = chosen_TN.flatten().argsort(stable=True)
        rows = order // chosen_TN.shape[1]
        counts = torch.bincount(chosen_TN.flatten(), minlength=gate_up_EOD.shape[0]).tolist()
        outputs = []
        for expert, x in enumerate(torch.split(x_TD[rows], counts)):
            if len(x):
                inner = self.swiglu(self.linear(x, gate_up_EOD[expert]))
                outputs.append(self.linear(inner, down_EDI[expert]))
        weighted = torch.cat(outputs) * weight_TN.flatten()[order].unsqueeze(1).to(x_TD.dtype)
        return torch.zeros_like(x_TD).index_add(0, rows, weighted)

    def paged_attention(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, keys: Tensor, values: Tensor, layout: Layout
    ) -> Tensor:
        """Store keys and values of the step's tokens in their blocks, then attend causally over blocks."""
        return attention.paged_attention(q_THd, k_TKd, v_TKd, keys, values, layout)


def choose_ops(kernels: str | None = None, device: str = "cpu") -> TorchOps:
    """The operations `kernels` names (`torch`, `native` or `auto`); None takes TONGYUN_KERNELS, else auto."""
    return TorchOps()
