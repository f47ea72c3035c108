"""The arithmetic of training equals the plain one, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tongyun.cloud.training.forward import (
    RouterRecord,
    TrainingOps,
    causal,
    new_model,
    summed_loss,
    token_losses,
)
from tongyun.cloud.training.optimizer import Optimizers, learning_rate, matrices, orthogonalise
from tongyun.cloud.training.recipe import Recipe
from tongyun.model.kernels import TorchOps


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def same(ours: Tensor, plain: Tensor, inputs: Sequence[Tensor]) -> None:
    torch.testing.assert_close(ours, plain)
    weights = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view_as(ours)
    mine, theirs = (torch.autograd.grad((y * weights).sum(), inputs) for y in (ours, plain))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sequence", [1, 100, 128, 300])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_causal_attention_equals_pytorchs(sequence: int, kv_heads: int) -> None:
    q, k, v = leaves((2 * sequence, 4, 8), (2 * sequence, kv_heads, 8), (2 * sequence, kv_heads, 8))
    ours = causal(sequence)(0, q, k, v)
    rows = [x.view(2, sequence, -1, 8).transpose(1, 2) for x in (q, k, v)]
    plain = functional.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
    same(ours, plain.transpose(1, 2).reshape(2 * sequence, 4, 8), (q, k, v))


def test_experts_equal_the_plain_ones_even_when_one_has_no_tokens() -> None:
    x, gate_up, down, weight = leaves((6, 8), (4, 10, 8), (4, 8, 5), (6, 2))
    chosen = torch.tensor([[0, 1], [1, 0], [3, 0], [3, 1], [0, 3], [1, 3]])
    inputs = (x, gate_up, down, weight)
    ours, plain = (ops.experts(x, gate_up, down, chosen, weight) for ops in (TrainingOps(), TorchOps()))
    same(ours, plain, inputs)


def test_norm_equals_the_plain_one() -> None:
    x, weight = (t.detach().float().requires_grad_() for t in leaves((6, 8), (8,)))
    same(TrainingOps().rms_norm(x, weight, 1e-6), TorchOps().rms_norm(x, weight, 1e-6), (x, weight))


def test_the_summed_loss_is_the_sum_and_has_its_gradients(recipe: Recipe) -> None:
    model = new_model(recipe.model_config, seed=1)
    tokens = torch.randint(0, 320, (2, 601), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    summed, each = summed_loss(model, inputs, targets), token_losses(model, inputs, targets)
    torch.testing.assert_close(summed, each.sum())
    parameters = list(model.parameters())
    mine, theirs = (torch.autograd.grad(loss, parameters) for loss in (summed, each.sum()))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_balance_is_one_when_shared_evenly_and_experts_when_not(recipe: Recipe) -> None:
    record = RouterRecord(new_model(recipe.model_config, seed=1))
    record.per_token = 1
    record.scores = [torch.eye(4).repeat(8, 1) * 1e-3]
    assert float(record.balance()) == pytest.approx(1.0, abs=1e-3)
    assert record.scores == []
    record.scores = [torch.tensor([[50.0, 0, 0, 0]]).repeat(8, 1)]
    assert float(record.balance()) == pytest.approx(4.0)


def test_only_differentiated_passes_are_recorded(recipe: Recipe) -> None:
    model = new_model(recipe.model_config, seed=1)
    record = RouterRecord(model)
    row = torch.zeros(1, 4, dtype=torch.long)
    with torch.no_grad():
        token_losses(model, row, row)
    assert record.scores == []
    token_losses(model, row, row)
    assert len(record.scores) == recipe.model.layers


def test_a_fresh_model_knows_nothing_and_is_repeatable(recipe: Recipe) -> None:
    first, second, other = (new_model(recipe.model_config, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.embedding.weight, second.embedding.weight)
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    row = torch.arange(16).view(1, 16)
    loss = float(token_losses(first, row, row + 1).mean().detach())
    assert loss == pytest.approx(torch.tensor(320.0).log().item(), rel=0.02)


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 12, 12)])
def test_orthogonalise_moves_singular_values_near_one(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalise(x))
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_muon_takes_every_matrix_apart_and_leaves_the_rest_to_adam(recipe: Recipe) -> None:
    model = new_model(recipe.model_config, seed=1)
    found = {id(m.parameter): m for m in matrices(model)}
    layer = model.layers[0]
    assert [p.shape for p in _pieces(found, layer.attention.qkv.weight)] == [
        (1, 32, 32),
        (1, 16, 32),
        (1, 16, 32),
    ]
    assert [p.shape for p in _pieces(found, layer.feed.gate_up)] == [(4, 16, 32), (4, 16, 32)]
    assert [p.shape for p in _pieces(found, layer.feed.down)] == [(4, 32, 16)]
    optimizers = Optimizers.of(model, recipe.optimizer)
    adam = {id(p) for group in optimizers.adam.param_groups for p in group["params"]}
    assert not adam & found.keys()
    assert len(adam) + len(found) == len(list(model.parameters()))
    assert {id(model.embedding.weight), id(layer.feed.router.weight), id(model.norm.weight)} <= adam


def _pieces(found: dict[int, object], parameter: Tensor) -> tuple[Tensor, ...]:
    matrix = found[id(parameter)]
    pieces: tuple[Tensor, ...] = matrix.pieces(parameter)  # type: ignore[attr-defined]
    return pieces


def test_a_step_of_muon_moves_every_expert_by_its_learning_rate(recipe: Recipe) -> None:
    model = new_model(recipe.model_config, seed=1)
    optimizers = Optimizers.of(model, recipe.optimizer)
    down = model.layers[0].feed.down
    before = down.detach().clone()
    down.grad = torch.randn(down.shape, generator=torch.Generator().manual_seed(2))
    down.grad[0] *= 1e-3
    optimizers.step(1.0)
    sizes = torch.linalg.matrix_norm(down.detach() - before, ord=2) / (0.02 * 2**0.5)
    assert (sizes > 0.6).all(), "a small gradient moves as far as a large one"
    assert (sizes < 1.3).all()
    assert down.grad is None


def test_the_learning_rate_rises_stays_and_falls(recipe: Recipe) -> None:
    factors = [learning_rate(step, recipe.training) for step in range(recipe.training.steps)]
    assert factors[0] == pytest.approx(1 / 1.2)
    assert factors[1:7] == [1.0] * 6
    assert factors[7:] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
