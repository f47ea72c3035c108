"""Measure every operation on PyTorch and on the native kernels, beside what the machine allows.

    python benchmarks/kernels.py [--threads N] [--only linear] [--json]

Bounds are measured here and now: a read of memory far larger than the caches, and
multiply-adds in registers. A kernel's percentage is of the time the slower of the two
would take. Times are minima over repetitions, so that a machine with other work still
shows what the code can do; on such a machine do not read them as absolute.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tongyun.model.kernels import TorchOps
from tongyun.model.kernels.attention import lay_out
from tongyun.model.kernels.build import load_kernels
from tongyun.model.kernels.native import NativeOps
from tongyun.model.memory import empty_for_streaming
from tongyun.report import Column, column, show, table, to_json


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation on one shape, as a call on either set of operations."""

    op: str
    shape: str
    call: Callable[[TorchOps], object]
    flops: float
    moved_bytes: float


@dataclass(frozen=True, kw_only=True)
class Bounds:
    bytes_per_s: float
    flops_per_s: float

    def seconds(self, case: Case) -> float:
        return max(case.moved_bytes / self.bytes_per_s, case.flops / self.flops_per_s)


def best_s(call: Callable[[], object], budget_s: float = 0.6) -> float:
    """The fastest of as many repetitions as fit the budget, at least three."""
    best, spent, runs = math.inf, 0.0, 0
    while spent < budget_s or runs < 3:
        begun = time.perf_counter()
        call()
        took = time.perf_counter() - begun
        best, spent, runs = min(best, took), spent + took, runs + 1
    return best


def measure_bounds(native: NativeOps) -> Bounds:
    data = empty_for_streaming((256 * 2**20,), torch.uint8).fill_(1)
    read_s = best_s(lambda: native.kernels.read_bytes(data), 2.0)
    each = 2_000_000
    flops = native.kernels.multiply_adds(each)
    return Bounds(
        bytes_per_s=data.nbytes / read_s,
        flops_per_s=flops / best_s(lambda: native.kernels.multiply_adds(each), 1.0),
    )


class Rotating:
    """Several copies of a weight used in turn, together larger than the caches, as layers are."""

    def __init__(self, *shape: int) -> None:
        count = min(64, max(2, math.ceil(192e6 / (2 * math.prod(shape)))))
        self._copies = [empty_for_streaming(shape, torch.bfloat16).normal_(0, 0.02) for _ in range(count)]
        self._turn = 0

    def __call__(self) -> Tensor:
        self._turn = (self._turn + 1) % len(self._copies)
        return self._copies[self._turn]


def linear_case(tokens: int, outputs: int, inputs: int) -> Case:
    x, weight = torch.randn(tokens, inputs), Rotating(outputs, inputs)
    return Case(
        op="linear",
        shape=f"{tokens} × {outputs} × {inputs}",
        call=lambda ops: ops.linear(x, weight()),
        flops=2.0 * tokens * outputs * inputs,
        moved_bytes=2.0 * outputs * inputs + 4.0 * tokens * (inputs + outputs),
    )


def swiglu_case(tokens: int, inner: int, hidden: int) -> Case:
    x, weight = torch.randn(tokens, hidden), Rotating(2 * inner, hidden)
    return Case(
        op="linear_swiglu",
        shape=f"{tokens} × {2 * inner} × {hidden}",
        call=lambda ops: ops.linear_swiglu(x, weight()),
        flops=4.0 * tokens * inner * hidden,
        moved_bytes=4.0 * inner * hidden + 4.0 * tokens * (hidden + inner),
    )


def norm_case(tokens: int, width: int) -> Case:
    x, weight = torch.randn(tokens, width), torch.ones(width).bfloat16()
    return Case(
        op="rms_norm",
        shape=f"{tokens} × {width}",
        call=lambda ops: ops.rms_norm(x, weight, 1e-6),
        flops=4.0 * tokens * width,
        moved_bytes=8.0 * tokens * width,
    )


def inputs_case(tokens: int, heads: int, kv_heads: int, width: int) -> Case:
    joint, norm = torch.randn(tokens, heads + 2 * kv_heads, width), torch.ones(width).bfloat16()
    angle = torch.rand(tokens, width)
    cos, sin = angle.cos(), angle.sin()
    return Case(
        op="attention_inputs",
        shape=f"{tokens} × ({heads} + 2·{kv_heads}) × {width}",
        call=lambda ops: ops.attention_inputs(joint, (norm, norm, 1e-6), cos, sin, kv_heads),
        flops=10.0 * tokens * (heads + kv_heads) * width,
        moved_bytes=8.0 * tokens * (heads + kv_heads) * width,
    )


