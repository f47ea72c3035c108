"""Dispatch by freeness and live migration on a bursty, long-tailed load, as published.

Llumnix (Sun et al., OSDI 2024; the project's README for v0.1): against round robin, P99 of the time to
first token better by up to an order of magnitude (12.1x in the README, 15x in the paper), P99 of decode
latency by some ten per cent, preemptions almost gone, and requests of a high class faster still.

Assumed here: LLaMA-7B with all its attention heads in 16 bit, whose keys and values (0.5 MB a token)
are what runs out, on four A100 of 40 GB with the bandwidth of the 80 GB card, one instance each; prompts
and answers from a power law of mean 256 cut at 6,144; gamma arrivals of variation 4 at 16 a second, near
what the instances can hold; blocks of 16 tokens, no prefix caching; the policy at its defaults. The
published clusters are 16 A10 and 16 A800, so that factors are of the same kind and not the same numbers.

Found over seeds 0 to 4: P99 of the time to first token 15 times better than round robin in the median
(3.1, 15, 68, 1.1 and 32: a tail of tails), preemptions 189 by round robin, 89 by freeness alone and 56 with
migration. Most of the tail is won by dispatch; migration takes away preemptions and, where the
instances are overloaded (seed 0), lowers the mean of the time to first token and not its P99.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from tongyun.cloud.sched.router import find_router
from tongyun.cloud.workload import Arrival
from tongyun.codesign.classes import headroom
from tongyun.codesign.fleet import Fleet, Played
from tongyun.codesign.plan import Plan
from tongyun.codesign.replicas import pools_of
from tongyun.codesign.space import Question
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision
from tongyun.model.shard import Shard
from tongyun.specs import find_chip
from tongyun.specs.classes import ClassSpec, MigrationSpec

INSTANCES, RATE, COUNT, LONGEST = 4, 16.0, 2500, 6144
LLAMA_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
CLASSES = (ClassSpec(name="high", priority=1, headroom=0.3), ClassSpec(name="normal"))


def lengths(rng: np.random.Generator, mean: float = 256.0, least: float = 8.0) -> list[int]:
    """A Pareto distribution from `least`, cut at `LONGEST`, with the exponent that gives the mean."""

    def quantile(share: np.ndarray, exponent: float) -> np.ndarray:
        return least * (1 - share * (1 - (least / LONGEST) ** exponent)) ** (-1 / exponent)

    middle = (np.arange(20_000) + 0.5) / 20_000
    low, high = 0.05, 4.0
    for _ in range(50):
        exponent = (low + high) / 2
        low, high = (exponent, high) if quantile(middle, exponent).mean() > mean else (low, exponent)
    drawn: list[int] = np.maximum(np.rint(quantile(rng.random(COUNT), low)), 2).astype(int).tolist()
    return drawn


def load(seed: int, *, high: float = 0.0) -> list[Arrival]:
    rng = np.random.default_rng(seed)
    shape = 4.0**-2
    moments = np.cumsum(rng.gamma(shape, 1 / (RATE * shape), COUNT)).tolist()
    arrivals = list(map(Arrival, moments, lengths(rng), lengths(rng)))
    if not high:
        return arrivals
    chosen = (rng.random(COUNT) < high).tolist()
    return [
        one._replace(priority_class="high" if is_high else "normal")
        for one, is_high in zip(arrivals, chosen, strict=True)
    ]


@cache
def played(seed: int, router: str, *, moving: bool = False, high: float = 0.0, level: bool = False) -> Played:
    chip = find_chip("a100")
    question = Question(
        model=ModelConfig.from_hf(LLAMA_7B, name="llama-7b"),
        chip=chip,
        chips=INSTANCES,
        isl=LONGEST,
        osl=LONGEST,
        precision=Precision.of("bf16", None),
    )
    plan = Plan(shard=Shard(tp=1), batch=256, step_tokens=2048, replicas=INSTANCES, idle_chips=0)
    classes = CLASSES if high and not level else ()
    fleet = Fleet(
        question=question,
        pools=pools_of(plan),
        prefix_caching=False,
        block_tokens=16,
        classes=classes,
        migration=MigrationSpec() if moving else None,
    )
    policy = find_router(router, headroom=headroom(classes))
    return fleet.play(load(seed, high=high), policy, chip=replace(chip.at(), memory_bytes=40e9))


def ttft_p99_s(one: Played) -> float:
    assert one.report.ttft_s is not None and one.report.succeeded == COUNT
    return one.report.ttft_s.p99


def preemptions(one: Played) -> int:
    return sum(engine.preemptions for engine in one.engines)


def test_the_tail_of_the_first_token_is_several_times_shorter_than_by_round_robin() -> None:
    gains = [
        ttft_p99_s(played(seed, "round-robin")) / ttft_p99_s(played(seed, "freeness", moving=True))
        for seed in range(5)
    ]
    assert np.median(gains) > 6
    assert min(gains) > 1


def test_migration_preempts_fewer_than_dispatch_alone_and_far_fewer_than_round_robin() -> None:
    turns, still, moving = (
        sum(preemptions(played(seed, router, moving=moves)) for seed in range(3))
        for router, moves in (("round-robin", False), ("freeness", False), ("freeness", True))
    )
    assert moving < 0.8 * still
    assert moving < 0.6 * turns


def test_a_pause_is_shorter_than_a_step_in_the_median_and_three_at_p99() -> None:
    one = played(0, "freeness", moving=True)
    assert one.moves is not None and one.moves.migrated > 20
    assert one.moves.downtime_s is not None and one.report.tpot_s is not None
    assert one.moves.downtime_s.p50 < one.report.tpot_s.p50
    assert one.moves.downtime_s.p99 < 3 * one.report.tpot_s.p50


def test_a_high_class_is_served_faster_and_the_others_pay() -> None:
    level, classed = (
        played(0, "freeness", moving=True, high=0.1, level=level).classes for level in (True, False)
    )

    def felt(name: str, key: str, *, of: str = "p99") -> tuple[float, float]:
        spans = [getattr(groups[name].report, key) for groups in (level, classed)]
        return getattr(spans[0], of), getattr(spans[1], of)

    before_s, after_s = felt("high", "ttft_s")
    assert after_s < before_s / 5
    before_s, after_s = felt("high", "latency_s", of="mean")
    assert after_s < before_s / 1.1
    before_s, after_s = felt("normal", "ttft_s")
    assert after_s > before_s
