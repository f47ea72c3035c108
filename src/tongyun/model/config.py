"""What a model is, read from its Hugging Face `config.json`.

`ModelConfig` holds the numbers that decide parameters, FLOPs and bytes, for every
family the planner prices. It knows no tensor, chip or file beyond the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import comb
from pathlib import Path
from typing import Any

from tongyun.errors import SpecError, unknown

FAMILIES = ("qwen3", "qwen3_moe", "llama", "deepseek_v3", "gpt_oss")


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture-of-experts feed-forward: `per_token` of `count` experts run for each token."""

    count: int
    per_token: int
    intermediate: int
    shared_intermediate: int = 0
    """Width of the experts that every token runs, all together; 0 where there are none."""
    normalise_top_k: bool = True
    first_layer: int = 0
    """Layers before this one have a dense feed-forward."""
    groups: int = 1
    """Experts are picked in two steps: `groups_per_token` of these equal groups, and experts in them."""
    groups_per_token: int = 1

    def reached(self, parts: float) -> float:
        """Expected number of `parts` equal shares of the experts that hold one of a token's, routing
        balanced; whole groups lie within a share, or whole shares within a group."""
        return _reached(self, parts)


@lru_cache(maxsize=1024)
def _reached(experts: Experts, parts: float) -> float:
    """parts · (1 − P(none of a share)): groups, then experts in those, are drawn without repetition."""
    share, group = experts.count / parts, experts.count // experts.groups
    drawn = group * experts.groups_per_token
    held = min(max(1, round(share / group)), experts.groups)
    missed = 0.0
    for chosen in range(min(held, experts.groups_per_token) + 1):
        others = experts.groups_per_token - chosen
        if others > experts.groups - held:
            continue
        ways = comb(held, chosen) * comb(experts.groups - held, others)
        there = min(share, group) * chosen
        missed += ways * _none(drawn, there, experts.per_token)
    return parts * (1 - missed / comb(experts.groups, experts.groups_per_token))


