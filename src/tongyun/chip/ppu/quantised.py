"""A model whose products take few bits: weights once, rows anew at every product, sums in f32 or i32.

What is divided by its scale and rounded stays whole as an operator, as do products and experts that PyTorch
has no operator for. Products of fp8 scaled by row and column are PyTorch's own. Embedding, router, norms,
attention and the last product stay as they are. Knows no instructions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tongyun.errors import InputError, unknown

BLOCK = 128
"""Numbers of a row, and rows and columns of a weight, that share a scale where scales go by blocks."""
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
LEAST = 1e-12
WAYS = {
    "fp8": (torch.float8_e4m3fn, 0),
    "fp8_block": (torch.float8_e4m3fn, BLOCK),
    "int8": (torch.int8, 0),
}
"""By name: the type of weights and rows, and the block that shares a scale (0: a row, a column)."""


def quantised(model: Any, way: str) -> Any:
    """The model with the products and experts of its layers in few bits. InputError names a strange way."""
    if way == "bf16":
        return model
    if way not in WAYS:
        raise InputError(unknown("dtype", way, ["bf16", *WAYS]))
    for layer in model.model.layers:
        _replace(layer, *WAYS[way])
    return model


def _replace(module: nn.Module, dtype: torch.dtype, block: int) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            if child.bias is not None:
                raise InputError(f"{name}: a product of few bits takes no bias")
            setattr(module, name, QuantisedLinear(child.weight, dtype, block))
        elif hasattr(child, "gate_up_proj") and hasattr(child, "down_proj"):
            if isinstance(child.gate_up_proj, nn.Parameter):
                setattr(module, name, QuantisedExperts(child, dtype, block))
            else:
                _replace(child, dtype, block)
        else:
            _replace(child, dtype, block)


class QuantisedLinear(nn.Module):
    """x · weightᵀ, the weight scaled by its rows or by blocks of 128 × 128."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, block: int) -> None:
        super().__init__()
        values, scale = of_weight(weight.detach(), dtype, block)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        q, rows = quantise(flat, self.weight.dtype, self.block)
        if self.block or self.weight.dtype == torch.int8:
            y = scaled_product(q, self.weight, rows, self.scale, self.block)
        else:
            y = torch._scaled_mm(
                q, self.weight.t(), scale_a=rows, scale_b=self.scale.t(), out_dtype=torch.bfloat16
            )
        made: Tensor = y.reshape(*x.shape[:-1], -1)
        return made


class QuantisedExperts(nn.Module):
    """A mixture's experts, called as transformers calls them."""

    def __init__(self, experts: Any, dtype: torch.dtype, block: int) -> None:
        super().__init__()
        for name in ("gate_up_proj", "down_proj"):
            values, scale = of_weight(getattr(experts, name).detach(), dtype, block)
            setattr(self, name, nn.Parameter(values, requires_grad=False))
            setattr(self, f"{name}_scale", nn.Parameter(scale, requires_grad=False))
        self.block = block

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        y: Tensor = scaled_experts(
            x, self.gate_up_proj, self.down_proj, self.gate_up_proj_scale, self.down_proj_scale,
            top_k_index, top_k_weights, self.block,
        )  # fmt: skip
        return y.reshape(hidden_states.shape)


def of_weight(weight: Tensor, dtype: torch.dtype, block: int) -> tuple[Tensor, Tensor]:
    """A weight [..., n, k] in few bits, and its scales [..., n, 1], or [..., n / 128, k / 128] by blocks."""
    wide = weight.float()
    if not block:
        scale = _scale(wide.abs().amax(-1, keepdim=True), dtype)
        return _rounded(wide * scale.reciprocal(), dtype), scale
    *_, n, k = wide.shape
    filled = nn.functional.pad(wide, (0, -k % block, 0, -n % block))
    parts = filled.reshape(*filled.shape[:-2], -(-n // block), block, -1, block)
    scale = _scale(parts.abs().amax((-3, -1)), dtype)
    whole = spread(scale, block, (n, k))
    return _rounded(wide * whole.reciprocal(), dtype), scale


def spread(scale: Tensor, block: int, shape: tuple[int, int]) -> Tensor:
    """A scale for each number of a [..., n, k]: by blocks, or one for each row."""
    if not block:
        return scale.expand(*scale.shape[:-1], shape[1])
    return scale.repeat_interleave(block, -1).repeat_interleave(block, -2)[..., : shape[0], : shape[1]]


def _scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    return (largest * (1 / LARGEST[dtype])).clamp(min=LEAST)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    most = LARGEST[dtype]
    return (x.round() if dtype == torch.int8 else x).clamp(-most, most).to(dtype)


@torch.library.custom_op("tongyun::quantise", mutates_args=())
def quantise(x: Tensor, dtype: torch.dtype, block: int) -> tuple[Tensor, Tensor]:
    """Rows [m, k] in few bits and their scales [m, 1], or [m, k / 128] by blocks: max |x| / largest."""
    parts = x.float().reshape(*x.shape[:-1], -1, block or x.shape[-1])
    scale = _scale(parts.abs().amax(-1, keepdim=True), dtype)
    return _rounded(parts * scale.reciprocal(), dtype).flatten(-2), scale.squeeze(-1)


@quantise.register_fake
def _(x: Tensor, dtype: torch.dtype, block: int) -> tuple[Tensor, Tensor]:
    if block and x.shape[-1] % block:
        raise InputError(f"rows of {x.shape[-1]} numbers are no whole blocks of {block}")
    blocks = x.shape[-1] // block if block else 1
    scale = torch.empty(x.shape[0], blocks, dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=dtype, device=x.device), scale


@torch.library.custom_op("tongyun::scaled_product", mutates_args=())
def scaled_product(q: Tensor, weight: Tensor, rows: Tensor, columns: Tensor, block: int) -> Tensor:
    """bf16 of (q · rows) · (weight · columns)ᵀ."""
    n, k = weight.shape
    if q.dtype == torch.int8 and not block:
        return ((q.double() @ weight.double().T).float() * rows * columns.T).bfloat16()
    left = q.float() * (rows.repeat_interleave(block, -1) if block else rows)
    return (left @ (weight.float() * spread(columns, block, (n, k))).T).bfloat16()


@scaled_product.register_fake
def _(q: Tensor, weight: Tensor, rows: Tensor, columns: Tensor, block: int) -> Tensor:
    return torch.empty(q.shape[0], weight.shape[0], dtype=torch.bfloat16, device=q.device)


@torch.library.custom_op("tongyun::scaled_experts", mutates_args=())
def scaled_experts(
    x: Tensor, up: Tensor, down: Tensor, up_scale: Tensor, down_scale: Tensor, chosen: Tensor,
    share: Tensor, block: int,
) -> Tensor:  # fmt: skip
    """Each row through its chosen experts, rows in few bits before each of both products, summed by share."""
    total = torch.zeros(x.shape, dtype=torch.float32)
    q, rows = quantise(x, up.dtype, block)
    for expert in range(up.shape[0]):
        row, choice = torch.where(chosen == expert)
        if not len(row):
            continue
        both = scaled_product(q[row], up[expert], rows[row], up_scale[expert], block)
        gate, linear = both.float().chunk(2, -1)
        act, scale = quantise((nn.functional.silu(gate) * linear).bfloat16(), down.dtype, block)
        made = scaled_product(act, down[expert], scale, down_scale[expert], block)
        total.index_add_(0, row, made.float() * share[row, choice, None].float())
    return total.to(x.dtype)


@scaled_experts.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)
