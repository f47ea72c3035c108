"""Checkpoints are read whole or refused by file and tensor name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tongyun.errors import InputError, SpecError
from tongyun.model.config import Experts, ModelConfig
from tongyun.model.find import find_model
from tongyun.model.weights import (
    INDEX,
    SINGLE,
    hub_config,
    hub_tensors,
    load_model,
    random_weights,
    read_weights,
    weight_bytes,
    write_random_checkpoint,
)


def config(*, sparse: bool = False, tied: bool = True) -> ModelConfig:
    return ModelConfig(
        name="small",
        family="qwen3_moe" if sparse else "qwen3",
        layers=2,
        hidden=32,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate=64,
        vocab=97,
        max_positions=128,
        rope_theta=1e6,
        norm_eps=1e-6,
        tied=tied,
        qk_norm=True,
        experts=Experts(count=4, per_token=2, intermediate=24) if sparse else None,
    )


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("shard_bytes", [None, 3000])
def test_what_is_written_is_read_back(tmp_path: Path, sparse: bool, shard_bytes: int | None) -> None:
    write_random_checkpoint(tmp_path, config(sparse=sparse), seed=4, shard_bytes=shard_bytes)
    assert (tmp_path / INDEX).exists() == (shard_bytes is not None)
    read = read_weights(tmp_path, ModelConfig.load(tmp_path))
    expected = random_weights(config(sparse=sparse), seed=4)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)


def test_config_survives_the_hub_layout() -> None:
    for sparse in (False, True):
        ours = config(sparse=sparse)
        assert ModelConfig.from_hf(hub_config(ours), name="small") == ours


def test_unjoined_tensors_stay_mapped(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, config())
    model = load_model(tmp_path)
    assert model.head.weight is not None
    assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr()
    # Mapped storage is the whole file; a copy would be exactly as large as the tensor.
    if sys.platform == "linux":
        assert str(tmp_path) in Path("/proc/self/maps").read_text()


def test_stacked_experts_are_read_as_they_are(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, config(sparse=True), seed=2)
    tensors = {n: t for n, t in load_file(tmp_path / SINGLE).items() if ".experts." not in n}
    weights = random_weights(config(sparse=True), seed=2)
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts."
        tensors[at + "gate_up_proj"] = weights[f"layers.{layer}.feed.gate_up"]
        tensors[at + "down_proj"] = weights[f"layers.{layer}.feed.down"]
    save_file(tensors, tmp_path / SINGLE)
    read = read_weights(tmp_path, config(sparse=True))
    assert torch.equal(read["layers.1.feed.gate_up"], weights["layers.1.feed.gate_up"])
    assert torch.equal(read["layers.0.feed.down"], weights["layers.0.feed.down"])


def test_tied_checkpoint_may_repeat_its_head(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, config())
    tensors = load_file(tmp_path / SINGLE)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / SINGLE)
    assert "head.weight" not in read_weights(tmp_path, config())


def _spoil(directory: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(directory / SINGLE)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, directory / SINGLE)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("model.layers.1.self_attn.k_proj.weight", None, ["missing", "[32, 32]"]),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(64, 31), ["[64, 31]", "[64, 32]"]),
        ("model.layers.2.mlp.up_proj.weight", torch.zeros(64, 32), ["unexpected"]),
        ("model.norm.weight", torch.zeros(32, dtype=torch.float64), ["F64", "BF16"]),
    ],
)
def test_a_wrong_tensor_is_refused_by_file_and_name(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, words: list[str]
) -> None:
    write_random_checkpoint(tmp_path, config())
    _spoil(tmp_path, name, tensor)
    with pytest.raises(SpecError) as caught:
        read_weights(tmp_path, config())
    assert all(word in str(caught.value) for word in [name, SINGLE, *words])


def test_broken_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=SINGLE):
        read_weights(tmp_path, config())
    write_random_checkpoint(tmp_path, config(), shard_bytes=3000)
    index = json.loads((tmp_path / INDEX).read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    (tmp_path / first).rename(tmp_path / "away")
    with pytest.raises(SpecError, match=first):
        read_weights(tmp_path, config())
    (tmp_path / first).write_bytes(b"not safetensors")
    with pytest.raises(SpecError, match="not a readable safetensors file"):
        read_weights(tmp_path, config())
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(SpecError, match="weight_map"):
        read_weights(tmp_path, config())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("quantization_config", {"quant_method": "fp8"}),
        ("use_sliding_window", True),
        ("hidden_act", "gelu"),
    ],
)
def test_what_the_engine_would_compute_wrongly_is_refused(tmp_path: Path, key: str, value: object) -> None:
    write_random_checkpoint(tmp_path, config())
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, key: value}))
    with pytest.raises(SpecError, match=key):
        load_model(tmp_path)


def test_weight_bytes_count_a_tied_table_once(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, config(tied=True))
    stored = sum(t.nbytes for t in hub_tensors(random_weights(config()), config()).values())
    assert weight_bytes(load_model(tmp_path)) == stored


def test_a_name_that_is_no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="no such directory"):
        find_model(str(tmp_path / "absent"))
    assert find_model(str(tmp_path)) == tmp_path
