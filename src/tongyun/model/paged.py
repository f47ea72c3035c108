"""The paged KV cache and attention over it.

Holds keys and values of all layers in blocks of `block_tokens` tokens. Which request
owns a block is decided elsewhere; the cache only reads and writes the blocks a
`Layout` names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tongyun.model.config import ModelConfig
from tongyun.model.kernels import TorchOps
from tongyun.model.kernels.attention import Layout


def block_bytes(config: ModelConfig, block_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers: 2 × layers × K × d × tokens × element size."""
    return config.kv_elements * block_tokens * dtype.itemsize


class PagedCache:
    """Keys and values, each (layers, blocks, K, block tokens, head width)."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        blocks: int,
        block_tokens: int = 16,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        spare: int = 0,
    ) -> None:
        """`spare` blocks lie behind the others: a place for what nobody will read."""
        self.blocks, self.block_tokens, self.spare = blocks, block_tokens, spare
        shape = (config.layers, blocks + spare, config.kv_heads, block_tokens, config.head_dim)
        # Zeros, not empty: a masked position still multiplies what is stored there, and 0 × NaN is NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self._layers = list(zip(self.keys.unbind(0), self.values.unbind(0), strict=True))

    @property
    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, (blocks, K, block tokens, d) each."""
        return self._layers[index]

    def read_blocks(self, blocks: Sequence[int]) -> Tensor:
        """A copy of what these blocks hold, (2, layers, as many, K, block tokens, d): keys, then values."""
        index = torch.tensor(blocks, device=self.keys.device)
        return torch.stack((self.keys[:, index], self.values[:, index]))

    def write_blocks(self, blocks: Sequence[int], contents: Tensor) -> None:
        """Give as many blocks what was read, here or from a cache of the same layout."""
        index = torch.tensor(blocks, device=self.keys.device)
        keys, values = contents.to(self.keys.device)
        self.keys[:, index], self.values[:, index] = keys, values


class PagedAttend:
    """The `Attend` of one step: writes the step's keys and values, reads every piece's context."""

    def __init__(self, cache: PagedCache, layout: Layout, ops: TorchOps) -> None:
        self.cache, self.layout, self.ops = cache, layout, ops

    def __call__(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        keys, values = self.cache.layer(layer)
        return self.ops.paged_attention(q_THd, k_TKd, v_TKd, keys, values, self.layout)
