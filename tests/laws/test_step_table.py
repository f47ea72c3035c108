"""The table of steps says what the price door says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tongyun.cloud.engine.simulated import LeapingExecutor, SimulatedExecutor, StepLoad
from tongyun.cloud.engine.step_table import CHUNK_GRAIN, GRAIN, StepTable
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.scheduler import SchedulerConfig
from tongyun.cloud.simulate import simulate
from tongyun.cost import step_cost
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision, StepShape
from tongyun.model.shard import Shard
from tongyun.specs import find_chip, find_model

CASES = {
    "dense": ("Qwen/Qwen3-8B", "a100", Shard()),
    "dense, cut": ("Qwen/Qwen3-32B", "h200", Shard(tp=4)),
    "sparse": ("Qwen/Qwen3-30B-A3B", "h20", Shard(tp=2, ep=2)),
    "windowed": ("openai/gpt-oss-20b", "h100", Shard()),
    "latent": ("deepseek-ai/DeepSeek-V3", "h200", Shard(ep=8, dp=8)),
    "on the PPU": ("Qwen/Qwen3-8B", "zhenwu-810e", Shard()),
}

pieces = st.lists(
    st.one_of(
        st.tuples(st.just(1), st.integers(0, 400).map(lambda i: i * GRAIN)),
        st.tuples(st.integers(2, 700), st.integers(0, 50).map(lambda i: i * CHUNK_GRAIN)),
    ),
    min_size=1,
    max_size=6,
)


def _table(case: str) -> tuple[StepTable, ModelConfig]:
    name, chip, shard = CASES[case]
    raw, found = find_model(name)
    config = ModelConfig.from_hf(raw, name=found, file=name)
    return StepTable(config, find_chip(chip).at(), Precision(), shard, max_step_tokens=2048), config


@pytest.fixture(scope="module", params=list(CASES))
def priced(request: pytest.FixtureRequest) -> tuple[StepTable, ModelConfig, str]:
    return *_table(request.param), request.param


@given(batch=pieces, samples=st.integers(1, 6))
def test_a_step_costs_what_the_price_door_says(
    priced: tuple[StepTable, ModelConfig, str], batch: list[tuple[int, int]], samples: int
) -> None:
    table, config, case = priced
    contexts = {context for new, context in batch if new == 1}
    # Decoding sequences are priced at their mean context; with one context nothing is rounded.
    batch = [(new, context if new > 1 else max(contexts)) for new, context in batch]
    _, chip, shard = CASES[case]
    samples = min(samples, len(batch))
    load = StepLoad(
        new_tokens=np.array([new for new, _ in batch]),
        context=np.array([context for _, context in batch]),
        samples=samples,
    )
    shape = StepShape.ragged(batch, sampled=samples)
    expected = step_cost(config, shape, find_chip(chip).at(), shard, Precision())
    cost = table(load)
    assert cost.seconds == pytest.approx(float(expected.seconds), rel=1e-9)
    assert cost.joules == pytest.approx(float(expected.joules), rel=1e-9)


@given(sequences=st.integers(1, 64), context=st.integers(0, 5000))
def test_many_steps_are_priced_as_each_alone(
    priced: tuple[StepTable, ModelConfig, str], sequences: int, context: int
) -> None:
    table, _, _ = priced
    ahead, joules = table.decode(sequences, sequences * context + sequences * np.arange(20))
    for k in (0, 7, 19):
        contexts = np.full(sequences, context + k)
        load = StepLoad(new_tokens=np.ones(sequences, dtype=np.int64), context=contexts, samples=sequences)
        assert table(load).seconds == ahead[k]
        assert table(load).joules == joules[k]


def test_a_simulation_by_leaps_is_priced_as_the_one_by_steps(
    priced: tuple[StepTable, ModelConfig, str],
) -> None:
    """Steps with prompts in them, told by their sums, cost what their pieces do, to the last bit."""
    table, _, _ = priced
    rng = np.random.default_rng(5)
    load = [
        Request(
            id=f"r{i}",
            prompt=tuple(range(int(rng.integers(1, 900)))),
            output_tokens=int(rng.integers(1, 80)),
            arrival_s=moment_s,
        )
        for i, moment_s in enumerate(np.cumsum(rng.exponential(0.05, 40)).tolist())
    ]
    config = SchedulerConfig(
        blocks=300, block_tokens=16, max_context_tokens=2000, max_sequences=12, max_step_tokens=200
    )
    by_leaps, by_steps = LeapingExecutor(table), SimulatedExecutor(table)
    assert simulate(load, config, by_leaps) == simulate(load, config, by_steps)
    assert by_leaps.joules == by_steps.joules
