"""Qwen3, dense and mixture-of-experts, in PyTorch.

The model sees a flat row of tokens and their positions. How tokens attend to each
other, and where keys and values are kept, is the business of the `Attend` that is
passed in: training gives causal attention over whole sequences, the engine gives
paged attention over its cache. The model knows no batch, cache or request.

Shape suffixes as in `kernels`: T tokens, D hidden, H query heads, K key/value
heads, d head width, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from tongyun.errors import InputError
from tongyun.model.config import ModelConfig
from tongyun.model.kernels import TorchOps


class Attend(Protocol):
    """Attention of one layer: queries, keys and values of the same tokens in, values out."""

    def __call__(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor: ...


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float, ops: TorchOps) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)


class Linear(nn.Module):
    """A matrix without bias; every projection of Qwen3 is one."""

    def __init__(self, inputs: int, outputs: int, ops: TorchOps) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.ops = ops

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return self.ops.linear(x, self.weight, add)


class Embedding(nn.Module):
    """A row of the table for each token."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, tokens_T: Tensor) -> Tensor:
        return self.weight[tokens_T]


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, config: ModelConfig, layer: int, ops: TorchOps) -> None:
        super().__init__()
        self.layer, self.ops = layer, ops
        self.heads, self.kv_heads, self.width = config.heads, config.kv_heads, config.head_dim
        self.qkv = Linear(config.hidden, (config.heads + 2 * config.kv_heads) * config.head_dim, ops)
        self.out = Linear(config.heads * config.head_dim, config.hidden, ops)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, ops)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, ops)

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend
    ) -> Tensor:
        heads_THd = self.qkv(x_TD).unflatten(-1, (-1, self.width))
        norms = (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        q, k, v = self.ops.attention_inputs(heads_THd, norms, *rotation, self.kv_heads)
        y_TD: Tensor = self.out(attend(self.layer, q, k, v).flatten(1), residual_TD)
        return y_TD


class Dense(nn.Module):
    """The SwiGLU feed-forward."""

    def __init__(self, config: ModelConfig, ops: TorchOps) -> None:
        super().__init__()
        self.gate_up = Linear(config.hidden, 2 * config.intermediate, ops)
        self.down = Linear(config.intermediate, config.hidden, ops)
        self.ops = ops

    def forward(self, x_TD: Tensor, residual_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.down(self.ops.linear_swiglu(x_TD, self.gate_up.weight), residual_TD)
        return y_TD


class MixtureOfExperts(nn.Module):
    """A router and its experts. Router probabilities are float32, as in the reference."""

    def __init__(self, config: ModelConfig, ops: TorchOps) -> None:
        super().__init__()
        assert config.experts is not None
        experts = config.experts
        self.per_token, self.normalise = experts.per_token, experts.normalise_top_k
        self.router = Linear(config.hidden, experts.count, ops)
        self.gate_up = nn.Parameter(torch.empty(experts.count, 2 * experts.intermediate, config.hidden))
        self.down = nn.Parameter(torch.empty(experts.count, config.hidden, experts.intermediate))
        self.ops = ops

    def forward(self, x_TD: Tensor, residual_TD: Tensor) -> Tensor:
        chosen_TN, weight_TN = self.ops.choose(self.router(x_TD), self.per_token, self.normalise)
        return residual_TD + self.ops.experts(x_TD, self.gate_up, self.down, chosen_TN, weight_TN)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, index: int, ops: TorchOps) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, config.norm_eps, ops)
        self.attention = Attention(config, index, ops)
        self.feed_norm = RMSNorm(config.hidden, config.norm_eps, ops)
        sparse = config.experts is not None and index >= config.experts.first_layer
        self.feed: nn.Module = MixtureOfExperts(config, ops) if sparse else Dense(config, ops)

    def forward(self, x_TD: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x_TD = self.attention(self.attention_norm(x_TD), x_TD, rotation, attend)
        y_TD: Tensor = self.feed(self.feed_norm(x_TD), x_TD)
        return y_TD


class Qwen3(nn.Module):
    """Tokens and positions in, hidden states out; `logits` turns chosen rows into scores.

    `activation_dtype` is the arithmetic type; weights may be stored narrower.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        ops: TorchOps | None = None,
        activation_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if config.family not in ("qwen3", "qwen3_moe") or config.attention_bias:
            raise InputError(f"{config.name}: the engine runs Qwen3 dense and MoE, not '{config.family}'")
        ops = ops or TorchOps()
        self.config, self.ops, self.activation_dtype = config, ops, activation_dtype
        self.embedding = Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Layer(config, i, ops) for i in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps, ops)
        self.head = Linear(config.hidden, config.vocab, ops)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.frequency: Tensor
        exponents = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
        self.register_buffer("frequency", config.rope_theta**-exponents, persistent=False)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        x_TD: Tensor = self.embedding(tokens_T).to(self.activation_dtype)
        rotation = self.rotation(positions_T)
        for layer in self.layers:
            x_TD = layer(x_TD, rotation, attend)
        y_TD: Tensor = self.norm(x_TD)
        return y_TD

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Scores over the vocabulary, (T, V) float32."""
        scores_TV: Tensor = self.head(hidden_TD)
        return scores_TV.float()

    def rotation(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions_T.float().unsqueeze(-1) * self.frequency
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(self.activation_dtype), angle.sin().to(self.activation_dtype)
