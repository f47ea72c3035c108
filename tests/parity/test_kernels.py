"""Every native operation beside its PyTorch twin, and the promise that a row is computed alone.

Tolerance of the comparisons: 1e-5 of the largest result. Sums are float32 on both sides
and differ in their order only.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tongyun.model.kernels import TorchOps, choose_ops
from tongyun.model.kernels.attention import lay_out
from tongyun.model.kernels.build import BuildFailed, load_kernels
from tongyun.model.kernels.native import NativeOps

TWIN = TorchOps()
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def native() -> NativeOps:
    try:
        return NativeOps(load_kernels())
    except BuildFailed as error:
        pytest.skip(f"no native kernels here: {error}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def weights(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return (torch.randn(shape) * 0.1).to(dtype)


# Tails of rows and columns, several blocks of k, every tile of x, and the panels of many rows.
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 11, 32, 33, 70])
@pytest.mark.parametrize(("outputs", "inputs"), [(101, 40), (53, 1030), (200, 2100), (7, 9)])
def test_linear(native: NativeOps, dtype: torch.dtype, rows: int, outputs: int, inputs: int) -> None:
    x, w, add = torch.randn(rows, inputs), weights(outputs, inputs, dtype=dtype), torch.randn(rows, outputs)
    close(native.linear(x, w), TWIN.linear(x, w))
    close(native.linear(x, w, add), TWIN.linear(x, w, add))


@pytest.mark.parametrize("rows", [1, 6, 40])
@pytest.mark.parametrize("inner", [96, 13])
def test_linear_swiglu(native: NativeOps, rows: int, inner: int) -> None:
    x, w = torch.randn(rows, 72), weights(2 * inner, 72)
    close(native.linear_swiglu(x, w), TWIN.linear_swiglu(x, w))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_norm_and_gate(native: NativeOps, dtype: torch.dtype) -> None:
    for width in (16, 50, 1024):
        x, w = torch.randn(9, width), weights(width, dtype=dtype)
        close(native.rms_norm(x, w, 1e-6), TWIN.rms_norm(x, w, 1e-6))
        close(native.swiglu(x), TWIN.swiglu(x))
    extreme = torch.tensor([[-200.0, -90.0, 0.0, 90.0, 1.0, 1.0, 1.0, 1.0]])
    close(native.swiglu(extreme), TWIN.swiglu(extreme))


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(6, 2, 16), (4, 4, 64), (3, 1, 24)])
def test_attention_inputs(native: NativeOps, heads: int, kv_heads: int, width: int) -> None:
    x = torch.randn(11, heads + 2 * kv_heads, width)
    angle = torch.rand(11, width // 2).repeat(1, 2) * 6
    norms = (weights(width), weights(width), 1e-6)
    expected = TWIN.attention_inputs(x, norms, angle.cos(), angle.sin(), kv_heads)
    given = native.attention_inputs(x.clone(), norms, angle.cos(), angle.sin(), kv_heads)
    for ours, theirs in zip(given, expected, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("normalise", [False, True])
def test_choice_of_experts(native: NativeOps, normalise: bool) -> None:
    scores = torch.randn(40, 13) * 3
    chosen, weight = native.choose(scores, 4, normalise)
    expected_chosen, expected = TWIN.choose(scores, 4, normalise)
    assert torch.equal(chosen, expected_chosen)
    close(weight, expected)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_experts(native: NativeOps, dtype: torch.dtype, tokens: int) -> None:
    x, scores = torch.randn(tokens, 72), torch.randn(tokens, 5)
    scores[:, 2] -= 100  # an expert that nobody chooses
    chosen, weight = TWIN.choose(scores, 2, True)
    gate_up, down = weights(5, 2 * 56, 72, dtype=dtype), weights(5, 72, 56, dtype=dtype)
    close(native.experts(x, gate_up, down, chosen, weight), TWIN.experts(x, gate_up, down, chosen, weight))


def test_argmax_takes_the_first_of_equals(native: NativeOps) -> None:
    x = torch.randn(5, 1003)
    x[2, [40, 7, 1002]] = 9.0
    assert torch.equal(native.argmax(x), x.argmax(-1))
    assert native.argmax(x)[2] == 7


# (start, tokens): decodes, first and later chunks, a context of several spans of 512 tokens.
STEPS = {
    "decode": [(0, 1), (5, 1), (37, 1)],
    "prefill": [(0, 19)],
    "mixed": [(40, 1), (0, 33), (13, 21), (3, 1)],
    "long decode": [(1500, 1)],
    "long mixed": [(1100, 3), (600, 1)],
}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("step", sorted(STEPS))
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "block"), [(6, 2, 16, 4), (4, 4, 48, 16), (8, 1, 64, 7)]
)
def test_paged_attention(
    native: NativeOps, dtype: torch.dtype, step: str, heads: int, kv_heads: int, width: int, block: int
) -> None:
    spans = STEPS[step]
    each = [-(-(start + tokens) // block) for start, tokens in spans]
    ids = torch.randperm(sum(each) + 3).split([*each, 3])
    layout = lay_out([(*span, i.tolist()) for span, i in zip(spans, ids, strict=False)], block)
    caches = [torch.randn(sum(each) + 3, kv_heads, block, width).to(dtype) for _ in range(2)]
    twins = [cache.clone() for cache in caches]
    tokens = sum(tokens for _, tokens in spans)
    q = torch.randn(tokens, heads, width)
    joint = torch.randn(
        tokens, 2 * kv_heads, width
    )  # keys and values as strided views, as the model has them
    k, v = joint.split([kv_heads, kv_heads], dim=1)
    ours = native.paged_attention(q, k, v, *caches, layout)
    close(ours, TWIN.paged_attention(q, k, v, *twins, layout))
    assert all(torch.equal(cache, twin) for cache, twin in zip(caches, twins, strict=True))


def test_a_row_is_computed_alone(native: NativeOps) -> None:
    """Bit for bit the same in every batch: linear, both halves of a feed-forward, experts."""
    x = torch.randn(80, 1100)
    w, gate_up, down = weights(130, 1100), weights(4, 2 * 30, 1100), weights(4, 1100, 30)
    chosen, weight = TWIN.choose(torch.randn(80, 4), 2, True)
    whole = [
        native.linear(x, w),
        native.linear_swiglu(x, w),
        native.experts(x, gate_up, down, chosen, weight),
    ]
    for first, stop in [(0, 1), (3, 5), (7, 12), (20, 51), (0, 64)]:
        rows = slice(first, stop)
        part = [
            native.linear(x[rows], w),
            native.linear_swiglu(x[rows], w),
            native.experts(x[rows], gate_up, down, chosen[rows], weight[rows]),
        ]
        assert all(torch.equal(a[rows], b) for a, b in zip(whole, part, strict=True))


def test_a_query_attends_the_same_in_every_cut(native: NativeOps) -> None:
    """Bit for bit: a prompt at once, in chunks, and its last token as a decode."""
    length, width, block = 700, 32, 8
    blocks = list(range(-(-length // block)))
    q, k, v = torch.randn(length, 4, width), torch.randn(length, 2, width), torch.randn(length, 2, width)

    def run(cuts: list[int]) -> Tensor:
        caches = [torch.zeros(len(blocks), 2, block, width) for _ in range(2)]
        parts = []
        for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
            layout = lay_out([(start, stop - start, blocks)], block)
            parts.append(native.paged_attention(q[start:stop], k[start:stop], v[start:stop], *caches, layout))
        return torch.cat(parts)

    whole = run([])
    assert torch.equal(run([3, 130, 515]), whole)
    assert torch.equal(run([length - 1]), whole)


def test_threads_change_nothing(native: NativeOps) -> None:
    x, w = torch.randn(9, 900), weights(400, 900)
    before = native.kernels.thread_count()
    results = []
    try:
        for threads in (1, 3, 2):
            native.kernels.set_threads(threads)
            results += [native.linear(x, w) for _ in range(50)]
    finally:
        native.kernels.set_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


def test_callers_from_several_threads(native: NativeOps) -> None:
    """The helpers serve one caller at a time; the others do their work themselves."""
    from concurrent.futures import ThreadPoolExecutor

    x, w = torch.randn(40, 512), weights(600, 512)
    expected = native.linear(x, w)
    before = native.kernels.thread_count()
    native.kernels.set_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda _: native.linear(x, w), range(60)))
    finally:
        native.kernels.set_threads(before)
    assert all(torch.equal(result, expected) for result in results)


def test_what_does_not_fit_is_refused_by_name(native: NativeOps) -> None:
    with pytest.raises(RuntimeError, match="tongyun kernels: x is"):
        native.linear(torch.randn(2, 8), weights(4, 9))


def test_half_precision_falls_back(native: NativeOps) -> None:
    x, w = torch.randn(3, 16), torch.randn(5, 16).half()
    assert torch.equal(native.linear(x, w), TWIN.linear(x, w))


def test_choice_of_kernels(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from tongyun.errors import InputError
    from tongyun.model.kernels import build

    def no_compiler() -> None:
        raise BuildFailed("no C++ compiler found")

    monkeypatch.setattr(build, "load_kernels", no_compiler)
    monkeypatch.setenv("TONGYUN_KERNELS", "torch")
    assert choose_ops().name == "torch"
    assert choose_ops("auto").name == "torch"
    assert caplog.messages == [
        "running on PyTorch operations, because native kernels cannot be had: no C++ compiler found"
    ]
    with pytest.raises(InputError, match="no C\\+\\+ compiler"):
        choose_ops("native")
    with pytest.raises(InputError, match="run on a CPU"):
        choose_ops("native", "cuda")
    with pytest.raises(InputError, match="accepted: auto, native, torch"):
        choose_ops("fast")
