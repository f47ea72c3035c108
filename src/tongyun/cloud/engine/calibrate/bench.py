"""What every measurement needs: the device, the engine's operations, and random tensors.

A `Probe` is one thing to be timed and what its seconds are a sample of. Probes of all kinds
are timed together, so that a slow moment of the machine falls on all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from tongyun.cloud.engine.calibrate.stopwatch import Call
from tongyun.model.kernels import TorchOps
from tongyun.units import MIB, DType

BEYOND_CACHE_BYTES = 128 * MIB
"""Of copies of a matrix: more than the outer cache of any GPU that the engine runs on keeps of them."""
MOST_COPIES = 48

TORCH_TYPES = {DType.F32: torch.float32, DType.BF16: torch.bfloat16}

S = TypeVar("S")


@dataclass(frozen=True, kw_only=True)
class Probe(Generic[S]):
    """A call, and the sample its seconds make."""

    call: Call
    sample: Callable[[float], S]
    waits: bool = False
    """Whether the call reads a result back from the device."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One device as the engine would use it. `quick` measures a few points only, for tests."""

    device: torch.device
    ops: TorchOps
    weight_type: DType
    kv_type: DType
    activation_type: DType
    quick: bool = False

    @property
    def queued(self) -> bool:
        """Whether the host puts work on a queue and goes on, as it does for a GPU."""
        return self.device.type == "cuda"

    @property
    def kv_dtype(self) -> torch.dtype:
        return TORCH_TYPES[self.kv_type]

    def weight(self, *shape: int) -> Tensor:
        """Random weights in the stored type; values do not change how long a product takes."""
        return self._random(shape, TORCH_TYPES[self.weight_type])

    def copies(self, *shape: int) -> list[Tensor]:
        """The weights of one call after the other, round and round.

        On a CPU they are one matrix, which a cache may hold; `memory` says what a larger footprint costs.
        A GPU's caches are small beside the models that it runs: there each call has another
        copy than those before it, and what is measured is reading them from its memory.
        """
        first = self.weight(*shape)
        more = min(MOST_COPIES, BEYOND_CACHE_BYTES // first.nbytes) if self.queued else 0
        return [first, *(first.clone() for _ in range(more))]

    def activation(self, *shape: int) -> Tensor:
        return self._random(shape, TORCH_TYPES[self.activation_type])

    def cache(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.kv_dtype, device=self.device)

    def _random(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        generator = torch.Generator(device=self.device).manual_seed(0)
        values = torch.empty(shape, device=self.device, dtype=dtype)
        return values.uniform_(-0.05, 0.05, generator=generator)
