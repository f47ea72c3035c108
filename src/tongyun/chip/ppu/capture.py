"""A step of a catalogue model as a graph: transformers' own model, traced without weights.

Tensors are fake: shapes and types without numbers, so that a model of any size is traced in seconds.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from tongyun.chip.ppu import shard
from tongyun.chip.ppu.cores import quickest
from tongyun.chip.ppu.fusions import Fusions
from tongyun.chip.ppu.lower import Lowered, Scale, lower
from tongyun.chip.ppu.quantised import quantised
from tongyun.chip.ppu.repeat import UnlikeError
from tongyun.errors import InputError, unknown
from tongyun.specs.ppu import Ppu

CAPTURED = 3
"""Layers of a deep model that are captured; the others repeat the last of them."""


class _TracedError(Exception):
    """Thrown by the traced function: it has no numbers to compute with."""


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A graph, and for each of its placeholders the tensor that a call gives it and its name in the model."""

    graph: GraphModule
    given: tuple[torch.Tensor, ...]
    names: Mapping[str, str]


def compile_step(
    config: Mapping[str, Any],
    ppu: Ppu,
    *,
    tokens: int,
    context: int = 0,
    layers: int | None = None,
    fusions: Fusions | None = None,
    chips: int = 1,
    dtype: str = "bf16",
    symbols: Mapping[str, ArrayLike] | None = None,
) -> Lowered:
    """The program of one step: `tokens` new tokens of one sequence behind `context` cached ones.

    `dtype` is bf16, or what the products of the layers take (`quantised.WAYS`).
    `config` is a Qwen3 `config.json`, dense or MoE; `layers` replaces its number of layers. With `chips` the
    model is cut over so many, which run the same words. With `symbols`, the numbers that the step will read,
    it is compiled for as many cores as take least, by `cores.quickest`. InputError for another family or a
    model that cannot be cut so; Infeasible when it does not fit the chip, with the bytes missing.
    """
    family = _family(config)
    if tokens < 1 or context < 0:
        raise InputError(f"a step has at least one token behind at least none, got {tokens} and {context}")
    if chips > ppu.icn_domain:
        raise InputError(f"{ppu.name} joins at most {ppu.icn_domain} chips, got {chips}")
    wanted = layers or int(config["num_hidden_layers"])
    part = {**shard.part(config, chips), "num_hidden_layers": min(wanted, CAPTURED)}
    graph = _traced(family, part, (chips, dtype), tokens, context)
    scale = Scale(layers=wanted, chips=chips, names=graph.names)
    try:
        lowered = lower(graph.graph, ppu, fusions, scale)
    except UnlikeError:
        # Layers that differ (some with experts, some without) are captured one by one.
        graph = _traced(family, {**part, "num_hidden_layers": wanted}, (chips, dtype), tokens, context)
        scale = Scale(chips=chips, names=graph.names)
        lowered = lower(graph.graph, ppu, fusions, scale)
    if symbols is None:
        return lowered
    cores = quickest(lambda fewer: lower(graph.graph, fewer, fusions, scale).program, ppu, symbols)
    return lower(graph.graph, replace(ppu, cores=cores), fusions, scale)


def capture(model: torch.nn.Module, *inputs: Any, **named: Any) -> Captured:
    """The one graph of a call of a model under `torch.no_grad`; nothing is computed.

    Names are those of the model's parameters and buffers, and `keys`, `values` and `length` of a cache's
    layers. InputError when the call is not one graph.
    """
    found: list[GraphModule] = []
    given: list[torch.Tensor] = []

    def keep(graph: GraphModule, _: Sequence[torch.Tensor]) -> Callable[..., Any]:
        found.append(graph)

        def call(values: Sequence[torch.Tensor]) -> Any:
            given.extend(values)
            raise _TracedError

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    backend: Any = aot_autograd(fw_compiler=keep, inference_compiler=keep)
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch.no_grad():
        # A version asked for through a cached function is traced anew; the answer is the same.
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        try:
            torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(*inputs, **named)
        except _TracedError:
            pass
        finally:
            torch._dynamo.reset()
    if len(found) != 1:
        raise InputError(f"the step is {len(found)} graphs; the PPU takes one")
    placeholders = [node.name for node in found[0].graph.nodes if node.op == "placeholder"]
    known = {id(value): name for name, value in _named(model, named)}
    names = {
        place: known[id(value)]
        for place, value in zip(placeholders, given, strict=True)
        if id(value) in known
    }
    return Captured(graph=found[0], given=tuple(given), names=names)


def _named(model: torch.nn.Module, named: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        yield shard.plain(name), value
    for number, layer in enumerate(getattr(named.get("past_key_values"), "layers", ())):
        for name, what in (("keys", "keys"), ("values", "values"), ("cumulative_length", "length")):
            kept = getattr(layer, name, None)
            if isinstance(kept, torch.Tensor):
                yield f"cache.{number}.{what}", kept


def _family(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """transformers' configuration and model of a `config.json`."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    families = {
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    }
    family = str(config.get("model_type", ""))
    if family not in families:
        raise InputError(unknown("model_type", family, families))
    return families[family]


def _traced(
    family: tuple[Any, Any], config: dict[str, Any], how: tuple[int, str], tokens: int, context: int
) -> Captured:
    """`how`: over how many chips, and the type of the products."""
    import transformers

    make_config, make_model = family
    settings = make_config(**config)
    room = -(-(tokens + context) // 64) * 64
    before = torch.get_default_dtype()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = quantised(shard.joined(make_model(settings).eval(), how[0]), how[1])
        finally:
            torch.set_default_dtype(before)
        cache: Any = transformers.StaticCache(config=settings, max_cache_len=room)
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        if context:
            # A cache that has been written to is an input, and its mask is one over all positions.
            heads = settings.num_key_value_heads
            cache.early_initialization(1, heads, settings.head_dim, torch.bfloat16, torch.device("cpu"))
            # transformers masks differently behind a cache that is known to be empty.
            for layer in cache.layers:
                layer.cumulative_length_int = context
        return capture(model, ids, past_key_values=cache, use_cache=True)
