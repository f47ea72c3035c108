"""A priced replica from the catalogue: workload, model and chip by name, end to end."""

import pytest

from tongyun.cloud.engine.priced import priced
from tongyun.cloud.engine.simulated import SimulatedExecutor
from tongyun.cloud.latency import summarise
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.scheduler import SchedulerConfig
from tongyun.cloud.simulate import simulate
from tongyun.cloud.workload import Process, Workload, requests, sample
from tongyun.cost import step_cost
from tongyun.errors import InputError
from tongyun.model.config import ModelConfig
from tongyun.model.graph import StepShape
from tongyun.model.shard import Shard
from tongyun.specs.find import every, find_chip, find_model, find_workload

LIMITS = SchedulerConfig(blocks=8192, max_context_tokens=32_768, max_step_tokens=512)


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    raw, name = find_model("Qwen/Qwen3-0.6B")
    return ModelConfig.from_hf(raw, name=name)


def test_one_request_takes_what_its_steps_cost(model):
    chip = find_chip("h200").at()
    one = Request(id="r", prompt=tuple(range(700)), output_tokens=3)
    run = simulate([one], LIMITS, SimulatedExecutor(priced(model, chip)))

    def seconds(new: int, cached: int, sampled: int) -> float:
        return float(step_cost(model, StepShape.ragged([(new, cached)], sampled=sampled), chip).seconds)

    first = seconds(512, 0, 0) + seconds(188, 512, 1)
    assert run.records[0].ttft_s == pytest.approx(first)
    last = first + seconds(1, 700, 1) + seconds(1, 701, 1)
    assert run.records[0].latency_s == pytest.approx(last)


def test_a_catalogue_workload_on_a_catalogue_chip(model):
    load = Workload.from_spec(find_workload("smoke"))
    drawn = list(requests(sample(load), vocabulary=1000))
    run = simulate(drawn, LIMITS, SimulatedExecutor(priced(model, find_chip("h200").at())))
    report = summarise(run.records)
    assert report.succeeded == len(drawn) == load.requests
    assert report.output_tokens == sum(one.output_tokens for one in drawn)
    assert report.cached_tokens == run.stats.prefix_hit_tokens > 0
    assert run.stats.kv_blocks_used == 0
    # The chip is far from full: requests leave as fast as they come.
    assert report.requests_per_s == pytest.approx(len(drawn) / drawn[-1].arrival_s, rel=0.05)


def test_every_catalogue_workload_can_be_drawn():
    for spec in every("workloads"):
        drawn = sample(Workload.from_spec(spec))
        assert len(drawn) == spec.requests
        prompts = [arrival.prompt_tokens for arrival in drawn]
        if spec.input.distribution == "uniform":
            assert spec.input.mean.low <= min(prompts) <= max(prompts) <= spec.input.mean.high
        elif spec.input.variation is None:
            assert set(prompts) == {round(spec.input.mean.value)}
        else:
            # Five standard errors of the mean.
            error = 5 * spec.input.variation.value / spec.requests**0.5
            assert sum(prompts) / len(prompts) == pytest.approx(spec.input.mean.value, rel=error)


def test_a_closed_workload_has_users_instead_of_a_rate():
    arrivals = Workload.from_spec(find_workload("offline")).arrivals
    assert arrivals.process is Process.CLOSED
    assert arrivals.users == 64 and arrivals.rate_per_s is None


@pytest.mark.parametrize("shard", [Shard(pp=2), Shard(dp=2, tp=2)])
def test_a_cut_with_several_batches_at_once_is_refused(model, shard):
    with pytest.raises(InputError, match="pp and dp must be 1"):
        priced(model, find_chip("h200").at(), shard)
