"""The catalogue's model configs: read by us and by transformers, with the published numbers in them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tongyun.errors import SpecError
from tongyun.model.config import ModelConfig
from tongyun.specs import find_model, names

# layers, hidden, heads, kv heads, head dim, intermediate, vocabulary, tied, KV bytes a token in bf16.
DENSE = {
    "Qwen/Qwen3-0.6B": (28, 1024, 16, 8, 128, 3072, 151936, True, 114_688),
    "Qwen/Qwen3-1.7B": (28, 2048, 16, 8, 128, 6144, 151936, True, 114_688),
    "Qwen/Qwen3-4B": (36, 2560, 32, 8, 128, 9728, 151936, True, 147_456),
    "Qwen/Qwen3-8B": (36, 4096, 32, 8, 128, 12288, 151936, False, 147_456),
    "Qwen/Qwen3-14B": (40, 5120, 40, 8, 128, 17408, 151936, False, 163_840),
    "Qwen/Qwen3-32B": (64, 5120, 64, 8, 128, 25600, 151936, False, 262_144),
    "meta-llama/Llama-3.1-8B": (32, 4096, 32, 8, 128, 14336, 128256, False, 131_072),
    "meta-llama/Llama-3.1-70B": (80, 8192, 64, 8, 128, 28672, 128256, False, 327_680),
    "meta-llama/Llama-3.1-405B": (126, 16384, 128, 8, 128, 53248, 128256, False, 516_096),
}
# layers, hidden, heads, kv heads, head dim, experts, top-k, expert width, vocabulary, KV bytes a token.
SPARSE = {
    "Qwen/Qwen3-30B-A3B": (48, 2048, 32, 4, 128, 128, 8, 768, 151936, 98_304),
    "Qwen/Qwen3-235B-A22B": (94, 4096, 64, 4, 128, 128, 8, 1536, 151936, 192_512),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": (62, 6144, 96, 8, 128, 160, 8, 2560, 151936, 253_952),
    "openai/gpt-oss-120b": (36, 2880, 64, 8, 64, 128, 4, 2880, 201088, 73_728),
    "openai/gpt-oss-20b": (24, 2880, 64, 8, 64, 32, 4, 2880, 201088, 49_152),
}


def config(name: str) -> ModelConfig:
    raw, full = find_model(name)
    return ModelConfig.from_hf(raw, name=full)


def parameters(c: ModelConfig) -> int:
    """Parameters of a model without latent attention, counted by formula."""
    attention = c.hidden * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    norms = 2 * c.hidden + (2 * c.head_dim if c.qk_norm else 0)
    if c.experts is None:
        feed = 3 * c.hidden * c.intermediate
    else:
        feed = c.hidden * c.experts.count * (1 + 3 * c.experts.intermediate)
    embeddings = c.vocab * c.hidden * (1 if c.tied else 2)
    return c.layers * (attention + norms + feed) + embeddings + c.hidden


@pytest.mark.parametrize("name", DENSE)
def test_dense_models(name: str) -> None:
    c = config(name)
    *shape, kv_bytes = DENSE[name]
    assert [c.layers, c.hidden, c.heads, c.kv_heads, c.head_dim, c.intermediate, c.vocab, c.tied] == shape
    assert 2 * c.layers * c.kv_heads * c.head_dim * 2 == kv_bytes
    assert c.experts is None and c.latent is None and not c.window_layers


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_models(name: str) -> None:
    c = config(name)
    assert c.experts is not None
    experts = [c.experts.count, c.experts.per_token, c.experts.intermediate]
    *shape, kv_bytes = SPARSE[name]
    assert [c.layers, c.hidden, c.heads, c.kv_heads, c.head_dim, *experts, c.vocab] == shape
    assert 2 * c.layers * c.kv_heads * c.head_dim * 2 == kv_bytes
    assert c.experts.normalise_top_k and not c.tied


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen/Qwen3-0.6B", 0.60),
        ("Qwen/Qwen3-1.7B", 1.72), ("Qwen/Qwen3-4B", 4.02), ("Qwen/Qwen3-8B", 8.19),
        ("Qwen/Qwen3-14B", 14.77), ("Qwen/Qwen3-32B", 32.76), ("Qwen/Qwen3-30B-A3B", 30.5),
        ("Qwen/Qwen3-235B-A22B", 235.1), ("Qwen/Qwen3-Coder-480B-A35B-Instruct", 480.2),
        ("meta-llama/Llama-3.1-8B", 8.03), ("meta-llama/Llama-3.1-70B", 70.55),
        ("meta-llama/Llama-3.1-405B", 405.85),
    ],
)  # fmt: skip
def test_parameter_counts(name: str, billions: float) -> None:
    assert parameters(config(name)) / 1e9 == pytest.approx(billions, rel=4e-3, abs=0.005)


@pytest.mark.parametrize("name", ["deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1"])
def test_deepseek(name: str) -> None:
    c = config(name)
    assert c.latent is not None and c.experts is not None
    assert (c.layers, c.hidden, c.heads, c.vocab, c.mtp_layers) == (61, 7168, 128, 129280, 1)
    assert (c.latent.kv_rank + c.latent.rope_dim) * c.layers * 2 == 70_272
    assert (c.latent.q_rank, c.latent.nope_dim, c.latent.value_dim) == (1536, 128, 128)
    assert (c.experts.count, c.experts.per_token, c.experts.intermediate) == (256, 8, 2048)
    assert (c.experts.shared_intermediate, c.experts.first_layer, c.intermediate) == (2048, 3, 18432)


def test_other_facts() -> None:
    assert config("Qwen/Qwen3-8B").max_positions == 40_960
    coder = config("Qwen/Qwen3-Coder-480B-A35B-Instruct")
    assert (coder.max_positions, coder.rope_theta) == (262_144, 1e7)
    oss = config("openai/gpt-oss-120b")
    assert oss.window == 128 and oss.window_layers == tuple(range(0, 36, 2)) and oss.sinks


@pytest.mark.parametrize("name", names("models"))
def test_transformers_reads_it_the_same(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    raw, full = find_model(name)
    theirs = transformers.AutoConfig.for_model(**dict(raw))
    assert type(theirs).__name__.lower().startswith(str(raw["model_type"]).replace("_", "")[:6])
    again: dict[str, Any] = theirs.to_dict()
    ours, back = ModelConfig.from_hf(raw, name=full), ModelConfig.from_hf(again, name=full)
    assert (ours.layers, ours.hidden, ours.heads, ours.kv_heads) == (
        back.layers,
        back.hidden,
        back.heads,
        back.kv_heads,
    )
    assert (ours.rope_theta, ours.experts, ours.latent, ours.tied) == (
        back.rope_theta,
        back.experts,
        back.latent,
        back.tied,
    )
    assert (ours.vocab, ours.max_positions, ours.eos_token_ids) == (
        back.vocab,
        back.max_positions,
        back.eos_token_ids,
    )
    assert ours.window_layers == back.window_layers


def test_names(tmp_path: Path) -> None:
    assert find_model("qwen/qwen3-32b")[1] == find_model("Qwen3-32B")[1] == "Qwen/Qwen3-32B"
    with pytest.raises(SpecError, match=r"unknown model 'Qwen/Qwen3-33B'; did you mean .*Qwen/Qwen3-32B"):
        find_model("Qwen/Qwen3-33B")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    assert find_model(str(mine)) == ({"model_type": "qwen3"}, "mine")
    assert find_model(str(mine / "config.json"))[1] == "mine"
    (mine / "config.json").write_text("[1]")
    with pytest.raises(SpecError, match="expected a JSON object"):
        find_model(str(mine))
    (mine / "config.json").write_text("{")
    with pytest.raises(SpecError, match="not JSON"):
        find_model(str(mine))