def _none(drawn: int, there: float, picks: int) -> float:
    """Probability that none of `picks` out of `drawn` is among `there` of them (hypergeometric)."""
    missed = 1.0
    for picked in range(picks):
        missed *= max(0.0, drawn - there - picked) / (drawn - picked)
    return missed


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention (DeepSeek): ranks and per-head widths."""

    q_rank: int
    kv_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of one decoder-only transformer. Widths are in elements."""

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    rope_theta: float
    norm_eps: float
    tied: bool
    qk_norm: bool = False
    attention_bias: bool = False
    sinks: bool = False
    """Attention has one learned logit a head that takes part in the softmax (gpt-oss)."""
    experts_bias: bool = False
    window: int | None = None
    """Sliding window in tokens of the layers named in `window_layers`."""
    window_layers: tuple[int, ...] = ()
    experts: Experts | None = None
    latent: Latent | None = None
    mtp_layers: int = 0
    eos_token_ids: tuple[int, ...] = ()
    weight_dtype: str = "bfloat16"

    @property
    def kv_elements(self) -> int:
        """Keys and values of one token over all layers: 2 · layers · K · d."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @classmethod
    def load(cls, path: Path, *, name: str | None = None) -> ModelConfig:
        """Read a `config.json`, or the directory that holds one."""
        file = path / "config.json" if path.is_dir() else path
        try:
            raw = json.loads(file.read_text())
        except FileNotFoundError:
            raise SpecError(file, "", "no such file; a model directory holds a config.json") from None
        except json.JSONDecodeError as error:
            raise SpecError(file, "", f"not JSON: {error}") from None
        return cls.from_hf(raw, name=name or path.name, file=file)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], *, name: str, file: object = "config.json") -> ModelConfig:
        """Translate a Hugging Face config; `file` only names the place in errors."""
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise SpecError(file, "model_type", unknown("model type", str(family), FAMILIES))
        return _translate(_Reader(raw, file), name, family)


class _Reader:
    """A config dictionary whose misses are errors that name the file and key."""

    def __init__(self, raw: Mapping[str, Any], file: object) -> None:
        self.raw, self.file = raw, file

    def need(self, key: str) -> int:
        value = self.raw.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise SpecError(self.file, key, f"expected a positive whole number, got {value!r}")
        return value

    def count(self, key: str) -> int:
        value = self.raw.get(key) or 0
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise SpecError(self.file, key, f"expected a whole number ≥ 0, got {value!r}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.raw.get(key)
        return default if value is None else bool(value)

    def real(self, key: str, default: float) -> float:
        value = self.raw.get(key)
        return default if value is None else float(value)

    def rope_theta(self) -> float:
        """`rope_theta` at the top level (transformers 4) or in `rope_parameters` (5)."""
        nested = self.raw.get("rope_parameters") or {}
        return float(self.raw.get("rope_theta") or nested.get("rope_theta") or 10_000.0)


def _translate(r: _Reader, name: str, family: str) -> ModelConfig:
    heads, hidden, layers = r.need("num_attention_heads"), r.need("hidden_size"), r.need("num_hidden_layers")
    windows = _window_layers(r, layers)
    eos = r.raw.get("eos_token_id")
    return ModelConfig(
        name=name,
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=r.count("num_key_value_heads") or heads,
        head_dim=r.count("head_dim") or hidden // heads,
        intermediate=r.count("intermediate_size"),
        vocab=r.need("vocab_size"),
        max_positions=r.need("max_position_embeddings"),
        rope_theta=r.rope_theta(),
        norm_eps=r.real("rms_norm_eps", 1e-6),
        tied=r.flag("tie_word_embeddings"),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        attention_bias=r.flag("attention_bias", default=family == "gpt_oss"),
        sinks=family == "gpt_oss",
        experts_bias=family == "gpt_oss",
        window=r.need("sliding_window") if windows else None,
        window_layers=windows,
        experts=_experts(r, family),
        latent=_latent(r) if family == "deepseek_v3" else None,
        mtp_layers=r.count("num_nextn_predict_layers"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        weight_dtype=str(r.raw.get("dtype") or r.raw.get("torch_dtype") or "bfloat16"),
    )


def _window_layers(r: _Reader, layers: int) -> tuple[int, ...]:
    if not r.raw.get("sliding_window") or r.raw.get("use_sliding_window") is False:
        return ()
    kinds = r.raw.get("layer_types") or []
    return tuple(i for i, kind in enumerate(kinds[:layers]) if kind == "sliding_attention")


def _experts(r: _Reader, family: str) -> Experts | None:
    if family == "qwen3_moe":
        if r.count("decoder_sparse_step") > 1 or r.raw.get("mlp_only_layers"):
            raise SpecError(r.file, "mlp_only_layers", "dense layers between sparse ones are not supported")
        return Experts(
            # transformers 5 saves `num_experts` under the other name
            count=r.count("num_local_experts") or r.need("num_experts"),
            per_token=r.need("num_experts_per_tok"),
            intermediate=r.need("moe_intermediate_size"),
            normalise_top_k=r.flag("norm_topk_prob"),
        )
    if family == "deepseek_v3":
        width = r.need("moe_intermediate_size")
        return Experts(
            count=r.need("n_routed_experts"),
            per_token=r.need("num_experts_per_tok"),
            intermediate=width,
            shared_intermediate=width * r.count("n_shared_experts"),
            normalise_top_k=r.flag("norm_topk_prob", default=True),
            first_layer=r.count("first_k_dense_replace"),
            groups=r.count("n_group") or 1,
            groups_per_token=r.count("topk_group") or 1,
        )
    if family == "gpt_oss":
        return Experts(
            count=r.need("num_local_experts"),
            per_token=r.need("num_experts_per_tok"),
            intermediate=r.need("intermediate_size"),
        )
    return None


def _latent(r: _Reader) -> Latent:
    return Latent(
        q_rank=r.need("q_lora_rank"),
        kv_rank=r.need("kv_lora_rank"),
        rope_dim=r.need("qk_rope_head_dim"),
        nope_dim=r.need("qk_nope_head_dim"),
        value_dim=r.need("v_head_dim"),
    )
