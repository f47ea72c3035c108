"""How a Qwen3 runs in training: whole rows, causal attention, router statistics.

The model is the one that is served; training passes it other operations and another
`Attend`. It knows no optimizer, data or file.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tongyun.model.config import ModelConfig
from tongyun.model.kernels import TorchOps
from tongyun.model.qwen3 import Attend, MixtureOfExperts, Qwen3


class TrainingOps(TorchOps):
    """The operations of `TorchOps` with backward passes that do less work on a CPU."""

    name = "torch-training"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, eps)

    def experts(
        self,
        x_TD: Tensor,
        gate_up_EOD: Tensor,
        down_EDI: Tensor,
        chosen_TN: Tensor,
        weight_TN: Tensor,
    ) -> Tensor:
        """As `TorchOps.experts`; unbinding the experts makes one gradient for all of them
        where indexing makes a zero-filled one for each."""
        order = chosen_TN.flatten().argsort(stable=True)
        rows = order // chosen_TN.shape[1]
        counts = torch.bincount(chosen_TN.flatten(), minlength=gate_up_EOD.shape[0]).tolist()
        gathered = x_TD.index_select(0, rows)
        outputs = []
        experts = zip(torch.split(gathered, counts), gate_up_EOD.unbind(0), down_EDI.unbind(0), strict=True)
        for x, gate_up_OD, down_DI in experts:
            outputs.append(self.linear(self.swiglu(self.linear(x, gate_up_OD)), down_DI))
        weighted = torch.cat(outputs) * weight_TN.flatten()[order].unsqueeze(1)
        return torch.zeros_like(x_TD).index_add(0, rows, weighted)


class _CausalAttention(torch.autograd.Function):
    """Causal attention by blocks of queries, each against the keys up to its end.

    Query heads that share a key head are rows of one matrix, so that keys and values
    are never repeated. Arrays are (N, G, S, d) and (N, S, d): N rows times key heads,
    G query heads a key head. PyTorch's fused kernel is meant for longer rows and is slower
    on these on a CPU.
    """

    BLOCK = 128

    @staticmethod
    def forward(ctx: Any, q_NGSd: Tensor, k_NSd: Tensor, v_NSd: Tensor) -> Tensor:
        y_NGSd = torch.empty_like(q_NGSd)
        kept = []
        for first, stop in _blocks(k_NSd.shape[1]):
            q = q_NGSd[:, :, first:stop].flatten(1, 2)
            scores = torch.bmm(q, k_NSd[:, :stop].mT).mul_(q.shape[-1] ** -0.5)
            hidden = torch.ones(stop - first, stop - first, dtype=torch.bool).triu(1)
            scores.view(len(q), -1, stop - first, stop)[..., first:].masked_fill_(hidden, -math.inf)
            p = scores.softmax(-1)
            y = torch.bmm(p, v_NSd[:, :stop])
            y_NGSd[:, :, first:stop] = y.view_as(y_NGSd[:, :, first:stop])
            kept.append(p)
        ctx.save_for_backward(q_NGSd, k_NSd, v_NSd, *kept)
        return y_NGSd

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_NGSd, k_NSd, v_NSd, *kept = ctx.saved_tensors
        dq_NGSd, dk_NSd, dv_NSd = torch.empty_like(q_NGSd), torch.zeros_like(k_NSd), torch.zeros_like(v_NSd)
        for (first, stop), p in zip(_blocks(k_NSd.shape[1]), kept, strict=True):
            q, dy = (x[:, :, first:stop].flatten(1, 2) for x in (q_NGSd, upstream[0]))
            dv_NSd[:, :stop] += torch.bmm(p.mT, dy)
            dp = torch.bmm(dy, v_NSd[:, :stop].mT)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(q.shape[-1] ** -0.5)
            dk_NSd[:, :stop] += torch.bmm(ds.mT, q)
            dq = torch.bmm(ds, k_NSd[:, :stop])
            dq_NGSd[:, :, first:stop] = dq.view_as(dq_NGSd[:, :, first:stop])
        return dq_NGSd, dk_NSd, dv_NSd


def _blocks(sequence: int) -> list[tuple[int, int]]:
    size = _CausalAttention.BLOCK
    return [(first, min(first + size, sequence)) for first in range(0, sequence, size)]


def causal(sequence: int) -> Attend:
    """Attention within rows of `sequence` tokens that lie one after another."""

    def attend(layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        tokens, heads, width = q_THd.shape
        kv_heads = k_TKd.shape[1]
        k, v = (
            x.view(-1, sequence, kv_heads, width).transpose(1, 2).reshape(-1, sequence, width)
            for x in (k_TKd, v_TKd)
        )
        q = q_THd.view(-1, sequence, kv_heads, heads // kv_heads, width).permute(0, 2, 3, 1, 4)
        y: Tensor = _CausalAttention.apply(q.flatten(0, 1).contiguous(), k, v)  # type: ignore[no-untyped-call]
        y = y.view(-1, kv_heads, heads // kv_heads, sequence, width)
        return y.permute(0, 3, 1, 2, 4).reshape(tokens, heads, width)

    return attend


def initialise(model: Qwen3, generator: torch.Generator) -> None:
    """Normal weights of deviation 0.02; what adds to the residual is divided by √(2·layers)."""
    residual = 0.02 / (2 * model.config.layers) ** 0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                std = residual if name.endswith(("attention.out.weight", "feed.down")) else 0.02
                parameter.normal_(0.0, std, generator=generator)


def new_model(config: ModelConfig, seed: int) -> Qwen3:
    """A freshly initialised model in float32."""
    model = Qwen3(config, ops=TrainingOps())
    initialise(model, torch.Generator().manual_seed(seed))
    return model


class RouterRecord:
    """Collects each layer's router scores of the latest forward pass that is differentiated."""

    def __init__(self, model: Qwen3) -> None:
        self.scores: list[Tensor] = []
        self.per_token = 1
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                self.per_token = module.per_token
                module.router.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, scores_TE: Tensor) -> None:
        if torch.is_grad_enabled():
            self.scores.append(scores_TE)

    def balance(self) -> Tensor:
        """Mean over layers of E·Σ fₑ·Pₑ, then forgets; 1 when every expert gets the same share.

        fₑ is expert e's share of the choices, Pₑ its mean probability
        (Switch Transformer, Fedus et al. 2021, eq. 4–6, over top-k choices).
        """
        losses = []
        for scores_TE in self.scores:
            probability_TE = scores_TE.softmax(-1)
            experts = scores_TE.shape[-1]
            chosen = probability_TE.topk(self.per_token, dim=-1).indices.flatten()
            share = torch.bincount(chosen, minlength=experts).float() / len(chosen)
            losses.append(experts * (share * probability_TE.mean(0)).sum())
        self.scores.clear()
        return torch.stack(losses).mean()


