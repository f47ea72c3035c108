"""Products of fp8 and int8 on the simulated PPU: torch's own, and Qwen3 with its layers in few bits."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tongyun.chip.ppu import backend
from tongyun.chip.ppu.capture import compile_step
from tongyun.chip.ppu.quantised import WAYS, quantised
from tongyun.errors import InputError
from tongyun.specs import find_ppu
from tongyun.specs.find import CATALOG

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128,
    "initializer_range": 0.1, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    backend.compiled.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """H100's inside with four cores."""
    text = (CATALOG / "ppus" / "h100.toml").read_text()
    path = tmp_path_factory.mktemp("chip") / "small.toml"
    path.write_text(re.sub(r"cores = \{ count = 132", "cores = { count = 4", text))
    return str(path)


def numbers(*shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    """Small whole numbers, so that sums are exact in any order."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def compiled(function: Any, **options: Any) -> Any:
    return torch.compile(function, backend=backend.ppu, fullgraph=True, dynamic=False, options=options)


@pytest.mark.parametrize("scales", ["rows", "one"])
def test_torchs_scaled_product_bit_for_bit(scales: str, small: str) -> None:
    q, w = numbers(24, 64), numbers(48, 64)
    one = torch.tensor(0.5), torch.tensor(0.25)
    left, right = one if scales == "one" else (torch.rand(24, 1) + 0.5, torch.rand(1, 48) + 0.5)

    def product(q: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(q, w.t(), scale_a=a, scale_b=b, out_dtype=torch.bfloat16)

    with torch.no_grad():
        got = compiled(product, chip=small, check=True)(q, w, left, right)
    exact = q.float() @ w.float().T
    want = (exact * left * right).bfloat16()
    assert torch.equal(got, want)
    assert (got - product(q, w, left, right)).abs().max() <= want.abs().max() * 2**-7


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("way", WAYS)
def test_a_model_in_few_bits_is_as_near_to_f32_as_torchs(kind: str, way: str, small: str) -> None:
    torch.manual_seed(0)
    if kind == "moe":
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **MOE))
    else:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES))
    exact = copy.deepcopy(model).eval()
    few = quantised(model.bfloat16().eval(), way)
    chip = compiled(few, chip=small, check=True)
    mine, theirs = 0.0, 0.0
    for seed in range(3):
        tokens = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(seed))
        given = [transformers.StaticCache(config=model.config, max_cache_len=16) for _ in range(3)]
        with torch.no_grad():
            got, other, want = (
                net(tokens, past_key_values=cache, use_cache=True).logits.float()
                for net, cache in zip((chip, few, exact), given, strict=True)
            )
        mine += float((got - want).square().sum())
        theirs += float((other - want).square().sum())
    assert mine**0.5 <= 1.1 * theirs**0.5
    (graph,) = backend.compiled
    kinds = [kernel.kind for kernel in graph.lowered.program.kernels]
    # Rows for q, k and v are made once, as are those for gate and up.
    assert kinds.count("quantise") == 4 * 2
    types = {tensor.type.name for tensor in graph.lowered.program.tensors}
    assert ("INT8" if way == "int8" else "FP8") in types


def test_a_chip_without_the_rate_refuses_by_name_and_line() -> None:
    def product(q: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(q, w.t(), scale_a=a, scale_b=b, out_dtype=torch.bfloat16)

    given = numbers(16, 64), numbers(32, 64), torch.ones(16, 1), torch.ones(1, 32)
    with (
        torch.no_grad(),
        pytest.raises(Exception, match=r"test_ppu_quantised.py:\d+: a100 has no tensor rate for fp8"),
    ):
        compiled(product, chip="a100")(*given)


def test_a_scaled_product_with_a_bias_is_refused(small: str) -> None:
    def product(q: torch.Tensor, w: torch.Tensor, one: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(q, w.t(), scale_a=one, scale_b=one, bias=bias, out_dtype=torch.bfloat16)

    given = numbers(16, 64), numbers(32, 64), torch.tensor(1.0), torch.zeros(32, dtype=torch.bfloat16)
    with torch.no_grad(), pytest.raises(Exception, match=r"does not know aten._scaled_mm.default"):
        compiled(product, chip=small)(*given)


def test_a_type_that_is_none_is_named() -> None:
    with pytest.raises(InputError, match="fp9"):
        compile_step({**SIZES, "model_type": "qwen3"}, find_ppu("h100").at(), tokens=4, dtype="fp9")
