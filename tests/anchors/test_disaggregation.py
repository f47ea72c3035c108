"""Prefill and decode apart: better for some loads and worse for others, as published.

DistServe (Zhong et al., OSDI 2024) and Splitwise (Patel et al., ISCA 2024): long prompts beside
decoding stretch the time between tokens, and pools of their own take that away; where decoding
is all the work, chips kept for prefill are missed. Assumed here: Qwen3-32B in bf16 on eight
H200, four replicas of two, equal requests, keys and values sent once a prompt is computed.
"""

from __future__ import annotations

import pytest

from tongyun.cloud.latency import Slo
from tongyun.cloud.sched.router import find_router
from tongyun.cloud.workload import Arrivals, Lengths, Process, Workload, sample
from tongyun.codesign.fleet import Fleet, Played
from tongyun.codesign.plan import Plan
from tongyun.codesign.replicas import pools_of
from tongyun.codesign.space import Question
from tongyun.errors import InputError
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision
from tongyun.model.shard import Shard
from tongyun.specs import find_chip, find_model


def played(prefill: int, *, rate: float, isl: int, osl: int, slo: Slo) -> Played:
    raw, name = find_model("Qwen/Qwen3-32B")
    chip = find_chip("h200")
    question = Question(
        model=ModelConfig.from_hf(raw, name=name),
        chip=chip,
        chips=8,
        isl=isl,
        osl=osl,
        precision=Precision.of("bf16", None),
    )
    plan = Plan(shard=Shard(tp=2), batch=128, step_tokens=2048, replicas=4, idle_chips=0)
    fleet = Fleet(question=question, pools=pools_of(plan, prefill))
    load = sample(
        Workload(
            arrivals=Arrivals(process=Process.POISSON, rate_per_s=rate),
            prompt=Lengths.fixed(isl),
            output=Lengths.fixed(osl),
            requests=400,
        )
    )
    return fleet.play(load, find_router("least-load"), chip=chip.at(), slo=slo)


def test_long_prompts_and_a_tight_limit_between_tokens_want_pools() -> None:
    load = {"rate": 5.0, "isl": 4000, "osl": 300, "slo": Slo(ttft_s=2.0, tpot_s=0.015)}
    together, apart = (played(prefill, **load) for prefill in (0, 2))  # type: ignore[arg-type]
    assert apart.report.attainment > 0.99
    assert together.report.attainment < 0.5
    assert together.report.tpot_s is not None and apart.report.tpot_s is not None
    assert apart.report.tpot_s.p99 < 0.8 * together.report.tpot_s.p99


def test_long_answers_miss_the_chips_that_prefill() -> None:
    load = {"rate": 20.0, "isl": 200, "osl": 800, "slo": Slo(ttft_s=2.0, tpot_s=0.015)}
    together, apart = (played(prefill, **load) for prefill in (0, 2))  # type: ignore[arg-type]
    assert together.report.attainment > 0.99
    assert apart.report.attainment < 0.5
    assert together.report.output_tokens == apart.report.output_tokens == 400 * 800


def test_every_token_is_counted_once_and_no_prompt_twice() -> None:
    one = played(1, rate=2.0, isl=1000, osl=20, slo=Slo())
    assert one.report.succeeded == 400
    assert one.report.output_tokens == 400 * 20
    assert one.report.prompt_tokens == 400 * 1000
    computed = sum(engine.computed_tokens for engine in one.engines)
    # The last token of an answer is never fed back; the first is computed where it was handed to.
    assert computed == 400 * (1000 + 19)
    assert all(engine.kv_blocks_used == 0 for engine in one.engines)


def test_a_fleet_of_prefill_alone_is_refused() -> None:
    with pytest.raises(InputError, match="0 … 3"):
        played(4, rate=1.0, isl=100, osl=10, slo=Slo())
