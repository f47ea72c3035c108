"""The project's own Qwen3 with its paged cache on the simulated PPU: one graph a step, all on the chip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from tongyun.chip.ppu import backend
from tongyun.model.config import ModelConfig
from tongyun.model.kernels import TorchOps
from tongyun.model.kernels.attention import Layout, lay_out
from tongyun.model.kernels.whole import WholeOps
from tongyun.model.paged import PagedAttend, PagedCache
from tongyun.model.qwen3 import Qwen3
from tongyun.specs.find import CATALOG

SIZES: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {
    "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {"dense": {}, "moe": MOE, "tied": {"tie_word_embeddings": True}}
BLOCKS = 6
"""Of a piece's table, so that a context that grows asks for no other program."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    backend.compiled.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def small(tmp_path: Path) -> str:
    text = (CATALOG / "ppus" / "zhenwu-810e.toml").read_text()
    path = tmp_path / "small.toml"
    path.write_text(text.replace("cores = { count = 72, low = 36, high = 144", "cores = { count = 4"))
    return str(path)


def qwen(config: ModelConfig, ops: TorchOps, dtype: torch.dtype) -> Qwen3:
    """Random weights that bf16 holds exactly, so that the three models are one."""
    model = Qwen3(config, ops=ops, activation_dtype=dtype)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.ones_like(parameter) if "norm" in name else torch.randn_like(parameter) * 0.1
        parameter.data = values.bfloat16().to(dtype)
    return model


@dataclass
class Runner:
    """A model and its cache, fed the same steps as its rivals."""

    model: Qwen3
    call: Any
    cache: PagedCache

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype, **options: Any) -> Runner:
        model = qwen(config, WholeOps() if options else TorchOps(), dtype)

        def step(tokens: torch.Tensor, positions: torch.Tensor, attend: Any) -> torch.Tensor:
            return model.logits(model(tokens, positions, attend))

        call = (
            torch.compile(step, backend=backend.ppu, fullgraph=True, dynamic=False, options=options)
            if options
            else step
        )
        return cls(model, call, PagedCache(config, blocks=16, dtype=dtype))

    def __call__(self, tokens: torch.Tensor, layout: Layout) -> torch.Tensor:
        attend = PagedAttend(self.cache, layout, self.model.ops)
        with torch.no_grad():
            return self.call(tokens, layout.positions_T, attend)  # type: ignore[no-any-return]


def pages(pieces: Sequence[tuple[int, int, Sequence[int]]]) -> Layout:
    layout = lay_out(pieces, 16)
    blocks = functional.pad(layout.blocks_PB, (0, BLOCKS - layout.blocks_PB.shape[1]))
    return replace(layout, blocks_PB=blocks)


def rivals(kind: str, **options: Any) -> tuple[Runner, Runner, Runner]:
    """On the PPU, torch in bf16, torch in f32."""
    config = ModelConfig.from_hf({**SIZES, **KINDS[kind]}, name=kind)
    bf16, f32 = torch.bfloat16, torch.float32
    return Runner.of(config, bf16, **options), Runner.of(config, bf16), Runner.of(config, f32)


TABLES = ([3, 1, 7, 9, 2, 12], [5, 4, 8, 11, 6, 13])


def two(starts: Sequence[int], lengths: Sequence[int]) -> Layout:
    return pages(
        [(start, length, TABLES[i]) for i, (start, length) in enumerate(zip(starts, lengths, strict=True))]
    )


def generate(kind: str, steps: int, **options: Any) -> tuple[list[float], list[float], int]:
    """Two prompts of 12 and 7 tokens, then torch's greedy tokens.

    Returns the PPU's and torch's squared errors against f32, step by step, and how many tokens are wrong.
    """
    ours, theirs, exact = rivals(kind, **options)
    tokens, starts, lengths = torch.randint(0, 256, (19,)), [0, 0], [12, 7]
    mine: list[float] = []
    torchs: list[float] = []
    wrong = 0
    for _ in range(steps):
        layout = two(starts, lengths)
        got, other, true = (one(tokens, layout) for one in (ours, theirs, exact))
        mine.append(float((got - true).square().sum()))
        torchs.append(float((other - true).square().sum()))
        last = layout.rows_P1[1:].long() - 1
        tokens = other[last].argmax(-1)
        best = true[last].topk(2, dim=-1).values
        blur = 2 * torch.maximum((got - true)[last].abs().amax(-1), (other - true)[last].abs().amax(-1))
        wrong += int(((got[last].argmax(-1) != tokens) & (best[:, 0] - best[:, 1] > blur)).sum())
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
        lengths = [1, 1]
    return mine, torchs, wrong


