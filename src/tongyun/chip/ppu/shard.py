"""Cut a Qwen3 over the chips of one ICN domain: what each holds, and where they add up.

Heads, inner columns and the vocabulary of the last product are dealt out; norms, router and embedding are
on every chip. After attention and after the experts (or the dense product) the chips sum their parts.
The cut is made in the model, before it is captured: every chip runs the same words on its own weights.
Knows no instructions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tongyun.errors import InputError

_INNER = ("intermediate_size", "moe_intermediate_size")


@torch.library.custom_op("tongyun::all_reduce", mutates_args=())
def all_reduce(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """The sum of `x` over the chips. It is compiled for them; no process computes it."""
    raise InputError(f"a sum over {ranks} chips runs on chips only: compile the model for the PPU")


@all_reduce.register_fake
def _(x: torch.Tensor, ranks: int) -> torch.Tensor:
    return torch.empty_like(x)


class Summed(torch.nn.Module):
    """A module whose result is one chip's part of a sum."""

    def __init__(self, part: torch.nn.Module, ranks: int) -> None:
        super().__init__()
        self.part = part
        self.ranks = ranks

    def forward(self, *inputs: Any, **named: Any) -> torch.Tensor:
        found: torch.Tensor = all_reduce(self.part(*inputs, **named), self.ranks)
        return found


def plain(name: str) -> str:
    """A parameter's name in the whole model."""
    return name.replace(".part.", ".")


def part(config: Mapping[str, Any], chips: int) -> dict[str, Any]:
    """The `config.json` of what one of `chips` chips holds.

    Key heads that are fewer than chips are held by several. InputError names a size that cannot be dealt out.
    """
    cut = dict(config)
    if chips == 1:
        return cut
    heads, kv = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
    cut["head_dim"] = config.get("head_dim") or int(config["hidden_size"]) // heads
    for name in ("num_attention_heads", "vocab_size", *_INNER):
        if config.get(name) is None:
            continue
        if int(config[name]) % chips:
            raise InputError(f"{name} = {config[name]} cannot be dealt out to {chips} chips")
        cut[name] = int(config[name]) // chips
    if kv % chips and chips % kv:
        raise InputError(f"num_key_value_heads = {kv} cannot be dealt out to {chips} chips")
    cut["num_key_value_heads"] = max(1, kv // chips)
    # The embedding is whole on each chip, the last product's weight is not.
    cut["vocab_size"] = config["vocab_size"]
    cut["tie_word_embeddings"] = False
    return cut


def joined(model: Any, chips: int) -> Any:
    """One chip's model, made from its `part` of the configuration, with the sums over all chips."""
    if chips == 1:
        return model
    for layer in model.model.layers:
        layer.self_attn.o_proj = Summed(layer.self_attn.o_proj, chips)
        layer.mlp = Summed(layer.mlp, chips)
    head = model.lm_head
    model.lm_head = torch.nn.Linear(
        head.in_features, head.out_features // chips, bias=False, dtype=head.weight.dtype
    ).eval()
    return model


def load(one: Any, whole: Mapping[str, torch.Tensor], config: Mapping[str, Any], rank: int) -> None:
    """Give one chip's model its part of the whole model's parameters."""
    chips = next(module.ranks for module in one.modules() if isinstance(module, Summed))
    with torch.no_grad():
        for name, value in one.named_parameters():
            value.copy_(held(plain(name), whole[plain(name)], config, chips, rank))


def held(name: str, whole: torch.Tensor, config: Mapping[str, Any], chips: int, rank: int) -> torch.Tensor:
    """What chip `rank` holds of a parameter of the whole model, or of a cache's keys and values.

    `config` is the whole model's.
    """
    if chips == 1:
        return whole
    kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if kind in {"k_proj", "v_proj"} or (name.startswith("cache.") and whole.ndim == 4):
        kv = int(config["num_key_value_heads"])
        width = whole.shape[0] // kv if kind.endswith("proj") else 1
        count, first = max(1, kv // chips), rank * kv // chips
        return whole.narrow(0 if kind.endswith("proj") else 1, first * width, count * width)
    if kind in {"q_proj", "gate_proj", "up_proj", "lm_head"}:
        return whole.chunk(chips, 0)[rank]
    if kind in {"o_proj", "down_proj"}:
        return whole.chunk(chips, -1)[rank]
    if kind == "gate_up_proj":
        return torch.cat([half.chunk(chips, -2)[rank] for half in whole.chunk(2, -2)], -2)
    return whole
