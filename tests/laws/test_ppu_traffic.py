"""Bytes predicted from shapes and tiles are those the instructions ask for; so is what a fusion saves."""

from __future__ import annotations

from functools import cache

import pytest

from tongyun.chip.ppu.capture import compile_step
from tongyun.chip.ppu.emit.builder import Builder
from tongyun.chip.ppu.emit.mapper import Matmul, mapped, traffic
from tongyun.chip.ppu.fusions import Fusions
from tongyun.chip.ppu.isa import Type
from tongyun.chip.ppu.program import Program
from tongyun.chip.ppu.quantised import WAYS
from tongyun.chip.ppu.timing import COUNTERS, simulate
from tongyun.chip.ppu.traffic import fetched, saving
from tongyun.specs import find_model, find_ppu
from tongyun.units import DType

FUSIONS = ("norm", "rotate", "swiglu", "residual")
RUNTIME = {"attention", "embed"}
"""Kernels whose traffic numbers in memory decide; no fusion changes them in a dense model."""


@cache
def counted(tokens: int, *without: str) -> tuple[Program, list[int]]:
    """Two layers of a dense model, and the bytes of each kernel as its instructions ask for them."""
    ppu = find_ppu("zhenwu-810e").at()
    config, _ = find_model("Qwen/Qwen3-0.6B")
    lowered = compile_step(config, ppu, tokens=tokens, layers=2, fusions=Fusions.without(*without))
    result = simulate(lowered.program, ppu, {"position": [0]})
    return lowered.program, result.counters[:, COUNTERS.index("l2_bytes")].tolist()


@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("without", [(), *((name,) for name in FUSIONS), ("all",)])
def test_predicted_bytes_are_the_counted_ones(tokens: int, without: tuple[str, ...]) -> None:
    program, bytes_ = counted(tokens, *without)
    for kernel, count in zip(program.kernels, bytes_, strict=True):
        if kernel.kind in RUNTIME:
            assert not kernel.moves
        else:
            assert sum(kernel.moves.values()) == count, kernel.name
    fused, fewer = counted(tokens)
    assert saving(fused, program).bytes == sum(bytes_) - sum(fewer)


@pytest.mark.parametrize("dtype", WAYS)
@pytest.mark.parametrize("tokens", [1, 300])
def test_predicted_bytes_of_few_bits_are_the_counted_ones(tokens: int, dtype: str) -> None:
    ppu = find_ppu("h100").at()
    config, _ = find_model("Qwen/Qwen3-0.6B")
    program = compile_step(config, ppu, tokens=tokens, layers=2, dtype=dtype).program
    result = simulate(program, ppu, {"position": [0]})
    bytes_ = result.counters[:, COUNTERS.index("l2_bytes")].tolist()
    for kernel, count in zip(program.kernels, bytes_, strict=True):
        assert kernel.kind in RUNTIME or sum(kernel.moves.values()) == count, kernel.name
    rate = DType.INT8 if dtype == "int8" else DType.FP8
    assert set(result.rates) == {rate, DType.BF16}


@pytest.mark.parametrize("name", FUSIONS)
def test_a_fusion_saves_bytes_of_a_prompt(name: str) -> None:
    (fused, _), (other, _) = counted(300), counted(300, name)
    assert saving(fused, other).bytes > 0
    assert saving(fused, other).between > 0


def test_a_rotation_spares_the_normed_heads() -> None:
    """tokens · heads · width, written by the norm and read by the rotation."""
    (fused, _), (other, _) = counted(300), counted(300, "rotate")
    queries, keys, layers = 16 * 128, 8 * 128, 2
    assert saving(fused, other).between == layers * 300 * (queries + keys) * 2 * 2


@pytest.mark.parametrize("m", [1, 16, 100, 512, 4096])
def test_a_gated_product_never_moves_more_than_its_parts(m: int) -> None:
    ppu = find_ppu("zhenwu-810e").at()
    for n, k in ((3072, 1024), (12288, 4096), (96, 64)):
        alone, both = Matmul(m=m, n=n, k=k), Matmul(m=m, n=n, k=k, gate=True)
        parts = 2 * sum(traffic(alone, mapped(alone, ppu), ppu.cores)) + 3 * m * n * 2
        assert sum(traffic(both, mapped(both, ppu), ppu.cores)) <= parts


def test_an_access_is_read_in_lines() -> None:
    assert fetched(3, 10, 10) == 64
    assert fetched(3, 10, 20) == 192
    assert fetched(3, 100, 0) == 128
    assert fetched(0, 100, 100) == 0
    b = Builder(find_ppu("zhenwu-810e").at())
    tensor = b.layout.place("x", (4, 4), Type.BF16, "input")
    with b.kernel("one", "one"):
        b.moves(tensor, 64)
        b.moves(tensor, 64)
    assert b.program().kernels[0].moves == {"x": 128}
