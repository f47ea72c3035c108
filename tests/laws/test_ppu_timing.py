"""The simulated chip's time: never under its roofline, more never slower, layers once for all."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest

from tongyun.chip.ppu import asm
from tongyun.chip.ppu.capture import compile_step
from tongyun.chip.ppu.emit.builder import Builder
from tongyun.chip.ppu.emit.mapper import Tiling
from tongyun.chip.ppu.emit.matmul import matmul
from tongyun.chip.ppu.energy import COMPONENTS, energy
from tongyun.chip.ppu.functional import Chip
from tongyun.chip.ppu.fusions import Fusions
from tongyun.chip.ppu.isa import Type
from tongyun.chip.ppu.lower import Lowered
from tongyun.chip.ppu.program import Program
from tongyun.chip.ppu.timing import COUNTERS, Timing, simulate, simulate_repeated
from tongyun.errors import Infeasible, InputError
from tongyun.specs import Ppu, find_model, find_ppu

PPU = find_ppu("zhenwu-810e").at()
SHAPES = [(1, 512, 256), (16, 4096, 4096), (200, 1000, 600), (1024, 2048, 1024), (4096, 1024, 512)]


def product(m: int, n: int, k: int, ppu: Ppu = PPU, tiling: Tiling | None = None) -> Program:
    b = Builder(ppu)
    a = b.layout.place("a", (m, k), Type.BF16, "input")
    w = b.layout.place("w", (n, k), Type.BF16, "weight")
    out = b.layout.place("out", (m, n), Type.BF16, "output")
    with b.kernel("matmul", "product"):
        matmul(b, a, w, out, tiling=tiling)
    return b.program()


@lru_cache
def step(model: str, tokens: int, layers: int, context: int = 0, without: tuple[str, ...] = ()) -> Lowered:
    config, _ = find_model(model)
    fusions = Fusions.without(*without)
    return compile_step(config, PPU, tokens=tokens, layers=layers, context=context, fusions=fusions)


def timed(lowered: Lowered, tokens: int, context: int = 0, *, repeat: bool = False, ppu: Ppu = PPU) -> Timing:
    symbols = {"position": [context], "expert_offset": np.arange(129) * tokens * 8 // 128}
    return (simulate_repeated if repeat else simulate)(lowered.program, ppu, symbols)


@pytest.mark.parametrize("chip", ["zhenwu-810e", "a100", "h100"])
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_faster_than_its_roofline(chip: str, shape: tuple[int, int, int]) -> None:
    ppu = find_ppu(chip).at()
    m, n, k = shape
    result = simulate(product(m, n, k, ppu), ppu)
    flops = 2 * m * n * k
    assert result.total("flops") == flops
    least = max(flops / ppu.peak_flops_per_s(), result.total("hbm_bytes") / ppu.hbm_bytes_per_s)
    assert result.seconds >= least
    assert result.total("hbm_bytes") >= 2 * (m * k + n * k)


@pytest.mark.parametrize("shape", SHAPES)
def test_more_cores_are_not_slower(shape: tuple[int, int, int]) -> None:
    times = []
    for cores in (18, 36, 72, 144):
        ppu = dataclasses.replace(PPU, cores=cores)
        times.append(simulate(product(*shape, ppu), ppu).seconds)
    assert all(more <= fewer * 1.01 for fewer, more in pairwise(times))


def test_a_dropped_wait_changes_the_time() -> None:
    program = product(64, 128, 256, tiling=Tiling(m=16, n=32, k=64))
    instructions = asm.disassemble(program.words)
    want = simulate(program, PPU).cycles[0]
    place = next(i for i, each in enumerate(instructions) if each.op == "MMA")
    instructions[place] = dataclasses.replace(instructions[place], wait=0)
    changed = dataclasses.replace(program, words=asm.assemble(instructions))
    assert simulate(changed, PPU).cycles[0] != want


def test_counts_are_those_of_the_functional_run() -> None:
    ppu = dataclasses.replace(PPU, cores=4)
    program = product(64, 128, 256, ppu, Tiling(m=16, n=32, k=64))
    chip = Chip(program, cores=4, sram_bytes=ppu.sram_bytes)
    counts = chip.run()
    result = simulate(program, ppu)
    assert result.total("flops") == sum(counts.flops.values())
    assert result.instructions == counts.instructions
    moved = sum(counts.loaded_bytes.values()) + sum(counts.stored_bytes.values())
    assert result.total("l2_bytes") == moved


@pytest.mark.parametrize(
    ("model", "layers"),
    [("Qwen/Qwen3-0.6B", 3), ("Qwen/Qwen3-30B-A3B", 2), ("Qwen/Qwen3-235B-A22B", 2), ("Qwen/Qwen3-32B", 2)],
)
@pytest.mark.parametrize(("tokens", "context"), [(96, 0), (1, 300)])
def test_flops_and_parameters_are_the_closed_form(model: str, layers: int, tokens: int, context: int) -> None:
    config, _ = find_model(model)
    hidden, width, vocab = config["hidden_size"], config["head_dim"], config["vocab_size"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    attention = hidden * width * (heads + 2 * kv) + heads * width * hidden
    small = 2 * hidden + 2 * width
    if "num_experts" in config:
        expert = 3 * hidden * config["moe_intermediate_size"]
        active = config["num_experts_per_tok"] * expert + hidden * config["num_experts"]
        held = config["num_experts"] * expert + hidden * config["num_experts"]
    else:
        active = held = 3 * hidden * config["intermediate_size"]
    lowered = step(model, tokens, layers, context)
    pairs = sum(context + i + 1 for i in range(tokens))
    flops = 2 * tokens * (layers * (attention + active) + vocab * hidden) + layers * 4 * heads * width * pairs
    assert timed(lowered, tokens, context).total("flops") == flops
    tied = 1 if config["tie_word_embeddings"] else 2
    parameters = layers * (attention + held + small) + tied * vocab * hidden + hidden
    weights = [item for item in lowered.program.tensors if item.role == "input" and item.type is Type.BF16]
    caches = layers * 2 * kv * width * (-(-(tokens + context) // 64) * 64) if context else 0
    frequencies = width // 2
    counted = sum(item.bytes // 2 for item in weights)
    assert counted - caches in {parameters, parameters + frequencies}


def test_repeated_layers_cost_what_each_would() -> None:
    for model, tokens, layers in (("Qwen/Qwen3-0.6B", 256, 12), ("Qwen/Qwen3-30B-A3B", 64, 8)):
        lowered = step(model, tokens, layers)
        for ppu in (PPU, dataclasses.replace(PPU, hbm_bytes_per_s=1.3 * PPU.hbm_bytes_per_s)):
            whole = timed(lowered, tokens, ppu=ppu)
            once = timed(lowered, tokens, ppu=ppu, repeat=True)
            assert once.total_cycles == pytest.approx(whole.total_cycles, rel=1e-3)
            assert once.total("flops") == whole.total("flops")
            assert once.instructions < 0.75 * whole.instructions


def test_each_fusion_saves_bytes_of_the_l2_and_no_work() -> None:
    fused = timed(step("Qwen/Qwen3-0.6B", 256, 2), 256)
    for name in ("norm", "rotate", "swiglu", "residual", "all"):
        apart = timed(step("Qwen/Qwen3-0.6B", 256, 2, without=(name,)), 256)
        assert apart.total("flops") == fused.total("flops")
        assert apart.total_cycles > fused.total_cycles
        if name != "norm":
            assert apart.total("l2_bytes") > fused.total("l2_bytes")


def test_energy_adds_up_and_the_envelope_holds() -> None:
    spec = find_ppu("zhenwu-810e")
    result = simulate(product(4096, 4096, 4096), spec.at())
    found = energy(result, spec)
    assert set(found.joules) == set(COMPONENTS)
    assert all(low <= middle <= high for low, middle, high in found.joules.values())
    assert found.joules["tensor"][1] == pytest.approx(2 * 4096**3 * 0.9e-12)
    assert found.seconds >= result.seconds
    assert found.total[1] / found.seconds <= spec.at().limit_w * (1 + 1e-9)


def test_a_model_that_does_not_fit_is_refused_with_the_bytes_missing() -> None:
    config, _ = find_model("Qwen/Qwen3-30B-A3B")
    small = dataclasses.replace(PPU, hbm_bytes=int(2e9))
    with pytest.raises(Exception, match=r"bytes are missing") as caught:
        compile_step(config, small, tokens=1, layers=2)
    assert isinstance(caught.value, Infeasible) or "Infeasible" in str(caught.value)


def test_a_number_that_is_not_given_is_named() -> None:
    with pytest.raises(InputError, match="the program reads 'position' from memory"):
        simulate(step("Qwen/Qwen3-0.6B", 256, 2).program, PPU)
    assert COUNTERS[0] == "flops"
