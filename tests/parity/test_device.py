"""The operations for a GPU beside those of PyTorch, and the engine on a GPU beside transformers.

Everything here runs on a GPU where there is one, and what can be on the CPU as well. float32
has to agree as sums in another order do. bfloat16 is judged by the error it brings: the root
mean square of what differs from float32, over that of transformers in bfloat16 on the same
device (for one operation, over that of `TorchOps`), may be half as much again. Of a model's
logits it is that of the middle token of several texts: where a router's choice is a near
tie, rounding turns it either way, and such a token says little of either side.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Driven, drive, prompt, request, tiny
from torch import Tensor

from tongyun.cloud.engine.torch_executor import ExecutorOptions, TorchExecutor, open_executor
from tongyun.model.bundled import DEFAULT, bundled_models
from tongyun.model.kernels import TorchOps, choose_ops
from tongyun.model.kernels.attention import lay_out
from tongyun.model.kernels.device import DeviceOps
from tongyun.model.options import SamplingOptions
from tongyun.model.paged import PagedAttend, PagedCache
from tongyun.model.sampling import Draw, sample
from tongyun.model.weights import load_model, write_random_checkpoint

BF16, F32 = torch.bfloat16, torch.float32
TWIN = TorchOps()
MOST_ERROR = 1.5
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))
BOTH = pytest.mark.parametrize("device", ["cpu", GPU])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)


def moved(what: Any, device: str, dtype: torch.dtype) -> Any:
    """Tensors of numbers in a type, on a device; whatever holds them keeps its shape."""
    if isinstance(what, tuple):
        return tuple(moved(each, device, dtype) for each in what)
    if isinstance(what, Tensor):
        return what.to(device, dtype if what.is_floating_point() else None)
    return what


def judged(of: Callable[[TorchOps], Callable[..., Any]], device: str, *given: Any) -> None:
    """The same operation of both sets on the same random numbers, in both types."""
    exact = of(TWIN)(*moved(given, "cpu", torch.float64))
    in_f32, in_bf16 = (of(ops_of(device))(*moved(given, device, dtype)) for dtype in (F32, BF16))
    plain = of(TWIN)(*moved(given, device, BF16))
    for ours, narrow, theirs, true in zip(*map(tensors, (in_f32, in_bf16, plain, exact)), strict=True):
        assert ours.shape == true.shape
        assert rms(ours, true) <= 1e-5 * true.square().mean().sqrt()
        # Weights are rounded for both; where both are exact there is nothing to compare.
        assert rms(narrow, true) <= MOST_ERROR * rms(theirs, true) + 1e-7


def ops_of(device: str) -> DeviceOps:
    """Triton's kernels on a GPU only, also where there is one."""
    return DeviceOps(fused=None if device == "cuda" else False)


def tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def middle(one: Tensor, other: Tensor) -> float:
    """Of the rows, the median of their root mean square differences."""
    return float((one.double().cpu() - other.double().cpu()).square().mean(-1).sqrt().median())


def rms(one: Tensor, other: Tensor) -> float:
    return float((one.double().cpu() - other.double().cpu()).square().mean().sqrt())


@BOTH
def test_products_norms_and_gates(device: str) -> None:
    for rows in (1, 7, 64):
        x, w, add = torch.randn(rows, 96), torch.randn(48, 96) / 10, torch.randn(rows, 48)
        judged(lambda ops: ops.linear, device, x, w)
        judged(lambda ops: ops.linear, device, x, w, add)
        judged(lambda ops: lambda a, b: ops.rms_norm(a, b, 1e-6), device, x, torch.randn(96))
        judged(lambda ops: ops.linear_swiglu, device, x, w)


