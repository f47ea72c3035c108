"""A step of a catalogue model as a graph: transformers' own model, traced without weights.

Tensors are fake: shapes and types without numbers, so that a model of any size is traced in seconds.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from tongyun.chip.ppu.lower import Fusions, Lowered, lower
from tongyun.errors import InputError, unknown
from tongyun.specs.ppu import Ppu


class _TracedError(Exception):
    """Thrown by the traced function: it has no numbers to compute with."""


def compile_step(
    config: Mapping[str, Any],
    ppu: Ppu,
    *,
    tokens: int,
    context: int = 0,
    layers: int | None = None,
    fusions: Fusions | None = None,
) -> Lowered:
    """The program of one step: `tokens` new tokens of one sequence behind `context` cached ones, in bf16.

    `config` is a Qwen3 `config.json`, dense or MoE; `layers` replaces its number of layers. InputError for
    another family; Infeasible when it does not fit the chip, with the bytes missing.
    """
    found: list[Lowered] = []

    def keep(graph: GraphModule, _: Sequence[torch.Tensor]) -> Callable[..., Any]:
        found.append(lower(graph, ppu, fusions))

        def call(*_: Any) -> Any:
            raise _TracedError

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    _trace(dict(config), aot_autograd(fw_compiler=keep, inference_compiler=keep), tokens, context, layers)
    if len(found) != 1:
        raise InputError(f"the step is {len(found)} graphs; the PPU takes one")
    return found[0]


def _trace(config: dict[str, Any], backend: Any, tokens: int, context: int, layers: int | None) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    families = {
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    }
    family = str(config.get("model_type", ""))
    if family not in families:
        raise InputError(unknown("model_type", family, families))
    if tokens < 1 or context < 0:
        raise InputError(f"a step has at least one token behind at least none, got {tokens} and {context}")
    make_config, make_model = families[family]
    settings = make_config(**{**config, "num_hidden_layers": layers or config["num_hidden_layers"]})
    room = -(-(tokens + context) // 64) * 64
    torch._dynamo.reset()
    before = torch.get_default_dtype()
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        # A version asked for through a cached function is traced anew; the answer is the same.
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = make_model(settings).eval()
        finally:
            torch.set_default_dtype(before)
        cache: Any = transformers.StaticCache(config=settings, max_cache_len=room)
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        traced: Any = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
        if context:
            # A cache that has been written to is an input, and its mask is one over all positions.
            heads = settings.num_key_value_heads
            cache.early_initialization(1, heads, settings.head_dim, torch.bfloat16, torch.device("cpu"))
            # transformers masks differently behind a cache that is known to be empty.
            for layer in cache.layers:
                layer.cumulative_length_int = context
        try:
            traced(ids, past_key_values=cache, use_cache=True)
        except _TracedError:
            pass
        finally:
            torch._dynamo.reset()
