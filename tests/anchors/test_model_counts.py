"""Our counts of parameters, FLOPs and KV bytes against transformers' own models.

The models are built and run on the meta device: every shape is real, no number is
computed. Parameters are counted at full size. FLOPs and KV bytes are counted at two
depths, whose difference is what the remaining layers add. Experts run as one product
per routed token ("batched_mm"), which counts exactly the rows that are routed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision, Sequences, StepShape
from tongyun.model.steps import (
    active_parameters,
    flops_per_token,
    kv_bytes,
    kv_bytes_per_token,
    parameters,
    step_flops,
)
from tongyun.specs import find_model, names

CACHED = 40
"""Tokens before the counted one; fewer than any sliding window."""
REPEATS = 2
"""Layers after which gpt-oss's pattern of windows repeats."""


def config_of(name: str) -> ModelConfig:
    raw, full = find_model(name)
    return ModelConfig.from_hf(raw, name=full)


def distinct_models() -> list[str]:
    """Catalogue models, one of each shape: instruct versions and successors share their base's."""
    shapes = {replace(config_of(name), name="", eos_token_ids=()): name for name in reversed(names("models"))}
    return sorted(shapes.values())


def meta_model(raw: dict[str, Any]) -> torch.nn.Module:
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.bfloat16,
            attn_implementation="eager",
            experts_implementation="batched_mm",
        )
    return model.eval()


def shortened(raw: dict[str, Any], layers: int) -> dict[str, Any]:
    kinds = {"layer_types": raw["layer_types"][:layers]} if raw.get("layer_types") else {}
    return {**raw, "num_hidden_layers": layers, **kinds}


@dataclass(frozen=True)
class Counts:
    prefill_flops: float
    decode_flops: float
    kv_bytes: float

    def beyond(self, shallower: Counts, times: float) -> Counts:
        """These, and `times` the difference to the shallower ones on top."""
        mine, less = vars(self), vars(shallower)
        return Counts(**{key: mine[key] + times * (mine[key] - less[key]) for key in mine})


def counted(raw: dict[str, Any]) -> Counts:
    """What transformers computes for a prompt of `CACHED` tokens, then for one more."""
    model = meta_model(raw)
    tokens = torch.zeros(1, CACHED, dtype=torch.long, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as prefill:
        cache = model(input_ids=tokens, use_cache=True).past_key_values
    kept = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    with torch.no_grad(), FlopCounterMode(display=False) as decode:
        model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True)
    return Counts(prefill.get_total_flops(), decode.get_total_flops(), kept)


def claimed(config: ModelConfig) -> Counts:
    """The same from the graph. transformers expands MLA's latent for every token: our prefill form."""
    prompt = StepShape(prefill=Sequences(new=CACHED), sampled=CACHED)
    one_more = StepShape(prefill=Sequences(new=1, context=CACHED), sampled=1)
    return Counts(
        prefill_flops=float(step_flops(config, prompt)) + masked_flops(config, CACHED),
        decode_flops=float(step_flops(config, one_more)),
        kv_bytes=float(kv_bytes(config, CACHED, Precision())),
    )


def masked_flops(config: ModelConfig, tokens: int) -> int:
    """Products that transformers' eager attention takes and the causal mask throws away."""
    widths = 2 * config.head_dim
    if config.latent is not None:
        widths = config.latent.nope_dim + config.latent.rope_dim + config.latent.value_dim
    return config.layers * 2 * config.heads * widths * tokens * (tokens - 1) // 2


@pytest.mark.parametrize("name", names("models"))
def test_parameters_equal_transformers(name: str) -> None:
    raw, _ = find_model(name)
    assert parameters(config_of(name)) == sum(p.numel() for p in meta_model(raw).parameters())


@pytest.mark.parametrize("name", distinct_models())
def test_flops_and_kv_bytes_equal_transformers(name: str) -> None:
    raw, _ = find_model(name)
    config = config_of(name)
    first = config.experts.first_layer if config.experts else 0
    shallow, deep = first + REPEATS, first + 2 * REPEATS
    counts = {layers: counted(shortened(raw, layers)) for layers in (shallow, deep)}
    for layers, count in counts.items():
        assert claimed(ModelConfig.from_hf(shortened(raw, layers), name=name)) == count
    whole = counts[deep].beyond(counts[shallow], (config.layers - deep) / REPEATS)
    assert claimed(config) == whole
    if config.latent is None:
        assert flops_per_token(config, CACHED) == whole.decode_flops
    assert kv_bytes_per_token(config) * CACHED == whole.kv_bytes


PUBLISHED = {
    # parameters and active parameters in billions, KV bytes per token (bf16): fact sheet §5
    "Qwen/Qwen3-0.6B": (0.60, None, 114_688),
    "Qwen/Qwen3-1.7B": (1.72, None, 114_688),
    "Qwen/Qwen3-4B": (4.02, None, 147_456),
    "Qwen/Qwen3-8B": (8.19, None, 147_456),
    "Qwen/Qwen3-14B": (14.77, None, 163_840),
    "Qwen/Qwen3-32B": (32.76, None, 262_144),
    "Qwen/Qwen3-30B-A3B": (30.5, 3.35, 98_304),
    "Qwen/Qwen3-235B-A22B": (235.1, 22.2, 192_512),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": (480.2, 35.5, 253_952),
    "deepseek-ai/DeepSeek-V3": (671, 37, 70_272),
    "meta-llama/Llama-3.1-8B": (8.03, None, 131_072),
    "meta-llama/Llama-3.1-70B": (70.55, None, 327_680),
    "meta-llama/Llama-3.1-405B": (405.85, None, 516_096),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name: str) -> None:
    total, active, kv = PUBLISHED[name]
    config = config_of(name)
    assert parameters(config) / 1e9 == pytest.approx(total, rel=0.01)
    assert kv_bytes_per_token(config) == kv
    if active is not None:
        # Publishers differ in whether the embedding counts as active.
        without = active_parameters(config) - config.vocab * config.hidden
        assert without / 1e9 <= active * 1.01
        assert active_parameters(config) / 1e9 >= active * 0.99
