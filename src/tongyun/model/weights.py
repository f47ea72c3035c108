"""Hugging Face checkpoints to Qwen3 modules and back.

Decides which hub tensors make up each of our parameters
(query, key and value are one matrix here, gate and up another, experts are stacked)
and which tensors are refused. Weights stay in the type they are stored in, and a
tensor that needs no joining stays mapped from its file. Knows no cache, request or
kernel.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tongyun.errors import SpecError
from tongyun.model.config import ModelConfig
from tongyun.model.kernels import TorchOps
from tongyun.model.memory import empty_for_streaming
from tongyun.model.qwen3 import Qwen3

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LARGE_BYTES = 4 * 2**20
STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor of a hub checkpoint."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of ours: hub tensors joined along their first axis, then seen as `shape`."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Every parameter of `Qwen3(config)` and the hub tensors it is made of."""
    vocab = (config.vocab, config.hidden)
    yield _single("embedding.weight", "model.embed_tokens.weight", vocab)
    for index in range(config.layers):
        yield from _attention(config, f"layers.{index}.", f"model.layers.{index}.")
        yield from _feed(config, f"layers.{index}.feed.", f"model.layers.{index}.mlp.")
    yield _single("norm.weight", "model.norm.weight", (config.hidden,))
    if not config.tied:
        yield _single("head.weight", "lm_head.weight", vocab)


def _single(name: str, hub: str, shape: tuple[int, ...]) -> Parameter:
    return Parameter(name=name, shape=shape, parts=(Part(name=hub, shape=shape),))


def _rows(name: str, shape: tuple[int, ...], *parts: tuple[str, int]) -> Parameter:
    """A parameter joined from `(hub name, rows)`; all have the last axis of `shape`."""
    joined = tuple(Part(name=hub, shape=(rows, shape[-1])) for hub, rows in parts)
    return Parameter(name=name, shape=shape, parts=joined)


def _attention(config: ModelConfig, ours: str, hub: str) -> Iterator[Parameter]:
    hidden, width = config.hidden, config.head_dim
    q, kv = config.heads * width, config.kv_heads * width
    at, norm = hub + "self_attn.", "attention."
    yield _single(ours + "attention_norm.weight", hub + "input_layernorm.weight", (hidden,))
    yield _single(ours + "feed_norm.weight", hub + "post_attention_layernorm.weight", (hidden,))
    heads = ((at + "q_proj.weight", q), (at + "k_proj.weight", kv), (at + "v_proj.weight", kv))
    yield _rows(ours + "attention.qkv.weight", (q + 2 * kv, hidden), *heads)
    yield _single(ours + "attention.out.weight", at + "o_proj.weight", (hidden, q))
    yield _single(ours + norm + "q_norm.weight", at + "q_norm.weight", (width,))
    yield _single(ours + norm + "k_norm.weight", at + "k_norm.weight", (width,))


def _feed(config: ModelConfig, ours: str, hub: str) -> Iterator[Parameter]:
    hidden, experts = config.hidden, config.experts
    if experts is None:
        inner = config.intermediate
        halves = ((hub + "gate_proj.weight", inner), (hub + "up_proj.weight", inner))
        yield _rows(ours + "gate_up.weight", (2 * inner, hidden), *halves)
        yield _single(ours + "down.weight", hub + "down_proj.weight", (hidden, inner))
        return
    inner = experts.intermediate
    yield _single(ours + "router.weight", hub + "gate.weight", (experts.count, hidden))
    each = [f"{hub}experts.{expert}." for expert in range(experts.count)]
    gate_up = [(e + f"{half}_proj.weight", inner) for e in each for half in ("gate", "up")]
    yield _rows(ours + "gate_up", (experts.count, 2 * inner, hidden), *gate_up)
    down = [(e + "down_proj.weight", hidden) for e in each]
    yield _rows(ours + "down", (experts.count, hidden, inner), *down)


_STACKED = (("feed.gate_up", "experts.gate_up_proj"), ("feed.down", "experts.down_proj"))


