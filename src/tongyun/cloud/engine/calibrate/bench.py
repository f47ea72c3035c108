"""What every measurement needs: the device, the engine's operations, a stopwatch and random tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tongyun.cloud.engine.calibrate.stopwatch import Stopwatch
from tongyun.model.kernels import TorchOps
from tongyun.units import DType

TORCH_TYPES = {DType.F32: torch.float32, DType.BF16: torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One device as the engine would use it. `quick` measures a few points only, for tests."""

    device: torch.device
    ops: TorchOps
    weight_type: DType
    kv_type: DType
    activation_type: DType
    stopwatch: Stopwatch
    quick: bool = False

    @property
    def kv_dtype(self) -> torch.dtype:
        return TORCH_TYPES[self.kv_type]

    def seconds(self, call: Callable[[], object]) -> float:
        """Median seconds of one call."""
        with torch.inference_mode():
            return self.stopwatch.seconds(call)

    def weight(self, *shape: int) -> Tensor:
        """Random weights in the stored type; values do not change how long a product takes."""
        return self._random(shape, TORCH_TYPES[self.weight_type])

    def activation(self, *shape: int) -> Tensor:
        return self._random(shape, TORCH_TYPES[self.activation_type])

    def _random(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        generator = torch.Generator(device=self.device).manual_seed(0)
        values = torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)
        return values.mul_(0.02).to(dtype)
