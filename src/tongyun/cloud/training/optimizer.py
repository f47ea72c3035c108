"""Muon for matrices, AdamW for the rest, and the learning-rate schedule.

Muon (Jordan et al. 2024) replaces a matrix's momentum by its nearest orthogonal
matrix. Fused parameters are taken apart into the matrices they hold: queries, keys
and values, gate and up, and every expert on its own. It knows no data and no loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tongyun.cloud.training import recipe
from tongyun.model.qwen3 import Qwen3

# Coefficients of the quintic iteration in Jordan's description: steep at zero, so that five
# rounds bring singular values into about 0.7 … 1.2, which serves as well as exactly one.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ROUNDS = 5


def orthogonalise(x_NRC: Tensor) -> Tensor:
    """Each matrix of a batch with its singular values moved close to one (Newton–Schulz)."""
    wide = x_NRC.shape[-2] <= x_NRC.shape[-1]
    x = x_NRC if wide else x_NRC.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x if wide else x.mT


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """A parameter that Muon updates, and how many rows each matrix stacked in it has."""

    parameter: Tensor
    rows: tuple[int, ...]

    def pieces(self, whole: Tensor) -> tuple[Tensor, ...]:
        return torch.split(whole.view(-1, *whole.shape[-2:]), list(self.rows), dim=-2)


def matrices(model: Qwen3) -> list[Matrices]:
    """Every matrix inside the layers except the routers."""
    found = []
    config = model.config
    heads = tuple(n * config.head_dim for n in (config.heads, config.kv_heads, config.kv_heads))
    for name, parameter in model.layers.named_parameters():
        if parameter.ndim < 2 or "router" in name:
            continue
        rows: tuple[int, ...] = (parameter.shape[-2],)
        if name.endswith("qkv.weight"):
            rows = heads
        elif "gate_up" in name:
            rows = (parameter.shape[-2] // 2,) * 2
        found.append(Matrices(parameter=parameter, rows=rows))
    return found


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; a step has size lr·√max(1, rows/columns) in every direction.

    Decoupled weight decay: p ← p·(1 − lr·decay).
    """

    def __init__(self, found: list[Matrices], *, lr: float, momentum: float, decay: float) -> None:
        self.found = found
        defaults = {"lr": lr, "momentum": momentum, "decay": decay}
        super().__init__([m.parameter for m in found], defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        lr, momentum = group["lr"], group["momentum"]
        for matrix in self.found:
            gradient, state = matrix.parameter.grad, self.state[matrix.parameter]
            if gradient is None:
                continue
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            state["momentum"].lerp_(gradient, 1 - momentum)
            direction = gradient.lerp(state["momentum"], momentum)
            matrix.parameter.mul_(1 - lr * group["decay"])
            for target, piece in zip(matrix.pieces(matrix.parameter), matrix.pieces(direction), strict=True):
                rows, columns = piece.shape[-2:]
                target.add_(orthogonalise(piece), alpha=-lr * max(1.0, rows / columns) ** 0.5)


@dataclass(frozen=True, kw_only=True)
class Optimizers:
    """The two optimizers of a run, moved together."""

    muon: Muon
    adam: torch.optim.AdamW
    settings: recipe.Optimizer

    @classmethod
    def of(cls, model: Qwen3, settings: recipe.Optimizer) -> Optimizers:
        found = matrices(model)
        taken = {id(m.parameter) for m in found}
        rest = [p for p in model.parameters() if id(p) not in taken]
        return cls(
            muon=Muon(
                found,
                lr=settings.matrix_lr,
                momentum=settings.matrix_momentum,
                decay=settings.matrix_decay,
            ),
            adam=torch.optim.AdamW(
                rest, lr=settings.other_lr, betas=settings.other_betas, weight_decay=0.0, foreach=True
            ),
            settings=settings,
        )

    def step(self, scale: float) -> None:
        """One update at `scale` times the recipe's learning rates; gradients are dropped."""
        for optimizer, lr in ((self.muon, self.settings.matrix_lr), (self.adam, self.settings.other_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


def learning_rate(step: int, training: recipe.Training) -> float:
    """Factor of the learning rate at `step`: linear warm-up, one, linear decay to nearly zero.

    The last step still moves, by 1/(decaying steps).
    """
    steps = training.steps
    warmup, decay = training.warmup * steps, training.decay * steps
    factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return min(factor, (steps - step) / decay) if decay else factor