class Checkpoint:
    """The safetensors files of one directory, opened and indexed by tensor name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file_of: dict[str, Path] = {}
        self._handles: dict[Path, Any] = {}
        for file in self._files():
            try:
                # One handle a file for the whole load: each open maps the file anew.
                self._handles[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise SpecError(file, "", f"not a readable safetensors file: {error}") from None
            self.file_of.update(dict.fromkeys(self._handles[file].keys(), file))
        self._check_index()

    def _files(self) -> list[Path]:
        index = self.directory / INDEX
        if index.exists():
            names = sorted(set(self._index().values()))
            missing = [name for name in names if not (self.directory / name).exists()]
            if missing:
                raise SpecError(index, "weight_map", f"names files that are not there: {', '.join(missing)}")
            return [self.directory / name for name in names]
        if not (self.directory / SINGLE).exists():
            raise SpecError(self.directory, "", f"no weights; expected {SINGLE} or {INDEX}")
        return [self.directory / SINGLE]

    def _index(self) -> dict[str, str]:
        index = self.directory / INDEX
        try:
            content = json.loads(index.read_text())["weight_map"]
            return {str(name): str(file) for name, file in content.items()}
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise SpecError(index, "weight_map", f"not a tensor-to-file table: {error!r}") from None

    def _check_index(self) -> None:
        """A tensor the index promises but its file lacks is named together with both files."""
        index = self.directory / INDEX
        for name, file in self._index().items() if index.exists() else ():
            if self.file_of.get(name) != self.directory / file:
                raise SpecError(index, name, f"not in {file}, where the index says it is")

    @property
    def place(self) -> Path:
        """The file to name when a tensor is in none of them."""
        index = self.directory / INDEX
        return index if index.exists() else self.directory / SINGLE

    def tensor(self, part: Part) -> Tensor:
        """The tensor, mapped from its file; wrong shapes and unknown types are refused."""
        file = self.file_of.get(part.name)
        if file is None:
            raise SpecError(self.place, part.name, f"missing; expected a tensor of shape {list(part.shape)}")
        header = self._handles[file].get_slice(part.name)
        if tuple(header.get_shape()) != part.shape:
            shapes = f"shape {list(header.get_shape())}, but config.json makes it {list(part.shape)}"
            raise SpecError(file, part.name, shapes)
        if header.get_dtype() not in STORED:
            accepted = f"accepted: {', '.join(STORED)}"
            raise SpecError(
                file, part.name, f"stored as {header.get_dtype()}, which is not supported; {accepted}"
            )
        tensor: Tensor = self._handles[file].get_tensor(part.name)
        return tensor


def read_weights(directory: Path, config: ModelConfig) -> dict[str, Tensor]:
    """All parameters of `Qwen3(config)` from a hub directory; missing, misshapen and surplus are refused."""
    checkpoint = Checkpoint(directory)
    wanted = [_as_stored(p, checkpoint) for p in parameters(config)]
    used = {part.name for p in wanted for part in p.parts}
    # A tied checkpoint may carry the head a second time, and old ones their rotary table.
    ignored = {"lm_head.weight"} if config.tied else set()
    surplus = [n for n in checkpoint.file_of if n not in used | ignored and not n.endswith("inv_freq")]
    if surplus:
        more = f" (and {len(surplus) - 1} more)" if len(surplus) > 1 else ""
        problem = f"unexpected tensor{more}; config.json describes no such parameter"
        raise SpecError(checkpoint.file_of[surplus[0]], surplus[0], problem)
    return {p.name: _join([checkpoint.tensor(part) for part in p.parts], p.shape) for p in wanted}


def _as_stored(parameter: Parameter, checkpoint: Checkpoint) -> Parameter:
    """Experts may be stored stacked already, under one name; take what the checkpoint has."""
    for ours, stacked in _STACKED:
        if parameter.name.endswith(ours):
            hub = parameter.parts[0].name.split("experts.")[0] + stacked
            if hub in checkpoint.file_of:
                return _single(parameter.name, hub, parameter.shape)
    return parameter


def _join(tensors: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0].view(shape)
    rows = sum(len(tensor) for tensor in tensors)
    joined = empty_for_streaming((rows, *tensors[0].shape[1:]), tensors[0].dtype)
    torch.cat(tensors, out=joined)
    return joined.view(shape)


def check_runnable(directory: Path) -> None:
    """Refuse what the config asks for and the engine would silently compute otherwise."""
    file = directory / "config.json"
    raw: dict[str, Any] = json.loads(file.read_text())
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default":
        raise SpecError(file, "rope_scaling", f"'{kind}' is not supported; accepted: none or 'default'")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise SpecError(file, "quantization_config", f"'{method}' is not supported; give a bf16 checkpoint")
    if raw.get("use_sliding_window"):
        raise SpecError(file, "use_sliding_window", "sliding windows are not supported by the engine")
    if raw.get("hidden_act", "silu") != "silu":
        raise SpecError(file, "hidden_act", f"'{raw['hidden_act']}' is not supported; accepted: silu")


def load_model(
    directory: Path,
    *,
    ops: TorchOps | None = None,
    device: str = "cpu",
    activation_dtype: torch.dtype | None = None,
) -> Qwen3:
    """A model ready for inference: float32 arithmetic on a CPU, bfloat16 on a GPU unless told otherwise."""
    config = ModelConfig.load(directory)
    check_runnable(directory)
    model = _empty(config, ops, activation_dtype or _default_activation(device))
    weights = read_weights(directory, config)
    return _fill(model, _settle(weights) if device == "cpu" else weights, device)


def _settle(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy large mapped tensors to large pages where memory is plentiful; each step reads them all."""
    import psutil

    if psutil.virtual_memory().available < 3 * sum(tensor.nbytes for tensor in weights.values()):
        return weights
    large = [name for name, tensor in weights.items() if tensor.nbytes >= LARGE_BYTES]
    copies = {name: empty_for_streaming(tuple(weights[name].shape), weights[name].dtype) for name in large}
    return weights | {name: copy.copy_(weights[name]) for name, copy in copies.items()}


