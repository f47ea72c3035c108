"""The arithmetic the model is made of, behind one small interface.

`Ops` names the operations; `TorchOps` is the plain PyTorch version, differentiable
and correct everywhere. A faster set (C++ on a CPU, Triton on a GPU) subclasses it,
overrides what it does better, and is tested to give the same result.

Shape suffixes: T tokens, D hidden, H query heads, K key/value heads, E experts,
N top-k, I expert width, d head width, O outputs.
"""

from __future__ import annotations

import logging
import os

import torch
from torch import Tensor
from torch.nn import functional

from tongyun.errors import InputError, unknown
from tongyun.model.kernels import attention
from tongyun.model.kernels.attention import Layout

log = logging.getLogger(__name__)
CHOICES = ("torch", "native", "auto")


class TorchOps:
    """Each operation in PyTorch. Weights may be stored narrower than `x`; sums are in `x`'s type."""

    name = "torch"

    def linear(self, x_TD: Tensor, weight_OD: Tensor, add_TO: Tensor | None = None) -> Tensor:
        """`x @ weight.T`, plus `add` where given (the residual), in the type of `x`."""
        y_TO = functional.linear(x_TD, weight_OD.to(x_TD.dtype))
        return y_TO if add_TO is None else add_TO + y_TO

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

    def attention_inputs(
        self,
        heads_THd: Tensor,
        norms: tuple[Tensor, Tensor, float],
        cos_Td: Tensor,
        sin_Td: Tensor,
        kv_heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values from their joint projection: the first two normalised and rotated.

        `norms` holds the weights of the query and the key norm and their epsilon. A
        faster set may work in place: the projection is not to be used afterwards.
        """
        q_weight, k_weight, eps = norms
        queries = heads_THd.shape[1] - 2 * kv_heads
        q, k, v = torch.split(heads_THd, [queries, kv_heads, kv_heads], dim=1)
        q = self.rotate(self.rms_norm(q, q_weight, eps), cos_Td, sin_Td)
        k = self.rotate(self.rms_norm(k, k_weight, eps), cos_Td, sin_Td)
        return q, k, v

    def linear_swiglu(self, x_TD: Tensor, gate_up_OD: Tensor) -> Tensor:
        """The first half of a feed-forward: `swiglu(linear(x, gate_up))`."""
        return self.swiglu(self.linear(x_TD, gate_up_OD))

    def choose(self, scores_TE: Tensor, per_token: int, normalise: bool) -> tuple[Tensor, Tensor]:
        """Chosen experts (T, N) and their weights: the largest of a float32 softmax, most likely first."""
        weight_TN, chosen_TN = scores_TE.float().softmax(-1).topk(per_token, dim=-1)
        if normalise:
            weight_TN = weight_TN / weight_TN.sum(-1, keepdim=True)
        return chosen_TN, weight_TN

    def argmax(self, scores_TV: Tensor) -> Tensor:
        """The first index of each row's largest value."""
        return scores_TV.argmax(-1)

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


def choose_ops(kernels: str | None = None, device: str = "cpu", threads: int | None = None) -> TorchOps:
    """The operations `kernels` names (`torch`, `native` or `auto`); None takes TONGYUN_KERNELS, else auto.

    `auto` is native on a CPU where the kernels can be built, and says once why where
    they cannot; `native` raises there instead. On a GPU it is PyTorch, as `DeviceOps` uses it.
    `threads` are those of the native kernels; PyTorch's own are set through PyTorch.
    """
    kernels = kernels or os.environ.get("TONGYUN_KERNELS") or "auto"
    if kernels not in CHOICES:
        raise InputError(unknown("kernels", kernels, CHOICES))
    if kernels == "native" and device != "cpu":
        raise InputError(f"native kernels run on a CPU, not on '{device}'")
    if device != "cpu":
        from tongyun.model.kernels.device import DeviceOps

        return DeviceOps()
    if kernels == "torch":
        return TorchOps()
    from tongyun.model.kernels.build import BuildFailed, load_kernels
    from tongyun.model.kernels.native import NativeOps

    try:
        return NativeOps(load_kernels(), threads)
    except BuildFailed as error:
        if kernels == "native":
            raise InputError(f"native kernels: {error}") from error
        log.warning("running on PyTorch operations, because native kernels cannot be had: %s", error)
        return TorchOps()
