"""The analytic price of a lowered program: near the simulated time, counted alike, and monotone like it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from tongyun.chip.ppu.analytic import analyse
from tongyun.chip.ppu.emit.builder import Builder
from tongyun.chip.ppu.emit.matmul import matmul
from tongyun.chip.ppu.isa import Type
from tongyun.chip.ppu.program import Program
from tongyun.chip.ppu.timing import simulate
from tongyun.errors import InputError
from tongyun.specs import Ppu, find_ppu

PPU = find_ppu("zhenwu-810e").at()
SHAPES = [(1, 512, 256), (16, 4096, 4096), (200, 1000, 600), (1024, 2048, 1024), (2048, 1024, 4096)]


@pytest.fixture(scope="module")
def pairs():
    """40 programs of all kinds: (drawn, analytic, simulated)."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        from ppu_programs import draw
    finally:
        sys.path.pop(0)
    found = list(draw(seed=7, count=40))
    return [
        (each, analyse(each.program, each.ppu, each.symbols), simulate(each.program, each.ppu, each.symbols))
        for each in found
    ]


def product(m: int, n: int, k: int, ppu: Ppu = PPU) -> Program:
    b = Builder(ppu)
    a = b.layout.place("a", (m, k), Type.BF16, "input")
    w = b.layout.place("w", (n, k), Type.BF16, "weight")
    out = b.layout.place("out", (m, n), Type.BF16, "output")
    with b.kernel("matmul", "product"):
        matmul(b, a, w, out)
    return b.program()


def test_the_price_is_near_the_simulated_time(pairs):
    ours = np.array([price.seconds for _, price, _ in pairs])
    simulated = np.array([timing.seconds for _, _, timing in pairs])
    away = np.abs(ours / simulated - 1)
    assert away.mean() <= 0.03
    assert np.percentile(away, 95) <= 0.08
    assert away.max() <= 0.15
    assert np.corrcoef(ours.argsort().argsort(), simulated.argsort().argsort())[0, 1] >= 0.98


@pytest.mark.parametrize("counter", ["flops", "l2_bytes", "sram_bytes", "vector_elements", "icn_bytes"])
def test_the_price_counts_what_the_simulator_counts(pairs, counter):
    for each, price, timing in pairs:
        assert price.total(counter) == pytest.approx(timing.total(counter), rel=1e-9), each.what


def test_the_price_finds_in_the_l2_what_the_simulator_finds(pairs):
    bytes_ = np.array([[found.total("hbm_bytes") for found in both] for _, *both in pairs])
    assert np.median(np.abs(bytes_[:, 0] / bytes_[:, 1] - 1)) <= 0.002


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("field", ["hbm_bytes_per_s", "clock_hz", "port_bytes", "l2_rate", "vector_lanes"])
def test_more_is_never_slower(shape, field):
    program = product(*shape)
    before = analyse(program, PPU).seconds
    for factor in (1.1, 1.5, 3.0):
        more = dataclasses.replace(PPU, **{field: getattr(PPU, field) * factor})
        assert analyse(program, more).seconds <= before * 1.01


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_faster_than_its_roofline(shape):
    m, n, k = shape
    price = analyse(product(m, n, k), PPU)
    assert price.seconds >= 2 * m * n * k / PPU.peak_flops_per_s()
    assert price.seconds >= price.total("hbm_bytes") / PPU.hbm_bytes_per_s


def test_a_number_that_is_not_given_is_named(pairs):
    each = next(each for each, *_ in pairs if "position" in each.program.symbols)
    with pytest.raises(InputError, match="position"):
        analyse(each.program, each.ppu)