def random_model(
    config: ModelConfig, *, ops: TorchOps | None = None, seed: int = 0, device: str = "cpu"
) -> Qwen3:
    """A model of the given shape with random bf16 weights, without touching a disk."""
    return _fill(_empty(config, ops, _default_activation(device)), random_weights(config, seed), device)


def _default_activation(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def _empty(config: ModelConfig, ops: TorchOps | None, activation_dtype: torch.dtype) -> Qwen3:
    with torch.device("meta"):
        return Qwen3(config, ops=ops, activation_dtype=activation_dtype)


def _fill(model: Qwen3, weights: Mapping[str, Tensor], device: str) -> Qwen3:
    moved = {name: tensor.to(device) for name, tensor in weights.items()}
    tied = {"head.weight": moved["embedding.weight"]} if model.config.tied else {}
    model.load_state_dict({**moved, **tied}, strict=True, assign=True)
    model.frequency = model.frequency.to(device)
    return model.requires_grad_(False).eval()


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Parameters by our names, in bf16: matrices N(0, 0.02²), norms N(1, 0.1²); repeatable by seed."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for parameter in parameters(config):
        mean, std = (1.0, 0.1) if len(parameter.shape) == 1 else (0.0, 0.02)
        tensor = empty_for_streaming(parameter.shape, torch.bfloat16)
        weights[parameter.name] = tensor.normal_(mean, std, generator=generator)
    return weights


def hub_tensors(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our parameters cut back into the tensors of the hub layout."""
    cut: dict[str, Tensor] = {}
    for parameter in parameters(config):
        rows = weights[parameter.name].detach().reshape(-1, *parameter.parts[0].shape[1:])
        pieces = torch.split(rows, [part.shape[0] for part in parameter.parts])
        cut.update(
            {part.name: piece.contiguous() for part, piece in zip(parameter.parts, pieces, strict=True)}
        )
    return cut


def write_checkpoint(
    directory: Path, weights: Mapping[str, Tensor], config: ModelConfig, *, shard_bytes: int | None = None
) -> None:
    """Write `config.json`, `generation_config.json` and safetensors as the hub lays them out.

    With `shard_bytes` the tensors go to several files of at most that size (a larger
    tensor gets a file of its own) and an index; otherwise to one file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards = _shards(hub_tensors(weights, config), shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names if shard_bytes else [SINGLE], shards, strict=True):
        temporary = directory / f".{name}.part"
        save_file(shard, temporary, metadata={"format": "pt"})
        temporary.rename(directory / name)
    if shard_bytes:
        table = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(t.nbytes for shard in shards for t in shard.values())
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": table})
    _write_json(directory / "config.json", hub_config(config))
    eos = list(config.eos_token_ids)
    _write_json(directory / "generation_config.json", {"eos_token_id": eos} if eos else {})


def _shards(tensors: dict[str, Tensor], shard_bytes: int | None) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        held = sum(t.nbytes for t in shards[-1].values())
        if shard_bytes and held and held + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    return shards


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    temporary = file.with_name(f".{file.name}.part")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.rename(file)


def write_random_checkpoint(
    directory: Path, config: ModelConfig, *, seed: int = 0, shard_bytes: int | None = None
) -> None:
    """A checkpoint of random weights in the hub layout; no tokenizer is written."""
    write_checkpoint(directory, random_weights(config, seed), config, shard_bytes=shard_bytes)


def hub_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a Qwen3 model, dense or mixture-of-experts."""
    eos = list(config.eos_token_ids)
    raw: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM" if config.experts else "Qwen3ForCausalLM"],
        "model_type": config.family,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.attention_bias,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }
    if config.experts:
        raw |= {
            "num_experts": config.experts.count,
            "num_experts_per_tok": config.experts.per_token,
            "moe_intermediate_size": config.experts.intermediate,
            "norm_topk_prob": config.experts.normalise_top_k,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return raw


def weight_bytes(model: Qwen3) -> int:
    """Bytes of all distinct parameters as stored; a tied head counts once."""
    return sum({p.data_ptr(): math.prod(p.shape) * p.element_size() for p in model.parameters()}.values())