def attention_case(pieces: list[tuple[int, int]], heads: int, kv_heads: int, dtype: torch.dtype) -> Case:
    width, block = 128, 16
    each = [-(-(start + tokens) // block) for start, tokens in pieces]
    first = [sum(each[:i]) for i in range(len(each))]
    spans = [(*piece, range(at, at + n)) for piece, at, n in zip(pieces, first, each, strict=True)]
    layout = lay_out(spans, block)
    keys, values = (torch.randn(sum(each), kv_heads, block, width).to(dtype) for _ in range(2))
    tokens = sum(n for _, n in pieces)
    q, k = torch.randn(tokens, heads, width), torch.randn(tokens, kv_heads, width)
    seen = sum(n * start + n * (n + 1) / 2 for start, n in pieces)
    context = sum(start + n for start, n in pieces)
    start, length = pieces[0]
    return Case(
        op=f"paged_attention {'bf16' if dtype == torch.bfloat16 else 'f32'}",
        shape=f"{len(pieces)} × {length} after {start}, {heads}/{kv_heads} heads",
        call=lambda ops: ops.paged_attention(q, k, k, keys, values, layout),
        flops=4.0 * seen * heads * width,
        moved_bytes=2.0 * context * kv_heads * width * keys.element_size() + 8.0 * q.numel(),
    )


def experts_case(tokens: int, count: int, per_token: int, inner: int, hidden: int) -> Case:
    x, scores = torch.randn(tokens, hidden), torch.randn(tokens, count)
    chosen, weight = TorchOps().choose(scores, per_token, True)
    gate_up, down = Rotating(count, 2 * inner, hidden), Rotating(count, hidden, inner)
    touched = len(chosen.unique())
    return Case(
        op="experts",
        shape=f"{tokens} tokens, {per_token} of {count} × {inner} × {hidden}",
        call=lambda ops: ops.experts(x, gate_up(), down(), chosen, weight),
        flops=6.0 * tokens * per_token * inner * hidden,
        moved_bytes=6.0 * touched * inner * hidden + 8.0 * tokens * hidden,
    )


def argmax_case(rows: int, vocab: int) -> Case:
    x = torch.randn(rows, vocab)
    return Case(
        op="argmax",
        shape=f"{rows} × {vocab}",
        call=lambda ops: ops.argmax(x),
        flops=rows * vocab,
        moved_bytes=4.0 * rows * vocab,
    )


def cases() -> dict[str, list[Callable[[], Case]]]:
    """Shapes of Qwen3-0.6B, of the 30B-A3B's experts, and of the small model that is built in."""
    f32, bf16 = torch.float32, torch.bfloat16
    return {
        "linear": [lambda m=m: linear_case(m, 3072, 1024) for m in (1, 2, 4, 8, 16, 32, 128, 512)]
        + [lambda m=m: linear_case(m, 1024, 3072) for m in (1, 8, 512)]
        + [lambda: linear_case(1, 151936, 1024), lambda: linear_case(8, 151936, 1024)],
        "linear_swiglu": [lambda m=m: swiglu_case(m, 3072, 1024) for m in (1, 8, 512)],
        "rms_norm": [lambda m=m: norm_case(m, 1024) for m in (1, 512)],
        "attention_inputs": [lambda m=m: inputs_case(m, 16, 8, 128) for m in (1, 512)],
        "attention": [
            lambda: attention_case([(1000, 1)], 16, 8, f32),
            lambda: attention_case([(1000, 1)] * 8, 16, 8, f32),
            lambda: attention_case([(1000, 1)] * 8, 16, 8, bf16),
            lambda: attention_case([(16000, 1)], 16, 8, f32),
            lambda: attention_case([(0, 512)], 16, 8, f32),
            lambda: attention_case([(2000, 256)], 32, 4, f32),
        ],
        "experts": [
            lambda: experts_case(1, 128, 8, 768, 2048),
            lambda: experts_case(8, 128, 8, 768, 2048),
            lambda: experts_case(1, 8, 2, 128, 256),
            lambda: experts_case(256, 8, 2, 128, 256),
        ],
        "argmax": [lambda: argmax_case(8, 151936)],
    }


def measure(case: Case, native: NativeOps, bounds: Bounds) -> dict[str, float | str]:
    with torch.inference_mode():
        torch_s = best_s(lambda: case.call(TorchOps()))
        native_s = best_s(lambda: case.call(native))
    return {
        "op": case.op,
        "shape": case.shape,
        "torch_us": torch_s * 1e6,
        "native_us": native_s * 1e6,
        "gbytes_per_s": case.moved_bytes / native_s / 1e9,
        "gflops_per_s": case.flops / native_s / 1e9,
        "of_bound": bounds.seconds(case) / native_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=sorted(cases()))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    native = NativeOps(load_kernels(), given.threads)
    bounds = measure_bounds(native)
    chosen = {given.only: cases()[given.only]} if given.only else cases()
    rows = [measure(make(), native, bounds) for group in chosen.values() for make in group]
    if given.json:
        print(to_json({"threads": given.threads, "bounds": bounds, "rows": rows}))
        return
    columns: list[Column] = [column("op", left=True), column("shape", left=True)]
    columns += [column(n) for n in ("PyTorch µs", "native µs", "GB/s", "GFLOP/s", "of bound")]
    cells = [
        [
            str(r["op"]),
            str(r["shape"]),
            *(f"{r[key]:.0f}" for key in ("torch_us", "native_us")),
            *(f"{r[key]:.1f}" for key in ("gbytes_per_s", "gflops_per_s")),
            f"{100 * float(r['of_bound']):.0f} %",
        ]
        for r in rows
    ]
    limits = f"{bounds.bytes_per_s / 1e9:.1f} GB/s read, {bounds.flops_per_s / 1e9:.0f} GFLOP/s"
    show(table(f"Kernels on {given.threads} threads; bounds {limits} (all measured)", columns, cells))


if __name__ == "__main__":
    main()
