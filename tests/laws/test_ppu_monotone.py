"""A better chip runs the same program in no more time, by not one tick, kernel for kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from tongyun.chip.ppu.capture import compile_step
from tongyun.chip.ppu.cores import quickest
from tongyun.chip.ppu.emit import rows
from tongyun.chip.ppu.emit.builder import Builder
from tongyun.chip.ppu.emit.matmul import matmul
from tongyun.chip.ppu.energy import energy
from tongyun.chip.ppu.isa import Type
from tongyun.chip.ppu.program import Program
from tongyun.chip.ppu.timing import Timing, simulate, simulate_repeated
from tongyun.errors import InputError
from tongyun.specs import Ppu, find_model, find_ppu

CHIPS = ("zhenwu-810e", "a100", "h100")
MORE = (
    "clock_hz", "hbm_bytes_per_s", "l2_rate", "port_bytes", "vector_lanes", "special_lanes", "softmax_lanes",
    "icn_bytes_per_s", "tensor_flops",
)  # fmt: skip
LESS = (
    "hbm_latency_s", "l2_latency_s", "tensor_latency_s", "vector_latency_s", "barrier_s", "icn_latency_s",
)  # fmt: skip
Run = tuple[Program, Mapping[str, ArrayLike]]


def better(ppu: Ppu, field: str, factor: float) -> Ppu:
    """The chip with one figure better by a factor of at least one."""
    value: Any = getattr(ppu, field)
    if isinstance(value, Mapping):
        return dataclasses.replace(ppu, **{field: {key: each * factor for key, each in value.items()}})
    new = value * factor if field in MORE else value / factor
    return dataclasses.replace(ppu, **{field: type(value)(new)})


def places(b: Builder, **shapes: tuple[int, ...]) -> list[Any]:
    return [b.layout.place(name, shape, Type.BF16, "input") for name, shape in shapes.items()]


@lru_cache(maxsize=256)
def chain(ppu: Ppu, m: int, n: int, k: int) -> Run:
    """A norm, a product of it and one behind, so that a kernel finds what another left in the L2."""
    b = Builder(ppu)
    x, normed, w, made = places(b, x=(m, k), normed=(m, k), w=(n, k), made=(m, n))
    down, out, gain = places(b, down=(k, n), out=(m, k), gain=(k,))
    with b.kernel("rmsnorm", "norm"):
        rows.rmsnorm(b, rows.Rows.of(x), gain, rows.Rows.of(normed), 1e-6)
    with b.kernel("matmul", "up"):
        matmul(b, normed, w, made)
    with b.kernel("matmul", "down"):
        matmul(b, made, down, out, residual=x)
    return b.program(), {}


@lru_cache
def step(
    model: str, tokens: int, context: int, chips: int, layers: int = 2, cores: int = 72, *, idle: bool = False
) -> Run:
    """A step of a small model, with experts of uneven rows where it has any."""
    config, _ = find_model(model)
    small = {
        "hidden_size": 512, "intermediate_size": 768, "vocab_size": 2000, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64,
    }  # fmt: skip
    symbols: dict[str, ArrayLike] = {"position": [context]}
    if "num_experts" in config:
        small |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192}
        ends = np.sort(np.random.default_rng(tokens).integers(0, 2 * tokens + 1, 7))
        symbols["expert_offset"] = [0, *ends.tolist(), 2 * tokens]
    ppu = dataclasses.replace(find_ppu("zhenwu-810e").at(), cores=cores)
    lowered = compile_step(
        {**config, **small}, ppu, tokens=tokens, context=context, layers=layers, chips=chips,
        symbols=symbols if idle else None,
    )  # fmt: skip
    return lowered.program, symbols


def never_slower(before: Timing, after: Timing) -> None:
    assert (after.ticks <= before.ticks).all()
    assert after.seconds <= before.seconds


factors = st.one_of(st.floats(1, 1.01), st.floats(1, 5))
sizes = st.integers(1, 1500)


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(CHIPS), st.sampled_from(["slow", "nominal", "fast"]), sizes, sizes, sizes,
    st.lists(st.tuples(st.sampled_from(MORE + LESS), factors), min_size=1, max_size=4),
)  # fmt: skip
def test_a_better_chip_is_never_slower(
    chip: str, corner: str, m: int, n: int, k: int, changes: list[tuple[str, float]]
) -> None:
    """Change by change, from the chip that the program was compiled for and from those after it."""
    ppu = find_ppu(chip).at(corner)
    program, symbols = chain(ppu, m, n, 16 * k if m < 100 else k)
    before = simulate(program, ppu, symbols)
    for field, factor in changes:
        ppu = better(ppu, field, factor)
        after = simulate(program, ppu, symbols)
        never_slower(before, after)
        before = after


@pytest.mark.parametrize("model", ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-30B-A3B"])
@pytest.mark.parametrize(("tokens", "context", "chips"), [(70, 0, 1), (1, 300, 1), (40, 0, 2)])
@settings(max_examples=15, deadline=None)
@given(field=st.sampled_from(MORE + LESS), factor=factors, worse=st.floats(1, 4))
def test_a_model_s_step_is_never_slower_on_a_better_chip(
    model: str, tokens: int, context: int, chips: int, field: str, factor: float, worse: float
) -> None:
    """Also where the chip is another than the one compiled for, alone or joined to others."""
    program, symbols = step(model, tokens, context, chips)
    ppu = find_ppu("zhenwu-810e").at()
    ppu = dataclasses.replace(ppu, hbm_bytes_per_s=ppu.hbm_bytes_per_s / worse, clock_hz=ppu.clock_hz * worse)
    before, after = (simulate(program, each, symbols) for each in (ppu, better(ppu, field, factor)))
    never_slower(before, after)
    spec = find_ppu("zhenwu-810e")
    assert energy(after, spec).seconds <= energy(before, spec).seconds
    assert (before.counters[:, :6] == after.counters[:, :6]).all()


def test_repeated_layers_are_never_slower_on_a_better_chip() -> None:
    program, symbols = step("Qwen/Qwen3-30B-A3B", 40, 0, 1, 8)
    ppu = find_ppu("zhenwu-810e").at()
    before = simulate_repeated(program, ppu, symbols)
    for field in MORE:
        never_slower(before, simulate_repeated(program, better(ppu, field, 1.3), symbols))


def product(ppu: Ppu, m: int, n: int, k: int) -> Program:
    b = Builder(ppu)
    a, w, out = places(b, a=(m, k), w=(n, k), out=(m, n))
    with b.kernel("matmul", "product"):
        matmul(b, a, w, out)
    return b.program()


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("shape", [(1, 512, 256), (16, 2048, 1024), (1024, 2048, 512), (4096, 1024, 256)])
def test_compiled_for_more_cores_with_some_left_idle_is_never_slower(
    chip: str, shape: tuple[int, int, int]
) -> None:
    ppu = find_ppu(chip).at()
    made: dict[int, Program] = {}

    def compiled(on: Ppu) -> Program:
        if on.cores not in made:
            made[on.cores] = product(on, *shape)
        return made[on.cores]

    before, alone = float("inf"), []
    for cores in range(1, 80, 3):
        larger = dataclasses.replace(ppu, cores=cores)
        best = quickest(compiled, larger, {})
        after = simulate(compiled(dataclasses.replace(ppu, cores=best)), larger).seconds
        assert best <= cores
        assert after <= before
        alone.append(simulate(compiled(larger), larger).seconds)
        assert after <= min(alone)
        before = after
    assert before < alone[0]


def test_a_step_compiled_with_idle_cores_is_never_slower_than_on_all() -> None:
    ppu = dataclasses.replace(find_ppu("zhenwu-810e").at(), cores=6)
    program, symbols = step("Qwen/Qwen3-0.6B", 20, 0, 1, 1, 6)
    idle, _ = step("Qwen/Qwen3-0.6B", 20, 0, 1, 1, 6, idle=True)
    assert 1 <= idle.order[0] <= 6
    assert simulate(idle, ppu, symbols).seconds <= simulate(program, ppu, symbols).seconds


@pytest.mark.parametrize("chip", CHIPS)
def test_the_same_program_takes_no_longer_on_a_chip_of_more_cores(chip: str) -> None:
    ppu = find_ppu(chip).at()
    program, symbols = chain(ppu, 300, 700, 500)
    before = simulate(program, ppu, symbols)
    for more in (1, 7, ppu.cores, 4096 - ppu.cores):
        larger = dataclasses.replace(ppu, cores=ppu.cores + more)
        assert simulate(program, larger, symbols).seconds == before.seconds
        never_slower(before, simulate(program, better(larger, "l2_rate", 1.1), symbols))
    with pytest.raises(InputError, match=f"the program is for {ppu.cores} cores, {chip} has 8: compile it"):
        simulate(program, dataclasses.replace(ppu, cores=8), symbols)


def test_the_order_is_kept_with_the_program(tmp_path: Any) -> None:
    ppu = find_ppu("zhenwu-810e").at()
    program, symbols = chain(ppu, 300, 700, 500)
    program.save(tmp_path / "a.ppu")
    other = better(ppu, "hbm_bytes_per_s", 2)
    loaded = Program.load(tmp_path / "a.ppu")
    assert loaded.order == program.order
    assert (simulate(loaded, other, symbols).ticks == simulate(program, other, symbols).ticks).all()
