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
from tongyun.chip.ppu.emit.matmul import Tiling, matmul, split_matmul
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
