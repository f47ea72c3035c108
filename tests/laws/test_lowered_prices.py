"""The planner's price of a step under `--kernels lowered` is that of the program that the compiler makes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tongyun.chip.kernels import kernels
from tongyun.chip.ppu.analytic import analyse
from tongyun.chip.ppu.capture import compile_step
from tongyun.chip.ppu.isa import BY_NAME
from tongyun.chip.ppu.operators import Programs, filled, form_of
from tongyun.chip.ppu.pieces import Piece, written
from tongyun.chip.ppu.prices import Prices
from tongyun.chip.ppu.program import Program
from tongyun.chip.ppu.timing import _bare, simulate
from tongyun.chip.silicon import inside_of
from tongyun.cost import StepPrices, step_cost
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Operator, Precision, Sequences, StepShape
from tongyun.model.shard import Shard
from tongyun.model.steps import step
from tongyun.specs import find_chip, find_model
from tongyun.units import Source

# Model, chip, new tokens, context, chips: sizes that programs are compiled for.
STEPS = [
    ("Qwen/Qwen3-0.6B", "zhenwu-810e", 1, 1024, 1),
    ("Qwen/Qwen3-0.6B", "zhenwu-810e", 512, 0, 1),
    ("Qwen/Qwen3-8B", "zhenwu-810e", 512, 512, 2),
    ("Qwen/Qwen3-30B-A3B", "zhenwu-810e", 256, 0, 2),
]
UNLOWERED = {"sample", "logits_gather", "embed_sum"}


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.cache_clear()


@cache
def program(model: str, chip: str, tokens: int, context: int, chips: int) -> Program:
    raw, _ = find_model(model)
    ppu = inside_of(find_chip(chip).at())
    config = {**raw, "num_hidden_layers": 1}
    return compile_step(config, ppu, tokens=tokens, context=context, chips=chips).program


def operators(model: str, tokens: int, context: int, chips: int) -> tuple[Operator, ...]:
    raw, name = find_model(model)
    rows = Sequences(new=tokens, context=context)
    shape = StepShape(decode=rows, sampled=1) if tokens == 1 else StepShape(prefill=rows, sampled=tokens)
    config = ModelConfig.from_hf({**raw, "num_hidden_layers": 1}, name=name)
    return step(config, shape, Shard(tp=chips))


def symbols(model: str, tokens: int, context: int) -> dict[str, object]:
    raw, _ = find_model(model)
    found: dict[str, object] = {"position": [context]}
    if "num_experts" in raw:
        pairs, experts = tokens * raw["num_experts_per_tok"], raw["num_experts"]
        found["expert_offset"] = np.arange(experts + 1) * pairs // experts
    return found


def pieces(ops: tuple[Operator, ...]) -> list[Piece]:
    found = []
    for op in ops:
        form = form_of(op)
        if form is None:
            assert op.name in UNLOWERED
            continue
        counts, made = form
        found += made(tuple(int(filled(count)) for count in counts))
    return found


def bodies(given: Program) -> list[bytes]:
    """Kernels' words without the places of tensors and the numbers of symbols, which are a program's own."""
    borders = np.flatnonzero((given.words[:, 0] & 0xFF) == (given.words[0, 0] & 0xFF))
    bare = _bare(given.words, borders)
    ends = [*borders[1:], len(bare) - 1]
    lds = BY_NAME["LDS"]
    bare[(bare[:, 0] & 0xFF) == lds.code, lds.slot["symbol"]] = 0
    return [bare[a:b].tobytes() for a, b in zip(borders, ends, strict=True)]


@pytest.mark.parametrize("case", STEPS)
def test_what_is_priced_are_the_compilers_own_words(case: tuple[str, str, int, int, int]) -> None:
    """Kernel by kernel, instruction by instruction; only the angles of the step are in no operator."""
    model, chip, tokens, context, chips = case
    compiled = program(*case)
    ppu = inside_of(find_chip(chip).at())
    left = bodies(compiled)
    kinds = [kernel.kind for kernel in compiled.kernels]
    for piece in pieces(operators(model, tokens, context, chips)):
        (body,) = bodies(written(piece, ppu)[0])
        assert body in left, piece
        place = left.index(body)
        del left[place], kinds[place]
    assert kinds == ["angles"]


@pytest.mark.parametrize("case", STEPS)
def test_a_steps_price_is_that_of_its_program(case: tuple[str, str, int, int, int]) -> None:
    """Within 3 % of the whole program's analytic price, and of its simulation: a kernel alone finds nothing
    in the L2 that the one before it left there."""
    model, chip, tokens, context, chips = case
    asked = replace(find_chip(chip).at(), is_lowered=True)
    ppu, compiled, read = inside_of(asked), program(*case), symbols(model, tokens, context)
    priced = kernels(asked)
    assert priced is not None
    ours = sum(sum(priced.parts_s(op)) for op in operators(model, tokens, context, chips) if form_of(op))
    angles = [kernel.kind for kernel in compiled.kernels].index("angles")
    for timing in (analyse(compiled, ppu, read), simulate(compiled, ppu, read)):
        whole = timing.seconds - timing.ticks[angles] / 1e14
        assert ours == pytest.approx(whole, rel=0.03)


def test_a_cost_names_the_figures_of_the_inside() -> None:
    raw, name = find_model("Qwen/Qwen3-0.6B")
    config = ModelConfig.from_hf(raw, name=name)
    chip = replace(find_chip("zhenwu-810e").at(), is_lowered=True)
    shape = StepShape.decoding(np.array([1.0, 7.0, 100.0]), 600)
    grid = step_cost(config, shape, chip)
    assert {Source.ANALYTIC, Source.ASSUMED} <= grid.sources
    prices = StepPrices(config, shape, chip, Precision())
    assert np.asarray(prices.at(Shard(), 0).seconds) == pytest.approx(np.asarray(grid.seconds))
    for place, batch in enumerate((1, 7, 100)):
        alone = step_cost(config, StepShape.decoding(batch, 600), chip)
        assert float(alone.seconds) == pytest.approx(float(np.asarray(grid.seconds)[place]))


def test_few_bits_windows_and_latents_fall_back_to_the_models() -> None:
    plain, asked = (replace(find_chip("h100").at(), is_lowered=each) for each in (False, True))
    models, lowered = kernels(plain), kernels(asked)
    assert models is not None
    assert lowered is not None
    for model, dtype in (("deepseek-ai/DeepSeek-V3", "fp8"), ("Qwen/Qwen3-8B", "fp8")):
        raw, name = find_model(model)
        config = ModelConfig.from_hf(raw, name=name)
        for op in step(config, StepShape.decoding(8, 500), Shard(tp=8), Precision.of(dtype)):
            if not lowered.is_lowered(op):
                assert lowered.parts_s(op) == models.parts_s(op)
            else:
                assert op.compute == "bf16"


def test_a_price_is_kept_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ppu = inside_of(find_chip("zhenwu-810e").at())
    piece = Piece("product", (16, 512, 256, 0, 0, 0, 0))
    first = Prices(ppu)
    seconds = first.seconds(piece)
    first.close()
    monkeypatch.setattr("tongyun.chip.ppu.prices.written", None)
    assert Prices(ppu).seconds(piece) == seconds
    assert Programs(ppu).ppu == ppu


@pytest.mark.parametrize("place", ["prices.prices_path(ppu)", "cached.program_path({}, ppu)"])
def test_another_process_finds_what_was_kept(place: str) -> None:
    """Whatever order its sets are written in."""
    module = place.split(".", maxsplit=1)[0]
    code = (
        f"from tongyun.chip.ppu import {module}; from tongyun.specs import find_ppu; "
        f"ppu = find_ppu('zhenwu-810e').at(); print({place})"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
            capture_output=True, text=True,
        ).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(found) == 1


def test_sizes_are_filled_up_by_at_most_a_sixteenth() -> None:
    counts = np.arange(1, 20_000)
    sizes = filled(counts)
    assert (sizes >= counts).all()
    assert (sizes <= counts * (1 + 1 / 16)).all()
    assert (filled(sizes) == sizes).all()
    assert len(np.unique(sizes)) < 200