@pytest.mark.parametrize("kind", list(KINDS))
def test_64_greedy_tokens_of_two_sequences_in_two_graphs(kind: str, small: str) -> None:
    mine, torchs, wrong = generate(kind, 64, chip=small)
    assert wrong == 0
    # A router's near-tie sends a token to another expert; such a step tells nothing about rounding.
    steps = sorted(range(64), key=lambda i: max(mine[i], torchs[i]))[:60]
    error = [sum(errors[i] for i in steps) ** 0.5 for errors in (mine, torchs)]
    assert error[0] <= 1.1 * error[1]
    assert len(backend.compiled) == 2, "one graph for the prompts, one for a token of each"


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("without", [("norm",), ("rotate",), ("swiglu",), ("residual",), ("all",)])
def test_every_fusion_can_be_left_out(kind: str, without: tuple[str, ...], small: str) -> None:
    mine, torchs, wrong = generate(kind, 2, chip=small, without=without, check=True)
    assert wrong == 0
    assert sum(mine) ** 0.5 < 2.5 * sum(torchs) ** 0.5


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_step_of_long_short_and_empty_pieces(kind: str, small: str) -> None:
    """Rows behind the last piece and pieces without rows change nothing; blocks may be shared."""
    ours, theirs, _ = rivals(kind, chip=small, check=True)
    prompt, shared = torch.randint(0, 256, (40,)), [3, 1, 7]
    for one in (ours, theirs):
        one(prompt, pages([(0, 40, shared)]))
    tokens = torch.randint(0, 256, (21,))
    # The second piece goes on behind the first one's first two blocks.
    pieces = [(40, 1, shared), (32, 18, [3, 1, 10, 9])]
    plain = pages(pieces)
    want = theirs(tokens[:19], plain)
    spare = 15 * 16
    padded = replace(
        plain,
        positions_T=functional.pad(plain.positions_T, (0, 2)),
        slots_T=torch.cat([plain.slots_T, torch.tensor([spare, spare + 1])]),
        rows_P1=functional.pad(plain.rows_P1, (0, 2), value=19),
        starts_P=functional.pad(plain.starts_P, (0, 2)),
        blocks_PB=functional.pad(plain.blocks_PB, (0, 0, 0, 2)),
    )
    got = ours(tokens, padded)
    assert (got[:19] - want).abs().max() < 0.05 * want.abs().max()
    used = list(range(15))
    close = (ours.cache.keys[:, used] - theirs.cache.keys[:, used]).abs().max()
    assert close <= 2**-6 * theirs.cache.keys.abs().max()


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_no_product_is_left_to_the_host(kind: str, small: str) -> None:
    """The chip's FLOPs are those of the closed form: 2 · weights · tokens, and 4 · width · heads · pairs."""
    generate(kind, 2, chip=small)
    hidden, inner, layers, vocab, heads, kv, width = 64, 96, 2, 256, 4, 2, 16
    feed = 3 * hidden * inner if kind == "dense" else hidden * 8 + 2 * 3 * hidden * 48
    layer = hidden * width * (heads + 2 * kv) + heads * width * hidden + feed
    loads = ([(0, 12), (0, 7)], [(12, 1), (7, 1)])
    for graph, load in zip(backend.compiled, loads, strict=True):
        pairs = sum(start + i + 1 for start, count in load for i in range(count))
        tokens = sum(count for _, count in load)
        want = 2 * tokens * (layers * layer + vocab * hidden) + layers * 4 * heads * width * pairs
        assert sum(graph.runs[0].flops.values()) == want


def test_the_whole_operators_compute_what_the_engine_does() -> None:
    for kind in ("dense", "moe"):
        config = ModelConfig.from_hf({**SIZES, **KINDS[kind]}, name=kind)
        runs = []
        for ops in (TorchOps(), WholeOps()):
            model, cache = qwen(config, ops, torch.float32), PagedCache(config, blocks=16)
            layout = two([0, 0], [12, 7])
            with torch.no_grad():
                hidden = model(torch.arange(19), layout.positions_T, PagedAttend(cache, layout, ops))
            runs.append((hidden, cache.keys))
        assert torch.equal(runs[0][0], runs[1][0])
        assert torch.equal(runs[0][1], runs[1][1])
