"""What each kernel of the PPU computes, against the same operators in f32."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import pytest
import torch
from torch.nn import functional

from tongyun.chip.ppu.emit import attention as attend
from tongyun.chip.ppu.emit import experts, rows
from tongyun.chip.ppu.emit.builder import Builder
from tongyun.chip.ppu.emit.mapper import Tiling
from tongyun.chip.ppu.emit.matmul import Scales, matmul, split_matmul
from tongyun.chip.ppu.emit.quantise import quantise, quantise_again
from tongyun.chip.ppu.functional import Chip, Counts
from tongyun.chip.ppu.isa import Type, Vec
from tongyun.chip.ppu.program import Tensor
from tongyun.chip.ppu.tiles import TORCH
from tongyun.specs import Ppu, find_ppu

PPU = dataclasses.replace(find_ppu("zhenwu-810e").at(), cores=5)
BF16 = 0.004
"""Relative error of a result rounded to bf16 once or twice: 2⁻⁸."""
TYPES = {dtype: kind for kind, dtype in TORCH.items()}


class Bench:
    """Tensors by name, a kernel over them, and what it made."""

    def __init__(self, ppu: Ppu = PPU, **given: torch.Tensor) -> None:
        self.builder = Builder(ppu)
        self.given = given
        self.tensors = {name: self._place(name, value, "input") for name, value in given.items()}

    def _place(self, name: str, value: torch.Tensor, role: str) -> Tensor:
        return self.builder.layout.place(name, tuple(value.shape), TYPES[value.dtype], role)

    def out(self, name: str, *shape: int, type: Type = Type.BF16) -> Tensor:
        self.tensors[name] = self.builder.layout.place(name, shape, type, "output")
        return self.tensors[name]

    def run(self, *kernels: Callable[[Builder, Mapping[str, Tensor]], None]) -> tuple[Chip, Counts]:
        for kernel in kernels:
            with self.builder.kernel("test", "test"):
                kernel(self.builder, self.tensors)
        chip = Chip(self.builder.program(), cores=PPU.cores, sram_bytes=PPU.sram_bytes, check=True)
        for name, value in self.given.items():
            chip.put(name, value)
        return chip, chip.run()


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def normed(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * gain.float()


@pytest.mark.parametrize("shape", [(33, 50, 70), (1, 300, 256), (100, 130, 300)])
@pytest.mark.parametrize("fused", ["", "norm", "gate", "norm gate", "residual", "bias", "norm gate residual"])
def test_a_product_and_what_is_fused_to_it(shape: tuple[int, int, int], fused: str) -> None:
    m, n, k = shape
    given = {"a": bf16(m, k), "w": bf16(n, k)}
    given |= {"gain": bf16(k)} if "norm" in fused else {}
    given |= {"up": bf16(n, k) * 0.5} if "gate" in fused else {}
    given |= {"res": bf16(m, n)} if "residual" in fused else {}
    given |= {"bias": bf16(n)} if "bias" in fused else {}
    bench = Bench(**given)
    bench.out("out", m, n)
    tiling = Tiling(m=32, n=64, k=64) if m > 1 else None

    def kernel(b: Builder, t: Mapping[str, Tensor]) -> None:
        matmul(
            b, t["a"], t["w"], t["out"], up=t.get("up"), gain=t.get("gain"), eps=1e-6,
            residual=t.get("res"), bias=t.get("bias"), tiling=tiling,
        )  # fmt: skip

    chip, counts = bench.run(kernel)
    a = normed(given["a"], given["gain"]) if "norm" in fused else given["a"].float()
    want = a @ given["w"].float().T
    want = functional.silu(want) * (a @ given["up"].float().T) if "gate" in fused else want
    want = want + given["bias"].float() if "bias" in fused else want
    want = want + given["res"].float() if "residual" in fused else want
    assert error(chip.view("out"), want) < BF16
    assert sum(counts.flops.values()) == 2 * m * n * k * (2 if "gate" in fused else 1)


def test_rows() -> None:
    bench = Bench(x=bf16(37, 64), gain=bf16(64), other=bf16(37, 64))
    for name in ("norm", "silu", "sum", "act"):
        bench.out(name, 37, 64)
    chip, _ = bench.run(
        lambda b, t: rows.rmsnorm(b, rows.Rows.of(t["x"]), t["gain"], rows.Rows.of(t["norm"]), 1e-6),
        lambda b, t: rows.elementwise(b, Vec.SILU, t["x"], t["silu"]),
        lambda b, t: rows.elementwise(b, Vec.ADD, t["x"], t["sum"], other=t["other"]),
        lambda b, t: rows.swiglu(b, rows.Rows.of(t["x"]), rows.Rows.of(t["other"]), t["act"]),
    )
    x, other = bench.given["x"], bench.given["other"]
    assert error(chip.view("norm"), normed(x, bench.given["gain"])) < BF16
    assert error(chip.view("silu"), functional.silu(x.float())) < BF16
    assert torch.equal(chip.view("sum"), x + other)
    assert torch.equal(chip.view("act"), functional.silu(x) * other)


def test_embedding_reads_the_rows_of_64_bit_ids() -> None:
    bench = Bench(ids=torch.randint(0, 100, (41,)), table=bf16(100, 32))
    bench.out("out", 41, 32)
    chip, _ = bench.run(lambda b, t: rows.embed(b, t["ids"], t["table"], t["out"]))
    assert torch.equal(chip.view("out"), bench.given["table"][bench.given["ids"]])


def test_rotation_with_the_norm_of_each_head() -> None:
    bench = Bench(x=bf16(37, 64), cos=bf16(37, 16), sin=bf16(37, 16) + 0, gain=bf16(16))
    bench.out("out", 37, 64)
    chip, _ = bench.run(
        lambda b, t: rows.rotate(
            b,
            rows.Rows.of(t["x"]),
            t["cos"],
            t["sin"],
            rows.Rows.of(t["out"]),
            heads=4,
            norm=rows.HeadNorm(gain=t["gain"], eps=1e-6),
        )
    )
    heads = normed(bench.given["x"].view(37, 4, 16), bench.given["gain"])
    left, right = heads.chunk(2, -1)
    cos, sin = bench.given["cos"].float()[:, None], bench.given["sin"].float()[:, None]
    assert error(chip.view("out"), (heads * cos + torch.cat((-right, left), -1) * sin).reshape(37, 64)) < BF16


GPU = dataclasses.replace(find_ppu("a100").at(), cores=5, attention_rows=32, attention_keys=16)


@pytest.mark.parametrize("many", [1, 2, 4])
@pytest.mark.parametrize("ppu", [PPU, GPU], ids=["one instruction", "a kernel"])
@pytest.mark.parametrize(("tokens", "start"), [(37, 11), (1, 40), (20, 0)])
def test_attention_over_a_cache(tokens: int, start: int, ppu: Ppu, many: int) -> None:
    heads, kv, width, room = 4, 2, 16, 64
    bench = Bench(
        ppu, q=bf16(2 * tokens, heads * width), k=bf16(2, kv, room, width), v=bf16(2, kv, room, width) * 0.5,
        position=torch.arange(start, start + tokens),
    )  # fmt: skip
    out = bench.out("out", 2 * tokens, heads * width)
    shape = attend.Attention(
        sequences=2, tokens=tokens, heads=heads, kv_heads=kv, width=width, room=room, scale=width**-0.5,
        query_stride=heads * width * 2, alone=ppu is GPU,
    )  # fmt: skip
    t = bench.tensors
    attend.emit(bench.builder, shape, t["q"], (t["k"], t["v"]), out, t["position"], "test", many=many)
    chip, counts = bench.run()
    q = bench.given["q"].float().view(2, tokens, heads, width).transpose(1, 2)
    k, v = (bench.given[name].float().repeat_interleave(heads // kv, 1) for name in "kv")
    seen = torch.arange(room)[None] <= (start + torch.arange(tokens))[:, None]
    want = (
        functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        .transpose(1, 2)
        .reshape(2 * tokens, -1)
    )
    assert error(chip.view("out"), want) < BF16
    pairs = sum(start + i + 1 for i in range(tokens))
    assert sum(counts.flops.values()) == 4 * 2 * heads * width * pairs


@pytest.mark.parametrize("tokens", [1, 29])
def test_a_mixture_of_experts(tokens: int) -> None:
    hidden, count, top, inner = 64, 8, 2, 48
    bench = Bench(
        x=bf16(tokens, hidden), logits=bf16(tokens, count), up=bf16(count, 2 * inner, hidden) * 0.2,
        down=bf16(count, hidden, inner) * 0.2, owner=torch.arange(tokens * top, dtype=torch.int32) // top,
    )  # fmt: skip
    bench.out("share", tokens, top)
    for name, size in (
        ("expert", tokens * top),
        ("token", tokens * top),
        ("place", tokens * top),
        ("offset", count + 1),
    ):
        bench.out(name, size, type=Type.I32)
    bench.out("act", tokens * top, inner)
    bench.out("each", tokens * top, hidden)
    bench.out("out", tokens, hidden)
    chip, counts = bench.run(
        lambda b, t: experts.choose(b, t["logits"], t["share"], t["expert"], top=top, renormalise=True),
        lambda b, t: experts.dispatch(
            b, t["expert"], t["owner"], t["token"], t["place"], t["offset"], experts=count
        ),
        lambda b, t: experts.grouped(b, t["x"], t["up"], t["act"], t["offset"], token=t["token"], gate=True),
        lambda b, t: experts.grouped(b, t["act"], t["down"], t["each"], t["offset"]),
        lambda b, t: experts.combine(
            b, t["each"], t["share"], t["place"], t["out"], top=top, residual=t["x"]
        ),
    )
    x = bench.given["x"].float()
    share, chosen = torch.softmax(bench.given["logits"].float(), -1).topk(top, -1)
    share = share / share.sum(-1, keepdim=True)
    assert torch.equal(chip.view("expert").view(tokens, top).long(), chosen)
    want = x.clone()
    for t in range(tokens):
        for j in range(top):
            gate, up = (bench.given["up"][chosen[t, j]].float() @ x[t]).chunk(2)
            want[t] += share[t, j] * (
                bench.given["down"][chosen[t, j]].float() @ (functional.silu(gate) * up)
            )
    assert error(chip.view("out"), want) < 2 * BF16
    assert sum(counts.flops.values()) == tokens * top * 2 * 3 * inner * hidden
    touched = len(set(chosen.flatten().tolist()))
    weights = counts.loaded_bytes[3] - 2 * tokens * top * hidden * 2
    assert weights <= touched * 2 * inner * hidden * 2 * tokens + 10_000


@pytest.mark.parametrize(("m", "n", "k", "parts"), [(33, 40, 1000, 3), (16, 64, 512, 4), (65, 70, 2050, 8)])
def test_a_product_cut_over_k_is_the_same_product(m: int, n: int, k: int, parts: int) -> None:
    a, w = bf16(m, k), bf16(n, k)
    bench = Bench(a=a, w=w)
    split_matmul(bench.builder, bench.tensors["a"], bench.tensors["w"], bench.out("out", m, n), parts, "cut")
    chip, counts = bench.run()
    assert error(chip.view("out"), a.float() @ w.float().T) < BF16
    assert sum(counts.flops.values()) == 2 * m * n * k


def fp8(*shape: int) -> torch.Tensor:
    """Small whole numbers: their products and sums are exact in f32 in any order."""
    seed = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-8, 9, shape, generator=seed).to(torch.float8_e4m3fn)


def int8(*shape: int) -> torch.Tensor:
    return torch.randint(
        -128, 128, shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.int8
    )


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) + 0.5


H100 = dataclasses.replace(find_ppu("h100").at(), cores=5)


@pytest.mark.parametrize("shape", [(33, 50, 96), (1, 300, 256), (100, 130, 320)])
@pytest.mark.parametrize("splits", [1, 2])
def test_a_product_of_fp8_is_torchs_bit_for_bit(shape: tuple[int, int, int], splits: int) -> None:
    m, n, k = shape
    bench = Bench(H100, a=fp8(m, k), w=fp8(n, k), sa=positive(m, 1), sw=positive(1, n))
    bench.out("out", splits * m, n, type=Type.F32)
    tiling = Tiling(m=32, n=64, k=64, stages=3, piece=(16, 32)) if m > 1 else None
    chip, counts = bench.run(
        lambda b, t: matmul(
            b, t["a"], t["w"], t["out"], scales=Scales(rows=t["sa"], columns=t["sw"]), tiling=tiling,
            splits=splits,
        )
    )  # fmt: skip
    given = bench.given
    exact = given["a"].float() @ given["w"].float().T
    if splits == 1:
        assert torch.equal(chip.view("out"), exact * given["sa"] * given["sw"])
        torchs = torch._scaled_mm(
            given["a"], given["w"].T, scale_a=given["sa"], scale_b=given["sw"], out_dtype=torch.float32
        )
        assert error(chip.view("out"), torchs) < 1e-6
    assert error(chip.view("out").view(splits, m, n).sum(0), exact * given["sa"] * given["sw"]) < 1e-6
    assert sum(counts.flops.values()) == 2 * m * n * k


@pytest.mark.parametrize("shape", [(33, 200, 320), (130, 256, 1024)])
def test_a_product_of_scaled_blocks(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    deep, high = -(-k // 128), -(-n // 128)
    bench = Bench(H100, a=fp8(m, k), w=fp8(n, k), sa=positive(m, deep), sw=positive(high, deep))
    bench.out("out", m, n, type=Type.F32)
    chip, _ = bench.run(
        lambda b, t: matmul(
            b, t["a"], t["w"], t["out"], scales=Scales(rows=t["sa"], columns=t["sw"], blocks=True)
        )
    )
    given = bench.given
    a = given["a"].double() * given["sa"].double().repeat_interleave(128, 1)[:, :k]
    w = given["w"].double() * given["sw"].double().repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]
    assert error(chip.view("out"), a @ w.T) < 1e-6


@pytest.mark.parametrize("k", [96, 4096])
def test_sums_of_int8_are_i32(k: int) -> None:
    """4,096 products of −128 by −128 are more than f32 counts."""
    m, n = 40, 70
    bench = Bench(H100, a=int8(m, k), w=int8(n, k), sw=torch.ones(n))
    bench.given["a"].fill_(-127) if k > 1000 else None
    bench.out("out", m, n, type=Type.F32)
    chip, _ = bench.run(lambda b, t: matmul(b, t["a"], t["w"], t["out"], scales=Scales(columns=t["sw"])))
    exact = bench.given["a"].double() @ bench.given["w"].double().T
    assert torch.equal(chip.view("out"), exact.int().float())


def test_a_gated_product_of_fp8_scales_both_weights() -> None:
    m, n, k = 37, 72, 160
    bench = Bench(
        H100, a=fp8(m, k), w=fp8(n, k), up=fp8(k, n).T.contiguous(), sa=positive(m, 1) / 99, sw=positive(n),
        su=positive(n) + 1,
    )  # fmt: skip
    bench.out("out", m, n)
    chip, _ = bench.run(
        lambda b, t: matmul(
            b, t["a"], t["w"], t["out"], up=t["up"],
            scales=Scales(rows=t["sa"], columns=t["sw"], up=t["su"]),
        )
    )  # fmt: skip
    given = bench.given
    gate, up = (
        given["a"].float() @ given[w].float().T * given["sa"] * given[s]
        for w, s in (("w", "sw"), ("up", "su"))
    )
    assert error(chip.view("out"), functional.silu(gate) * up) < BF16


def test_a_weight_of_int8_beside_bf16_rows() -> None:
    m, n, k = 37, 72, 160
    bench = Bench(a=bf16(m, k), w=int8(n, k), sw=positive(n) / 127)
    bench.out("out", m, n)
    chip, _ = bench.run(lambda b, t: matmul(b, t["a"], t["w"], t["out"], scales=Scales(columns=t["sw"])))
    given = bench.given
    want = given["a"].float() @ given["w"].float().T * given["sw"]
    assert error(chip.view("out"), want) < BF16


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("norm", [False, True])
def test_rows_become_few_bits_and_scales(kind: torch.dtype, blocks: int, norm: bool) -> None:
    x = bf16(37, 256) * torch.linspace(0, 30, 37)[:, None].bfloat16()
    bench = Bench(x=x, gain=bf16(256))
    bench.out("q", 37, 256, type=TYPES[kind])
    bench.out("scale", 37, blocks, type=Type.F32)
    chip, _ = bench.run(
        lambda b, t: quantise(
            b, rows.Rows.of(t["x"]), t["q"], t["scale"], gain=t["gain"] if norm else None, eps=1e-6
        )
    )
    if norm:
        x = normed(x, bench.given["gain"]).bfloat16()
    parts = x.float().reshape(37, blocks, -1)
    largest = 448.0 if kind == torch.float8_e4m3fn else 127.0
    scale = (parts.abs().amax(-1, keepdim=True) * (1 / largest)).clamp(min=1e-12)
    want = parts * scale.reciprocal()
    want = want.round() if kind == torch.int8 else want
    assert torch.equal(chip.view("scale"), scale[..., 0])
    assert torch.equal(chip.view("q").float(), want.to(kind).float().reshape(37, -1))


@pytest.mark.parametrize("cols", [64, 20_000])
def test_rows_read_twice_are_those_read_once(cols: int) -> None:
    bench = Bench(x=bf16(37, cols))
    for name in ("", "again"):
        bench.out(f"q{name}", 37, cols, type=Type.FP8)
        bench.out(f"scale{name}", 37, 1, type=Type.F32)

    def once(b, t):
        quantise(b, rows.Rows.of(t["x"]), t["q"], t["scale"])

    def again(b, t):
        quantise_again(b, rows.Rows.of(t["x"]), t["qagain"], t["scaleagain"], at_once=8)

    chip, _ = bench.run(once, again)
    assert torch.equal(chip.view("scale"), chip.view("scaleagain"))
    assert torch.equal(chip.view("q").float(), chip.view("qagain").float())


@pytest.mark.parametrize("how", ["rows", "gate", "blocks", "int8"])
def test_experts_of_few_bits(how: str) -> None:
    tokens, count, n, k = 23, 5, 96, 320
    pairs, make = 2 * tokens, int8 if how == "int8" else fp8
    ends = torch.tensor([0, 3, 3, 20, 45, 46], dtype=torch.int32)
    token = torch.randint(0, tokens, (pairs,), generator=torch.Generator().manual_seed(0)).int()
    deep, high = (-(-k // 128), -(-n // 128)) if how == "blocks" else (1, n)
    bench = Bench(
        H100, x=make(tokens, k), w=make(count, n, k), offset=ends, token=token,
        sx=positive(tokens, deep), sw=positive(count, high, deep) / 64,
    )  # fmt: skip
    bench.out("out", pairs, n // 2 if how == "gate" else n)
    chip, _ = bench.run(
        lambda b, t: experts.grouped(
            b, t["x"], t["w"], t["out"], t["offset"], token=t["token"], gate=how == "gate",
            scales=Scales(rows=t["sx"], columns=t["sw"], blocks=how == "blocks"),
        )
    )  # fmt: skip
    given = bench.given
    wide, tall = (128, 128) if how == "blocks" else (k, 1)
    x = given["x"].float() * given["sx"].repeat_interleave(wide, 1)[:, :k]
    w = given["w"].float() * given["sw"].repeat_interleave(wide, 2)[..., :k].repeat_interleave(tall, 1)[:, :n]
    owner = torch.repeat_interleave(torch.arange(count), ends.diff())
    want = torch.einsum("pk,pnk->pn", x[token.long()], w[owner])
    if how == "gate":
        want = functional.silu(want[:, : n // 2]) * want[:, n // 2 :]
    assert error(chip.view("out"), want) < BF16
