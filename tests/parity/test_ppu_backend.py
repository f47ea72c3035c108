"""transformers' Qwen3, dense and MoE, on the simulated PPU: one graph, none on the host, torch's tokens."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tongyun.chip.ppu import backend
from tongyun.chip.ppu.fusions import Fusions
from tongyun.errors import InputError
from tongyun.specs.find import CATALOG

transformers = pytest.importorskip("transformers")
# transformers asks for a version through a cached function; tracing it anew gives the same answer.
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "initializer_range": 0.1,
}  # fmt: skip
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    backend.compiled.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def small(tmp_path: Path) -> str:
    """The catalogue's chip with four cores: the same program in fewer instructions."""
    text = (CATALOG / "ppus" / "zhenwu-810e.toml").read_text()
    path = tmp_path / "small.toml"
    path.write_text(re.sub(r"cores = \{ count = 72, low = 36, high = 144", "cores = { count = 4", text))
    return str(path)


def qwen(kind: str) -> tuple[Any, Any]:
    """Configuration, and the model in bf16 with random weights."""
    torch.manual_seed(0)
    if kind == "moe":
        config = transformers.Qwen3MoeConfig(**SIZES, **MOE, tie_word_embeddings=False)
        return config, transformers.Qwen3MoeForCausalLM(config).bfloat16().eval()
    config = transformers.Qwen3Config(**SIZES, tie_word_embeddings=kind == "tied")
    return config, transformers.Qwen3ForCausalLM(config).bfloat16().eval()


def caches(config: Any, count: int) -> list[Any]:
    return [transformers.StaticCache(config=config, max_cache_len=96) for _ in range(count)]


def logits(model: Any, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, past_key_values=cache, use_cache=True).logits.float()  # type: ignore[no-any-return]


def generate(kind: str, steps: int, **options: Any) -> tuple[list[float], list[float], int]:
    """Feed torch's greedy tokens to the PPU, torch in bf16 and torch in f32.

    Returns both errors against f32, squared and step by step, and how often the PPU's choice differs where
    f32's two best are further apart than bf16 can blur.
    """
    config, model = qwen(kind)
    exact = copy.deepcopy(model).float()
    chip = torch.compile(model, backend=backend.ppu, fullgraph=True, dynamic=False, options=options)
    ours, theirs, wide = caches(config, 3)
    tokens = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(1))
    mine, torchs, wrong = [], [], 0
    for _ in range(steps):
        got, other, true = (
            logits(chip, tokens, ours),
            logits(model, tokens, theirs),
            logits(exact, tokens, wide),
        )
        mine.append(float((got - true).square().sum()))
        torchs.append(float((other - true).square().sum()))
        tokens = other[:, -1:].argmax(-1)
        best = true[0, -1].topk(2).values
        blur = 2 * float(torch.maximum((got - true)[0, -1].abs().max(), (other - true)[0, -1].abs().max()))
        wrong += int(got[0, -1].argmax() != tokens) and float(best[0] - best[1]) > blur
    return mine, torchs, wrong


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_64_greedy_tokens_in_two_graphs(kind: str, small: str) -> None:
    mine, torchs, wrong = generate(kind, 64, chip=small)
    assert wrong == 0
    # A router's near-tie sends a token to another expert; such a step tells nothing about rounding.
    steps = sorted(range(64), key=lambda i: max(mine[i], torchs[i]))[:60]
    error = [sum(errors[i] for i in steps) ** 0.5 for errors in (mine, torchs)]
    assert error[0] <= 1.1 * error[1]
    assert len(backend.compiled) == 2, "one graph for the prompt, one for a token"
    assert all(len(graph.lowered.program.kernels) > 20 for graph in backend.compiled)


@pytest.mark.parametrize("kind", ["dense", "moe", "tied"])
@pytest.mark.parametrize("without", [(), ("norm",), ("rotate",), ("swiglu",), ("residual",), ("all",)])
def test_every_fusion_can_be_left_out(kind: str, without: tuple[str, ...], small: str) -> None:
    mine, torchs, wrong = generate(kind, 2, chip=small, without=without, check=True)
    assert wrong == 0
    assert sum(mine) ** 0.5 < 2.5 * sum(torchs) ** 0.5


def test_a_fusion_saves_traffic_and_no_product(small: str) -> None:
    totals = {}
    for without in ((), ("norm",), ("rotate",), ("swiglu",), ("residual",), ("all",)):
        torch._dynamo.reset()
        backend.compiled.clear()
        generate("dense", 1, chip=small, without=without)
        counts = backend.compiled[0].runs[0]
        totals[without] = (
            sum(counts.flops.values()),
            sum(counts.loaded_bytes.values()) + sum(counts.stored_bytes.values()),
        )  # fmt: skip
    flops, moved = totals[()]
    assert {total[0] for total in totals.values()} == {flops}
    assert all(total[1] > moved for without, total in totals.items() if without)


def test_products_are_those_of_the_closed_form(small: str) -> None:
    """2 · weights · tokens for the products, 4 · width · heads · pairs for attention."""
    generate("dense", 2, chip=small)
    hidden, inner, layers, vocab, heads, kv, width = 64, 96, 2, 256, 4, 2, 16
    layer = hidden * width * (heads + 2 * kv) + heads * width * hidden + 3 * hidden * inner
    for graph, tokens, start in zip(backend.compiled, (12, 1), (0, 12), strict=True):
        pairs = sum(start + i + 1 for i in range(tokens))
        want = 2 * tokens * (layers * layer + vocab * hidden) + layers * 4 * heads * width * pairs
        assert sum(graph.runs[0].flops.values()) == want


def test_the_entry_point_is_found_without_an_import() -> None:
    assert "ppu" in torch.compiler.list_backends()


def test_what_is_not_known_is_refused_by_name_and_line() -> None:
    def strange(x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)

    compiled = torch.compile(strange, backend=backend.ppu)
    with (
        torch.no_grad(),
        pytest.raises(
            Exception, match=r"test_ppu_backend\.py:\d+: the PPU compiler does not know aten\.special_bessel"
        ),
    ):
        compiled(torch.ones(4, 4))
    with pytest.raises(InputError, match="unknown fusion 'norms'; did you mean norm"):
        Fusions.without("norms")


def test_a_type_the_chip_lacks_is_refused() -> None:
    compiled = torch.compile(torch.nn.Linear(4, 4, bias=False).double(), backend=backend.ppu)
    with torch.no_grad(), pytest.raises(Exception, match=r"the PPU has no data type torch\.float64"):
        compiled(torch.ones(4, 4, dtype=torch.float64))


def test_the_result_is_the_same_at_any_thread_count(small: str) -> None:
    config, model = qwen("dense")
    chip = torch.compile(model, backend=backend.ppu, fullgraph=True, dynamic=False, options={"chip": small})
    tokens = torch.arange(12)[None]
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(logits(chip, tokens, caches(config, 1)[0]))
    torch.set_num_threads(before)
    assert torch.equal(*results)
    assert dataclasses.is_dataclass(backend.compiled[0])