@BOTH
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(6, 2, 16), (4, 4, 64), (16, 8, 128)])
def test_attention_inputs(device: str, heads: int, kv_heads: int, width: int) -> None:
    x = torch.randn(11, heads + 2 * kv_heads, width)
    angle = torch.rand(11, width // 2).repeat(1, 2) * 6
    norms = (torch.randn(width), torch.randn(width), 1e-6)
    judged(lambda ops: ops.attention_inputs, device, x, norms, angle.cos(), angle.sin(), kv_heads)


@BOTH
@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_experts(device: str, tokens: int) -> None:
    x, scores = torch.randn(tokens, 64), torch.randn(tokens, 5)
    scores[:, 2] -= 100  # an expert that nobody chooses
    chosen, weight = TWIN.choose(scores, 2, True)
    gate_up, down = torch.randn(5, 2 * 56, 64) / 10, torch.randn(5, 64, 56) / 10
    judged(lambda ops: ops.experts, device, x, gate_up, down, chosen, weight)


STEPS = {
    "decode": [(0, 1), (5, 1), (37, 1)],
    "prefill": [(0, 19)],
    "mixed": [(40, 1), (0, 33), (13, 21), (3, 1)],
    "long mixed": [(1100, 3), (600, 1)],
}


@BOTH
@pytest.mark.parametrize("step", sorted(STEPS))
@pytest.mark.parametrize(("heads", "kv_heads", "width", "block"), [(6, 2, 16, 4), (8, 1, 64, 8)])
def test_paged_attention(device: str, step: str, heads: int, kv_heads: int, width: int, block: int) -> None:
    spans = STEPS[step]
    each = [-(-(start + tokens) // block) for start, tokens in spans]
    ids = torch.randperm(sum(each) + 3).split([*each, 3])
    pieces = [(*span, i.tolist()) for span, i in zip(spans, ids, strict=False)]
    caches = tuple(torch.randn(sum(each) + 3, kv_heads, block, width) for _ in range(2))
    tokens = sum(tokens for _, tokens in spans)
    q, k, v = torch.randn(tokens, heads + 2 * kv_heads, width).split([heads, kv_heads, kv_heads], dim=1)

    def attending(ops: TorchOps) -> Callable[..., Any]:
        def call(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
            keys, values = keys.clone(), values.clone()
            layout = lay_out(pieces, block, q.device)
            return ops.paged_attention(q, k, v, keys, values, layout), keys, values

        return call

    judged(attending, device, q, k, v, *caches)


@BOTH
def test_draws_are_those_of_the_cpu(device: str) -> None:
    logits = torch.randn(5, 997) * 3
    options = [
        SamplingOptions(temperature=0.0, logprobs=True, top_logprobs=3),
        SamplingOptions(temperature=1.1, seed=1),
        SamplingOptions(temperature=0.9, top_p=0.9, seed=2),
        SamplingOptions(temperature=1.0, top_k=20, min_p=0.01, seed=3),
        SamplingOptions(temperature=1.0, frequency_penalty=0.5, repetition_penalty=1.2, seed=4),
    ]
    draws = [Draw(options=o, seed=o.seed or 0, history=(3, 5, 3), prompt_tokens=1) for o in options]
    here = sample(logits.clone(), draws)
    there = sample(logits.to(device), draws)
    assert there.tokens == here.tokens
    assert there.scores[0][0] == pytest.approx(here.scores[0][0], abs=1e-5)


@pytest.fixture(scope="module", params=["dense", "sparse", DEFAULT])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == DEFAULT:
        if DEFAULT not in bundled_models():
            pytest.skip(f"{DEFAULT} is not part of this copy")
        return bundled_models()[DEFAULT]
    directory = tmp_path_factory.mktemp(request.param)
    write_random_checkpoint(directory, tiny(sparse=request.param == "sparse", hidden=64), seed=1)
    return directory


def reference(directory: Path, dtype: torch.dtype, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()


def engine(directory: Path, dtype: torch.dtype, device: str) -> TorchExecutor:
    model = load_model(directory, ops=ops_of(device), device=device, activation_dtype=dtype)
    return TorchExecutor(
        model, PagedCache(model.config, blocks=64, block_tokens=4, dtype=dtype, device=device)
    )


@BOTH
def test_tokens_in_float32_are_those_of_transformers(checkpoint: Path, device: str) -> None:
    """Decodes beside chunks of other prompts; the reference is transformers on the CPU."""
    run, theirs = engine(checkpoint, F32, device), reference(checkpoint, F32, "cpu")
    first = Driven(request("a", prompt(6, 9)), blocks=(40, 3, 17, 5, 30, 31, 32))
    second = Driven(request("b", prompt(7, 30)), blocks=tuple(range(50, 63)))
    third = Driven(request("c", prompt(8, 1)), blocks=(9, 8, 7, 6, 4))
    drive(run, (first, None))
    drive(run, (first, None), (second, 7), (third, None))
    drive(run, (second, 13), (third, None), (first, None))
    drive(run, (third, None), (first, None), (second, 2))
    while len(second.output) < 10:
        drive(run, (third, None), (second, None), (first, None))
    for driven in (first, second, third):
        known = list(driven.request.prompt)
        with torch.inference_mode():
            for _ in driven.output:
                known.append(int(theirs(torch.tensor([known])).logits[0, -1].argmax()))
        assert driven.output == known[len(driven.request.prompt) :]


@BOTH
def test_logits_in_bfloat16_err_no_more_than_those_of_transformers(checkpoint: Path, device: str) -> None:
    """Prompts of 40 tokens in two pieces, then the last token as a decode: every row counts.

    Of one text alone a router's near ties decide: on two processors the same one gave 0.9 and 1.7.
    """
    run = engine(checkpoint, BF16, device)
    exact, plain = reference(checkpoint, F32, "cpu"), reference(checkpoint, BF16, device)
    rows, true, theirs = [], [], []
    for tokens in (prompt(seed, 40) for seed in range(3, 9)):
        with torch.inference_mode():
            for start, stop in ((0, 23), (23, 39), (39, 40)):
                layout = lay_out([(start, stop - start, range(10))], 4, device)
                attend = PagedAttend(run.cache, layout, run.model.ops)
                part = torch.tensor(tokens[start:stop], device=device)
                rows.append(run.model.logits(run.model(part, layout.positions_T, attend)))
            true.append(exact(torch.tensor([tokens])).logits[0])
            theirs.append(plain(torch.tensor([tokens], device=device)).logits[0])
    error, usual = (middle(torch.cat(each), torch.cat(true)) for each in (rows, theirs))
    assert error <= MOST_ERROR * usual


@BOTH
def test_an_engine_opened_on_a_device_serves_from_it(checkpoint: Path, device: str) -> None:
    options = ExecutorOptions(device=device, kernels="torch", threads=1, kv_bytes=1 << 20)
    run = open_executor(checkpoint, options)
    assert run.cache.keys.device.type == device
    assert {each.device.type for each in run.model.parameters()} == {device}
    assert run.model.head.weight.data_ptr() == run.model.embedding.weight.data_ptr()
    driven = Driven(request("a", prompt(1, 21), SamplingOptions(seed=3)), blocks=(3, 1, 2))
    assert drive(run, (driven, 9)).tokens == {}
    for _ in range(6):
        assert drive(run, (driven, None)).duration_s > 0
    assert len(driven.output) == 6


@pytest.mark.parametrize("device", [GPU])
def test_captured_steps_score_as_those_that_are_not(checkpoint: Path, device: str) -> None:
    """Batches of sizes that are captured and not, rows that leave, prompts in between."""
    options = ExecutorOptions(device=device, kv_bytes=1 << 22)
    replaying = open_executor(checkpoint, options)
    plain = TorchExecutor(
        replaying.model, PagedCache(replaying.model.config, blocks=64, dtype=BF16, device=device)
    )
    assert replaying._replays is not None and plain._replays is None
    scores = []
    asks = SamplingOptions(temperature=0.0, logprobs=True, top_logprobs=20)
    for run in (plain, replaying):
        found = []
        all_driven = [
            Driven(request(f"r{i}", prompt(i, 5 + 7 * i), asks), blocks=tuple(range(6 * i, 6 * i + 6)))
            for i in range(5)
        ]
        for count in (1, 3, 3, 3, 5, 5, 5, 2, 2):
            result = drive(run, *((driven, None) for driven in all_driven[:count]))
            assert result.scores is not None
            found += [dict(result.scores[f"r{i}"].top) for i in range(count)]
            # Both go on from the same tokens, or a near tie would part them.
            for driven in all_driven[:count]:
                driven.output[-1] = len(driven.known) % 97
        scores.append(found)
    for one, other in zip(*scores, strict=True):
        both = one.keys() & other.keys()
        assert len(both) >= 12
        assert max(abs(one[token] - other[token]) for token in both) < 0.25


def test_a_gpu_is_given_the_operations_for_one() -> None:
    assert isinstance(choose_ops("auto", "cuda"), DeviceOps)
    assert choose_ops("torch", "cuda").name == "torch"