class _CrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of hidden states under a table, a few hundred rows at a time.

    The gradient is made in the forward pass while the rows' scores are still in the
    cache; the (T, V) scores never exist as a whole.
    """

    ROWS = 512

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, table_VD: Tensor, targets_T: Tensor) -> Tensor:
        total = hidden_TD.new_zeros(())
        d_hidden, d_table = torch.empty_like(hidden_TD), torch.zeros_like(table_VD)
        for first in range(0, len(targets_T), _CrossEntropy.ROWS):
            chunk = slice(first, first + _CrossEntropy.ROWS)
            hidden, targets = hidden_TD[chunk], targets_T[chunk].unsqueeze(1)
            scores_TV = hidden @ table_VD.T
            scores_TV.sub_(scores_TV.amax(1, keepdim=True))
            at_target = scores_TV.gather(1, targets)
            sums = scores_TV.exp_().sum(1, keepdim=True)
            total += (sums.log() - at_target).sum()
            gradient = scores_TV.div_(sums)
            gradient.scatter_add_(1, targets, torch.full_like(at_target, -1.0))
            torch.mm(gradient, table_VD, out=d_hidden[chunk])
            d_table.addmm_(gradient.T, hidden)
        ctx.save_for_backward(d_hidden, d_table)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        d_hidden, d_table = ctx.saved_tensors
        return d_hidden * upstream[0], d_table * upstream[0], None


def summed_loss(model: Qwen3, inputs_BS: Tensor, targets_BS: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over all targets; cheaper to differentiate than `token_losses`."""
    hidden_TD, table_VD = hidden_states(model, inputs_BS), model.head.weight
    loss: Tensor = _CrossEntropy.apply(hidden_TD, table_VD, targets_BS.flatten())  # type: ignore[no-untyped-call]
    return loss


def hidden_states(model: Qwen3, inputs_BS: Tensor) -> Tensor:
    batch, sequence = inputs_BS.shape
    positions_T = torch.arange(sequence).repeat(batch)
    y_TD: Tensor = model(inputs_BS.flatten(), positions_T, causal(sequence))
    return y_TD


def token_losses(model: Qwen3, inputs_BS: Tensor, targets_BS: Tensor) -> Tensor:
    """Cross-entropy in nats of every target, (B·S,)."""
    scores_TV = model.logits(hidden_states(model, inputs_BS))
    return functional.cross_entropy(scores_TV, targets_BS.flatten(), reduction="none")
