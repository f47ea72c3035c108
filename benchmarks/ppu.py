"""The PPU's simulators and compiler: speed, exactness, and what each fusion saves.

    python benchmarks/ppu.py [--model Qwen/Qwen3-0.6B] [--tokens 512] [--chips 1]

Prints the functional simulator's GFLOP/s, the timing simulator's instructions a second, a step with its
layers run once against all of them, and the ablation of the fusions. Seconds are this machine's wall time;
milliseconds, bytes and joules of the chip are simulated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike

from tongyun.chip.ppu.capture import compile_step
from tongyun.chip.ppu.emit.builder import Builder
from tongyun.chip.ppu.emit.matmul import matmul
from tongyun.chip.ppu.energy import energy
from tongyun.chip.ppu.functional import Chip
from tongyun.chip.ppu.fusions import Fusions
from tongyun.chip.ppu.isa import Type
from tongyun.chip.ppu.program import Program
from tongyun.chip.ppu.timing import Timing, simulate, simulate_repeated
from tongyun.chip.ppu.traffic import saving
from tongyun.specs import Ppu, find_model, find_ppu

T = TypeVar("T")
TURNS = 3
"""Simulators run so often; the quickest counts, because the machine is shared and the first run warms up."""


def timed(call: Callable[[], T], turns: int = 1) -> tuple[T, float]:
    """What a call answers, and the seconds of the quickest of its turns."""
    seconds = []
    for _ in range(turns):
        begun = time.perf_counter()
        answer = call()
        seconds.append(time.perf_counter() - begun)
    return answer, min(seconds)


def product(m: int, n: int, k: int, ppu: Ppu) -> Program:
    b = Builder(ppu)
    a = b.layout.place("a", (m, k), Type.BF16, "input")
    w = b.layout.place("w", (n, k), Type.BF16, "weight")
    out = b.layout.place("out", (m, n), Type.BF16, "output")
    with b.kernel("matmul", "product"):
        matmul(b, a, w, out)
    return b.program()


def functional(ppu: Ppu) -> None:
    print("functional simulator, one product m = n = k, checked against torch in bf16")
    print(f"{'size':>6} {'s':>8} {'GFLOP/s':>9} {'same bits %':>12}")
    for size in (512, 1024, 2048):
        program = product(size, size, size, ppu)
        chip = Chip(program, cores=ppu.cores, sram_bytes=ppu.sram_bytes)
        torch.manual_seed(size)
        a, w = torch.randn(size, size).bfloat16(), torch.randn(size, size).bfloat16()
        chip.put("a", a)
        chip.put("w", w)
        _, seconds = timed(chip.run, TURNS)
        same = 100 * float((chip.view("out") == a @ w.T).float().mean())
        print(f"{size:>6} {seconds:>8.2f} {2 * size**3 / seconds / 1e9:>9.1f} {same:>12.2f}")


def speed(ppu: Ppu) -> None:
    print("\ntiming simulator, products")
    print(f"{'m × n × k':>20} {'chip ms':>9} {'of roofline':>12} {'instructions':>13} {'M/s':>6}")
    simulate(product(64, 64, 64, ppu), ppu)
    for m, n, k in (
        (16, 4096, 4096),
        (1024, 4096, 4096),
        (4096, 4096, 4096),
        (4096, 12288, 4096),
        (8192,) * 3,
    ):
        program = product(m, n, k, ppu)
        result, seconds = timed(lambda program=program: simulate(program, ppu), TURNS)  # type: ignore[misc]
        bound = max(
            2 * m * n * k / ppu.peak_flops_per_s(), 2 * (m * k + n * k + m * n) / ppu.hbm_peak_bytes_per_s
        )
        name, rate = f"{m} × {n} × {k}", result.instructions / seconds / 1e6
        print(
            f"{name:>20} {result.seconds * 1e3:>9.3f} {bound / result.seconds:>12.2f} "
            f"{result.instructions:>13,} {rate:>6.1f}"
        )


def step(model: str, tokens: int, chips: int, ppu: Ppu) -> None:
    config, _ = find_model(model)
    symbols = {"position": [0]}
    if "num_experts" in config:
        experts, pairs = config["num_experts"], tokens * config["num_experts_per_tok"]
        symbols["expert_offset"] = np.arange(experts + 1) * pairs // experts
    lowered, seconds = timed(lambda: compile_step(config, ppu, tokens=tokens, chips=chips))
    print(f"\n{model}, a prompt of {tokens} tokens, {chips} chips: captured and compiled in {seconds:.1f} s")
    print(f"{'layers':>12} {'chip ms':>9} {'instructions':>13} {'s':>7} {'M/s':>6} {'effective M/s':>14}")
    whole = simulate(lowered.program, ppu, symbols)
    for name, run in (("every one", simulate), ("once for all", simulate_repeated)):
        result, seconds = timed(lambda run=run: run(lowered.program, ppu, symbols), TURNS)  # type: ignore[misc]
        rates = [result.instructions / seconds / 1e6, whole.instructions / seconds / 1e6]
        print(
            f"{name:>12} {result.seconds * 1e3:>9.4f} {result.instructions:>13,} {seconds:>7.3f} "
            f"{rates[0]:>6.1f} {rates[1]:>14,.1f}"
        )
    print(f"difference {abs(result.total_cycles / whole.total_cycles - 1):.5%}")
    if chips == 1:
        ablation(config, tokens, ppu, symbols)


def ablation(config: Mapping[str, Any], tokens: int, ppu: Ppu, symbols: Mapping[str, ArrayLike]) -> None:
    """What a step takes more without a fusion: bytes as shapes and tiles say, and as the instructions ask."""
    print("\nwithout a fusion: bytes asked of the memory more than with all, predicted and counted")
    heads = ("between MB", "given MB", "predicted", "counted", "HBM MB", "chip ms", "J")
    print(f"{'without':>10} {'kernels':>8} " + " ".join(f"{head:>13}" for head in heads))
    base: tuple[Program, Timing] | None = None
    for without in ((), ("norm",), ("rotate",), ("swiglu",), ("residual",), ("all",)):
        program = compile_step(config, ppu, tokens=tokens, fusions=Fusions.without(*without)).program
        result = simulate(program, ppu, symbols)
        base = base or (program, result)
        joules = energy(result, find_ppu("zhenwu-810e"))
        saved, more = saving(base[0], program), result.total("l2_bytes") - base[1].total("l2_bytes")
        row = [f"{saved.between / 1e6:.3f}", f"{saved.given / 1e6:.3f}", f"{saved.bytes:,}", f"{more:,}"]
        row += [
            f"{result.total('hbm_bytes') / 1e6:.1f}",
            f"{result.seconds * 1e3:.4f}",
            f"{joules.total[1]:.3f}",
        ]
        name = ", ".join(without) or "none"
        print(f"{name:>10} {len(program.kernels):>8} " + " ".join(f"{cell:>13}" for cell in row))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--chips", type=int, default=1)
    given = parser.parse_args()
    ppu = find_ppu("zhenwu-810e").at()
    functional(ppu)
    speed(ppu)
    step(given.model, given.tokens, given.chips, ppu)


if __name__ == "__main__":
    main()
