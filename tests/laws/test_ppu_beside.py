"""The planner's operators and the lowered program are one step: counted alike, priced within a band."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from tongyun.chip.ppu.beside import Work, beside, reached, stated, whole
from tongyun.chip.ppu.capture import compile_step
from tongyun.chip.silicon import silicon_of
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Sequences, StepShape
from tongyun.model.shard import Shard
from tongyun.model.steps import step
from tongyun.specs import Corner, find_chip, find_model, find_ppu, names
from tongyun.units import DType

LAYERS = 4
STEPS = [
    ("Qwen/Qwen3-0.6B", "zhenwu-810e", 1, 1024, 1),
    ("Qwen/Qwen3-0.6B", "zhenwu-810e", 512, 0, 1),
    ("Qwen/Qwen3-0.6B", "a100", 1, 1024, 1),
    ("Qwen/Qwen3-0.6B", "a100", 512, 0, 1),
    ("Qwen/Qwen3-8B", "zhenwu-810e", 512, 512, 2),
    ("Qwen/Qwen3-8B", "h100", 1, 4096, 1),
    ("Qwen/Qwen3-30B-A3B", "zhenwu-810e", 256, 0, 1),
    ("Qwen/Qwen3-30B-A3B", "h100", 256, 0, 2),
]


@cache
def works(model: str, chip: str, tokens: int, context: int, chips: int) -> tuple[Work, ...]:
    raw, name = find_model(model)
    config = {**raw, "num_hidden_layers": LAYERS}
    ppu = find_ppu(chip).at()
    program = compile_step(config, ppu, tokens=tokens, context=context, chips=chips).program
    rows = Sequences(new=tokens, context=context)
    shape = StepShape(decode=rows, sampled=1) if tokens == 1 else StepShape(prefill=rows, sampled=tokens)
    operators = step(ModelConfig.from_hf(config, name=name), shape, Shard(tp=chips))
    symbols = {"position": [context]}
    if "num_experts" in config:
        pairs, experts = tokens * config["num_experts_per_tok"], config["num_experts"]
        symbols["expert_offset"] = [number * pairs // experts for number in range(experts + 1)]
    return beside(operators, find_chip(chip).at(), program, ppu, symbols)


@pytest.mark.parametrize("case", STEPS)
def test_flops_and_weights_are_equal_work_by_work(case: tuple[str, str, int, int, int]) -> None:
    for work in works(*case):
        assert work.planner_flops == work.program_flops, work.name
        if work.name == "embedding":
            # The planner cuts the table over the chips, the program has it on each.
            assert work.planner_weight_bytes * case[-1] == work.program_weight_bytes
        else:
            assert work.planner_weight_bytes == work.program_weight_bytes, work.name


@pytest.mark.parametrize("case", STEPS)
def test_the_price_of_a_step_is_near_the_programs(case: tuple[str, str, int, int, int]) -> None:
    """0.6 to 1.3 where each is fitted to silicon with the rest of its own model; 0.9 to 1.2 on the 810E,
    where both take the same assumed figures."""
    found = whole(works(*case))
    ratio = found.planner_s / found.analytic_s
    low, high = (0.9, 1.2) if case[1] == "zhenwu-810e" else (0.6, 1.3)
    assert low <= ratio <= high


@pytest.mark.parametrize("name", names("ppus"))
def test_a_chip_and_its_inside_state_the_same_facts(name: str) -> None:
    facts = list(stated(find_chip(name).at(), find_ppu(name).at()))
    assert len(facts) >= 7
    assert [fact.name for fact in facts if not fact.is_same] == []


def test_what_nobody_published_of_the_810e_is_assumed_once() -> None:
    """Both sides reach the same: of memory at every corner, of cores in the middle, where their number times
    the clock is the peak that the chip's file states."""
    chip, inside = find_chip("zhenwu-810e"), find_ppu("zhenwu-810e")
    assert all(fact.is_same for fact in reached(chip.at(), inside.at()))
    for corner in Corner:
        known = {fact.name: fact.is_same for fact in reached(chip.at(corner), inside.at(corner))}
        assert known["memory reaches"]
    pairs = {
        "shared.hbm": chip.memory.capacity,
        "shared.hbm_bandwidth": chip.memory.bandwidth,
        "shared.hbm_achieved": chip.memory.achieved,
        "shared.barrier": chip.overhead.kernel_launch,
        "core.tensor_achieved": chip.matmul.achieved[DType.BF16],
        "icn.achieved": chip.scale_up.achieved,
        "icn.latency": chip.scale_up.latency,
        "energy.static": chip.power.idle,
        "energy.limit": chip.power.tdp,
    }
    figures = dict(inside.figures())
    assert {key: figures[key] for key in pairs} == pairs


def test_another_inside_is_another_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner's cores are the inside's: a core that takes in half as much makes products no quicker."""
    chip = find_chip("zhenwu-810e").at()
    whole_port = silicon_of(chip)
    spec = find_ppu("zhenwu-810e")
    half = replace(spec, core=replace(spec.core, port=replace(spec.core.port, value=32.0, low=16.0)))
    monkeypatch.setattr("tongyun.chip.silicon.find_ppu", lambda _: half)
    assert silicon_of(chip).core_load_bytes_per_s == whole_port.core_load_bytes_per_s * 32 / (3072 / 72)
