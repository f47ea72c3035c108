"""Every plan: limits are kept, Pareto has nothing dominated, better chips give no worse answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tongyun.codesign.plan import Answer, pareto_front, plan
from tongyun.codesign.space import Question, cuts
from tongyun.codesign.steady import USABLE_MEMORY, memory_bytes, steady
from tongyun.errors import InputError
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision
from tongyun.model.shard import Shard, broken_rule
from tongyun.specs import Figure, find_chip, find_model, find_price
from tongyun.units import Source


def ask(model: str = "Qwen/Qwen3-8B", chip: str = "h20", **changes: object) -> Question:
    config = ModelConfig.from_hf(find_model(model)[0], name=model)
    given = {
        "model": config,
        "chip": find_chip(chip),
        "chips": 4,
        "isl": 2000,
        "osl": 300,
        "precision": Precision.of("bf16"),
        "ttft_s": 2.0,
        "tpot_s": 0.05,
        "price": find_price(chip),
    }
    return Question(**{**given, **changes})  # type: ignore[arg-type]


def best_rate(answer: Answer) -> float:
    return 0.0 if answer.best is None else answer.best.figures.tok_s_per_chip


coordinates = st.lists(
    st.tuples(st.integers(0, 8), st.integers(0, 8), st.booleans()), min_size=1, max_size=40
)


@given(coordinates)
@settings(deadline=None)
def test_pareto_is_what_a_double_loop_finds(points: list[tuple[int, int, bool]]) -> None:
    x, y, among = (np.array(column) for column in zip(*points, strict=True))
    front = pareto_front(x.astype(float), y.astype(float), among)

    def beats(a: int, b: int) -> bool:
        return bool(among[a] and x[a] >= x[b] and y[a] >= y[b] and (x[a], y[a]) != (x[b], y[b]))

    kept = {i for i in range(len(x)) if among[i] and not any(beats(j, i) for j in range(len(x)))}
    assert {(x[i], y[i]) for i in front} == {(x[i], y[i]) for i in kept}
    assert len({(x[i], y[i]) for i in front}) == len(front)


@pytest.mark.parametrize(
    "question",
    [
        ask(),
        ask("Qwen/Qwen3-30B-A3B", "zhenwu-810e", chips=16),
        ask("openai/gpt-oss-20b", "h20", chips=3, precision=Precision.of("mxfp4")),
        ask(
            "deepseek-ai/DeepSeek-V3", "h20", chips=16, precision=Precision.of("fp8"), ttft_s=None, tpot_s=0.1
        ),
    ],
    ids=["dense", "moe-on-ppu", "gpt-oss", "deepseek"],
)
def test_an_answer_keeps_its_limits(question: Question) -> None:
    answer = plan(question)
    assert answer.best is not None and answer.best.meets
    room = USABLE_MEMORY * question.chip.at().memory_bytes
    for offer in (answer.best, *answer.pareto):
        shard, found = offer.plan.shard, offer.figures
        assert broken_rule(question.model, shard) is None
        assert offer.plan.chips + offer.plan.idle_chips == question.chips
        assert bool(offer.plan.idle_chips) == bool(offer.plan.idle_reason)
        rate, slowest_s = 0.0, 0.0
        for _, kind in offer.plan.kinds:
            group = np.array([kind.batch / (kind.shard.dp * kind.shard.pp)])
            budget = np.array([float(kind.step_tokens)])
            assert memory_bytes(question, kind.shard, group, budget)[0] <= room
            again = steady(question, question.chip.at(), kind.shard, group, budget)
            rate += kind.replicas * float(again.tokens_per_s[0])
            slowest_s = max(slowest_s, float(again.tpot_s[0]))
        assert found.tpot_s == pytest.approx(slowest_s, rel=1e-9)
        assert found.tok_s_per_chip == pytest.approx(rate / question.chips, rel=1e-9)
        assert question.ttft_s is None or found.ttft_s <= question.ttft_s
        assert offer.meets == (question.tpot_s is None or found.tpot_s <= question.tpot_s)
        assert found.usd_per_mtoken is not None and found.usd_per_mtoken_total is not None
        assert found.usd_per_mtoken_total < found.usd_per_mtoken
    for offer in answer.pareto:
        for other in answer.pareto:
            assert not (
                other.figures.tok_s_per_user > offer.figures.tok_s_per_user
                and other.figures.tok_s_per_chip >= offer.figures.tok_s_per_chip
            )
        if offer.meets:
            assert offer.figures.tok_s_per_chip <= answer.best.figures.tok_s_per_chip
    left = answer.evaluated - sum(answer.cut[reason] for reason in ("memory", "prefill", "ttft", "tpot"))
    assert left > 0


@pytest.mark.parametrize("figure", ["memory.bandwidth", "memory.capacity", "matmul.peak"])
@given(st.floats(1.0, 3.0))
@settings(max_examples=5, deadline=None)
def test_a_better_chip_serves_no_less(figure: str, factor: float) -> None:
    question = ask()
    spec = question.chip

    def more(f: Figure) -> Figure:
        return replace(f, value=factor * f.value, low=factor * f.low, high=factor * f.high)

    if figure == "matmul.peak":
        peak = {dtype: more(f) for dtype, f in spec.matmul.peak.items()}
        better = replace(spec, matmul=replace(spec.matmul, peak=peak))
    elif figure == "memory.bandwidth":
        better = replace(spec, memory=replace(spec.memory, bandwidth=more(spec.memory.bandwidth)))
    else:
        better = replace(spec, memory=replace(spec.memory, capacity=more(spec.memory.capacity)))
    assert best_rate(plan(replace(question, chip=better))) >= best_rate(plan(question)) * (1 - 1e-12)


@given(st.sampled_from(["ttft_s", "tpot_s"]), st.floats(1.0, 4.0))
@settings(max_examples=10, deadline=None)
def test_a_looser_limit_serves_no_less(limit: str, factor: float) -> None:
    question = ask()
    looser = replace(question, **{limit: factor * getattr(question, limit)})
    assert best_rate(plan(looser)) >= best_rate(plan(question))


def test_the_same_question_has_the_same_answer() -> None:
    question = ask("Qwen/Qwen3-30B-A3B", "zhenwu-810e", chips=8)
    assert plan(question) == plan(question)


def test_a_range_in_the_spec_is_a_range_in_the_answer() -> None:
    best = plan(ask(chip="zhenwu-810e")).best
    assert best is not None and best.slow is not None and best.fast is not None
    assert best.slow.tpot_s > best.figures.tpot_s > best.fast.tpot_s
    assert best.slow.tok_s_per_chip < best.figures.tok_s_per_chip < best.fast.tok_s_per_chip
    assert best.slow.usd_per_mtoken and best.figures.usd_per_mtoken and best.fast.usd_per_mtoken
    assert best.slow.usd_per_mtoken > best.figures.usd_per_mtoken > best.fast.usd_per_mtoken
    assert Source.ASSUMED in best.sources


def test_leftover_chips_become_replicas_and_the_rest_is_said() -> None:
    """Seven chips: what a replica of four leaves over serves as well, or why not is in words."""
    answer = plan(ask("Qwen/Qwen3-32B", "a100", chips=7, tpot_s=0.1))
    assert answer.best is not None
    plans = [offer.plan for offer in answer.pareto]
    filled = [p for p in plans if p.shard.ranks == 4 and p.others]
    assert any(p.chips >= 6 for p in filled)
    for p in plans:
        assert p.replicas == 7 // p.shard.ranks
        assert p.chips + p.idle_chips == 7
        assert ("the smallest replica as quick takes" in p.idle_reason) == (p.idle_chips > 0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "Qwen/Qwen3-235B-A22B", "chips": 1}, r"memory: .* bytes\) more than"),
        ({"ttft_s": 1e-4}, "ttft: nearest is"),
        ({"tpot_s": 1e-5}, "tpot: nearest is"),
        ({"ttft_s": 0.09, "tpot_s": 0.0037}, "ttft and tpot: each can be kept, but not both|nearest is"),
    ],
)
def test_an_answer_of_no_names_the_limit(changes: dict[str, object], says: str) -> None:
    answer = plan(ask(**changes))  # type: ignore[arg-type]
    assert answer.best is None
    assert answer.limit is not None
    import re

    assert re.search(says, answer.limit), answer.limit


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"isl": 40_000, "osl": 1000}, "40960 positions"),
        ({"isl": 0}, "isl must be at least 1"),
        ({"osl": 1}, "osl must be at least 2"),
        ({"chips": 0}, "chips must be at least 1"),
        ({"ttft_s": -1.0}, "ttft must be a positive time"),
        ({"tpot_s": float("nan")}, "tpot must be a positive time"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        ask(**changes)  # type: ignore[arg-type]


def test_a_lone_chip_is_never_cut() -> None:
    question = ask("Qwen/Qwen3-0.6B")
    alone = replace(question.chip.at(), scale_up=None, scale_out=None)
    found = cuts(question.model, alone, 8)
    assert found.legal == (Shard(),)
    assert found.refused > 0


def test_what_a_demand_needs_counts_the_main_kind_alone() -> None:
    answer = plan(ask("Qwen/Qwen3-32B", "a100", chips=7, tpot_s=0.1))
    mixed = next(offer for offer in answer.pareto if offer.plan.others)
    alone = mixed.replica_tokens_per_s * mixed.plan.replicas
    assert alone < mixed.figures.tok_s_per_chip * 7
