"""The planner's operators and the lowered program are one step: counted alike, priced within a band."""

from __future__ import annotations

from functools import cache

import pytest

from tongyun.chip.ppu.beside import Work, beside, stated, whole
from tongyun.chip.ppu.capture import compile_step
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Sequences, StepShape
from tongyun.model.shard import Shard
from tongyun.model.steps import step
from tongyun.specs import find_chip, find_model, find_ppu, names

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
    """0.6 to 1.3 where both are fitted to silicon; 1 to 2 on the 810E, where what products reach and how many
    cores there are is assumed, and by each side on its own."""
    found = whole(works(*case))
    ratio = found.planner_s / found.analytic_s
    low, high = (1.0, 2.0) if case[1] == "zhenwu-810e" else (0.6, 1.3)
    assert low <= ratio <= high


@pytest.mark.parametrize("name", names("ppus"))
def test_a_chip_and_its_inside_state_the_same_facts(name: str) -> None:
    facts = list(stated(find_chip(name).at(), find_ppu(name).at()))
    assert len(facts) >= 7
    assert [fact.name for fact in facts if not fact.is_same] == []
