"""Drafts verified request by request: nothing is lost, tokens follow the closed form, time the plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.laws.test_migration import EAGER, crowd

from tongyun.cloud.engine.clock import VirtualClock
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.protocol import StepResult
from tongyun.cloud.engine.simulated import SimulatedExecutor, StepLoad
from tongyun.cloud.engine.step_table import GRAIN, StepTable
from tongyun.cloud.migration import play_migrating
from tongyun.cloud.record import Recorder
from tongyun.cloud.sched.prefix import block_keys
from tongyun.cloud.sched.request import Batch, Finish, Piece, Request
from tongyun.cloud.sched.router import LeastLoad
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig
from tongyun.cloud.sched.sequence import State
from tongyun.cloud.simulate import simulate
from tongyun.cloud.workload import Arrivals, Lengths, Process, Workload, sample
from tongyun.codesign.answer import Plan
from tongyun.codesign.fleet import Fleet, Played
from tongyun.codesign.replicas import Pool, pools_of
from tongyun.codesign.space import Question
from tongyun.codesign.steady import steady
from tongyun.cost import ranks_cost, step_cost
from tongyun.errors import InputError
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision, Sequences, StepShape
from tongyun.model.shard import Shard
from tongyun.model.steps import drafting
from tongyun.specs import find_chip, find_model
from tongyun.units import Cost, Source

CONFIG = SchedulerConfig(
    blocks=60, block_tokens=4, max_context_tokens=200, max_sequences=6, max_step_tokens=40, draft_tokens=3
)
MODELS = {"Qwen/Qwen3-32B": Shard(tp=2), "deepseek-ai/DeepSeek-V3": Shard(tp=2, ep=16, dp=8)}


def price(load: StepLoad) -> Cost:
    seconds = 0.02 + 0.001 * float(load.new_tokens.sum()) + 1e-5 * float(load.context.sum())
    return Cost(seconds=seconds, joules=1.0, sources=frozenset({Source.ASSUMED}))


class Watched(SimulatedExecutor):
    """Remembers what every request was given, and that it was computed on blocks of its own."""

    def __init__(self, scheduler: Scheduler, acceptance: float) -> None:
        super().__init__(price, vocabulary=97)
        self.acceptance = acceptance
        self.scheduler = scheduler
        self.told: dict[str, list[int]] = {}

    def execute(self, batch: Batch) -> StepResult:
        config, pool = self.scheduler.config, self.scheduler.pool
        assert batch.tokens <= config.max_step_tokens
        held = Counter(block for piece in batch.pieces for block in piece.blocks)
        for piece in batch.pieces:
            limit = len(piece.request.prompt) + piece.request.output_tokens
            room = config.block_tokens * len(piece.blocks)
            assert room >= min(piece.end + piece.drafts, limit - 1)
            if piece.length > 1 or not piece.samples:
                assert piece.drafts == 0
        assert all(pool.holders(block) >= count for block, count in held.items())
        result = super().execute(batch)
        for name, token in result.tokens.items():
            self.told.setdefault(name, []).extend([token, *result.further.get(name, ())])
        return result


@st.composite
def loads(draw: st.DrawFn) -> list[Request]:
    moments = sorted(draw(st.lists(st.floats(0, 3), min_size=1, max_size=20)))
    return [
        Request(
            id=f"r{i}",
            prompt=tuple(range(draw(st.integers(1, 60)))),
            output_tokens=draw(st.integers(1, 60)),
            arrival_s=moment_s,
            priority=draw(st.integers(0, 1)),
        )
        for i, moment_s in enumerate(moments)
    ]


@given(loads(), st.integers(1, 5), st.floats(0, 1), st.sampled_from([32, 60, 400]), st.booleans())
@settings(deadline=None, max_examples=60)
def test_every_request_gets_its_tokens_whatever_is_accepted(
    load: list[Request], drafts: int, acceptance: float, blocks: int, caching: bool
) -> None:
    config = replace(CONFIG, draft_tokens=drafts, blocks=blocks, prefix_caching=caching)
    scheduler = Scheduler(config)
    executor = Watched(scheduler, acceptance)
    loop = EngineLoop(scheduler, executor, VirtualClock())
    events: dict[str, list[tuple[int | None, Finish | None]]] = {}
    for one in load:
        loop.add(one)
    while (done := loop.step()) is not None:
        for event in done:
            events.setdefault(event.request_id, []).append((event.token, event.finish))
        pool, held = scheduler.pool, Counter[int]()
        for seq in scheduler._sequences.values():
            held.update(seq.blocks)
            if seq.state is State.DECODING:
                assert seq.computed == len(seq.history) - 1 <= seq.room
        assert all(pool.holders(block) == held[block] for block in range(pool.total))
    for one in load:
        expected = executor.new_tokens(one, len(one.prompt), one.output_tokens)
        assert [token for token, _ in events[one.id]] == expected == executor.told[one.id]
        finishes = [finish for _, finish in events[one.id]]
        assert finishes == [None] * (one.output_tokens - 1) + [Finish.LENGTH]
    stats = loop.stats()
    assert stats.output_tokens == sum(one.output_tokens for one in load)
    assert stats.kv_blocks_used == 0
    assert stats.accepted_tokens <= drafts * stats.verifications


@given(loads(), st.floats(0.1, 1))
@settings(deadline=None, max_examples=25)
def test_what_is_shared_was_computed_from_those_tokens(load: list[Request], acceptance: float) -> None:
    """A block is published under the key of the tokens that its request really has."""
    scheduler = Scheduler(CONFIG)
    executor = Watched(scheduler, acceptance)
    loop = EngineLoop(scheduler, executor, VirtualClock())
    for one in load:
        loop.add(one)
    while loop.turn() is not None:
        pass
    known = set()
    for one in load:
        # Its last token is never computed.
        whole = [*one.prompt, *executor.told[one.id]][:-1]
        known |= set(block_keys(whole, CONFIG.block_tokens))
    assert set(scheduler.pool._block_by_key) <= known


def test_acceptance_is_drawn_for_a_request_and_place_alone() -> None:
    executor = SimulatedExecutor(price)
    executor.acceptance = 0.7
    request = Request(id="a", prompt=(1, 2), output_tokens=50_000)
    whole = list(range(40_002))

    def right(known: int, request: Request = request) -> int:
        return executor.accepted(Piece(request, known - 1, 1, True, whole[:known], [], 0, (), 4))

    again = Request(id="a", prompt=tuple(whole[:500]), output_tokens=900)
    assert [right(known) for known in range(500, 600)] == [right(known, again) for known in range(500, 600)]
    drawn = np.array([right(known) for known in range(2, 4002)])
    for at_least in range(1, 5):
        share, expected = np.mean(drawn >= at_least), 0.7**at_least
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / len(drawn))


def test_the_output_limit_cuts_what_is_accepted() -> None:
    executor = SimulatedExecutor(price)
    executor.acceptance = 1.0
    run = simulate([Request(id="a", prompt=(1,), output_tokens=7)], CONFIG, executor)
    # The first comes from the prompt, then four a step, then what is left.
    assert run.records[0].output_tokens == 7
    assert run.stats.steps == 3
    assert run.stats.verifications == 2 and run.stats.accepted_tokens == 3 + 1


def test_a_stop_token_among_the_accepted_ends_the_request_there() -> None:
    executor = SimulatedExecutor(price, vocabulary=97)
    executor.acceptance = 1.0
    scheduler = Scheduler(CONFIG)
    loop = EngineLoop(scheduler, executor, VirtualClock())
    tokens = executor.new_tokens(request := Request(id="a", prompt=(1,), output_tokens=20), 1, 20)
    loop.add(replace(request, stop_token_ids=frozenset({tokens[6]})))
    events = []
    while (done := loop.step()) is not None:
        events += done
    assert [event.token for event in events] == tokens[:7]
    assert [event.finish for event in events] == [None] * 6 + [Finish.STOP]
    assert loop.stats().output_tokens == 7


def test_more_than_was_verified_is_an_error() -> None:
    scheduler = Scheduler(replace(CONFIG, draft_tokens=1))
    scheduler.add(Request(id="a", prompt=(1, 2), output_tokens=9))
    first = scheduler.next_batch(0.0)
    assert first is not None
    scheduler.commit(first, {"a": 5}, {})
    batch = scheduler.next_batch(0.0)
    assert batch is not None and batch.pieces[0].drafts == 1
    with pytest.raises(ValueError, match="2 drafts accepted for 'a', 1 verified"):
        scheduler.commit(batch, {"a": 6}, {}, {"a": [7, 8]})


class Plain:
    def execute(self, batch: Batch) -> StepResult:
        return StepResult(tokens={}, duration_s=1.0)


def test_an_executor_without_a_draft_model_and_a_small_budget_are_refused() -> None:
    with pytest.raises(InputError, match="draft_tokens: Plain has no draft model; accepted: 0"):
        EngineLoop(Scheduler(CONFIG), Plain(), VirtualClock())
    with pytest.raises(InputError, match=r"max_step_tokens: 40 is less than max_sequences 6 · \(1 \+ 6"):
        replace(CONFIG, draft_tokens=6)
    with pytest.raises(InputError, match="draft_tokens: must be at least 0"):
        replace(CONFIG, draft_tokens=-1)


# ── prices ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("model", MODELS)
def test_a_step_costs_what_the_price_door_says(model: str) -> None:
    config = ModelConfig.from_hf(find_model(model)[0], name=model)
    chip, shard, precision = find_chip("h20").at(), MODELS[model], Precision.of("fp8")
    table = StepTable(config, chip, precision, shard, max_step_tokens=1024, draft_tokens=2)
    cached, chunks = 30 * GRAIN, [(300, 64), (1, 640)]
    for count, rest in ((5, []), (5, chunks), (0, chunks[:1])):
        load = StepLoad(
            new_tokens=np.array([1] * count + [new for new, _ in rest]),
            context=np.array([cached] * count + [before for _, before in rest]),
            samples=count + len(rest),
            verifying=count,
        )
        prompts = None
        if rest:
            columns = np.array(rest, dtype=np.float64).T
            prompts = Sequences(new=columns[0], context=columns[1], ragged=True)
        decode = Sequences(new=3, context=cached, count=count) if count else None
        shape = StepShape(decode=decode, prefill=prompts, sampled=3 * count + len(rest))
        expected = step_cost(config, shape, chip, shard, precision) + ranks_cost(
            drafting(config, shape, shard, precision, 2), chip, shard.stage_ranks
        )
        cost = table(load)
        assert cost.seconds == pytest.approx(float(expected.seconds), rel=1e-9)
        assert cost.joules == pytest.approx(float(expected.joules), rel=1e-9)
    assert (Source.ASSUMED in table.sources) >= (config.mtp_layers == 0)


# ── fleets ───────────────────────────────────────────────────────────────────────────


def ask(model: str, **changes: object) -> Question:
    config = ModelConfig.from_hf(find_model(model)[0], name=model)
    given: dict[str, object] = {
        "model": config,
        "chip": find_chip("h100"),
        "chips": MODELS[model].ranks,
        "isl": 1000,
        "osl": 400,
        "precision": Precision.of("fp8"),
    }
    return Question(**{**given, **changes})  # type: ignore[arg-type]


def played(question: Question, batch: int, rate_per_s: float, count: int = 150, **more: object) -> Played:
    plan = Plan(shard=MODELS[question.model.name], batch=batch, step_tokens=512, replicas=1, idle_chips=0)
    arrivals = sample(
        Workload(
            arrivals=Arrivals(process=Process.POISSON, rate_per_s=rate_per_s),
            prompt=Lengths.fixed(question.isl),
            output=Lengths.fixed(question.osl),
            requests=count,
            seed=3,
        )
    )
    fleet = Fleet(question=question, pools=(Pool(plan=plan),))
    return fleet.play(arrivals, LeastLoad(), chip=question.chip.at(), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("model", "batch"), [("Qwen/Qwen3-32B", 16), ("deepseek-ai/DeepSeek-V3", 8)])
def test_time_between_tokens_is_the_plans(model: str, batch: int) -> None:
    """With as many requests as there are places all the time, TPOT is that of the steady state."""
    question = ask(model, draft_tokens=3, acceptance=0.7)
    shard, group = MODELS[model], np.array([float(batch)])
    steadily = steady(question, question.at(), shard, group, np.array([512.0]))
    # More than can be served: the batch is full from the first second to nearly the last.
    run = played(question, batch, 20.0, count=10 * batch * shard.dp)
    assert run.report.tpot_s is not None and run.accepted is not None
    assert run.report.tpot_s.mean == pytest.approx(float(steadily.tpot_s[0]), rel=0.10)
    spread = np.sqrt(1.5 / sum(one.verifications for one in run.engines))
    # A request's last step is cut at its limit: of about 160 steps one loses a token or two.
    assert 1 + run.accepted == pytest.approx(question.step_tokens, abs=4 * spread + 2 / 160)


def test_drafts_that_are_never_right_are_never_faster_and_the_same_seed_is_the_same_run() -> None:
    question = ask("Qwen/Qwen3-32B", osl=100)
    none, wrong, right = (
        played(replace(question, draft_tokens=k, acceptance=a), 16, 3.0, count=60)
        for k, a in ((0, 0.0), (2, 0.0), (2, 0.8))
    )
    assert none.report.tpot_s and wrong.report.tpot_s and right.report.tpot_s
    assert wrong.report.tpot_s.mean > none.report.tpot_s.mean > right.report.tpot_s.mean
    assert wrong.accepted == 0 and none.accepted is None
    assert all(run.report.output_tokens == 60 * 100 for run in (none, wrong, right))
    again = played(replace(question, draft_tokens=2, acceptance=0.8), 16, 3.0, count=60)
    assert again == right


def test_a_pool_that_prefills_drafts_nothing_and_tapes_count_every_token() -> None:
    question = ask("Qwen/Qwen3-32B", osl=80, chips=4, draft_tokens=2, acceptance=0.8)
    plan = Plan(shard=Shard(tp=2), batch=16, step_tokens=512, replicas=2, idle_chips=0)
    fleet = Fleet(question=question, pools=pools_of(plan, 1))
    chip = question.chip.at()
    assert fleet.limits(chip, plan, "prefill").draft_tokens == 0
    assert fleet.limits(chip, plan, "decode").draft_tokens == 2
    plain = Fleet(question=replace(question, draft_tokens=0), pools=pools_of(plan, 1))
    assert fleet.limits(chip, plan).blocks < plain.limits(chip, plan).blocks
    assert fleet.hand_over(chip)(1000) > plain.hand_over(chip)(1000)
    load = Workload(
        arrivals=Arrivals(process=Process.POISSON, rate_per_s=4.0),
        prompt=Lengths.fixed(1000),
        output=Lengths.fixed(80),
        requests=40,
        seed=1,
    )
    run = fleet.play(sample(load), LeastLoad(), chip=chip, recorder=Recorder())
    assert run.report.output_tokens == 40 * 80
    prefill, decode = run.engines
    assert prefill.verifications == 0 and decode.accepted_tokens > 0
    assert run.recording is not None
    series = run.recording.series[1]
    spans_s = np.diff(series.borders_s)
    # The first token comes from the other pool, the second from a step without drafts.
    assert float((series.decode_tokens_per_s * spans_s).sum()) == pytest.approx(40 * 78, rel=1e-9)


def test_preempted_requests_go_on_where_they_were() -> None:
    """With too few blocks some are computed again; each still gets the tokens it would have got."""

    def run(blocks: int) -> tuple[Mapping[str, Sequence[int]], int]:
        scheduler = Scheduler(replace(CONFIG, blocks=blocks))
        executor = Watched(scheduler, 0.8)
        loop = EngineLoop(scheduler, executor, VirtualClock())
        for i in range(12):
            loop.add(Request(id=f"r{i}", prompt=tuple(range(20 + i)), output_tokens=90))
        while loop.turn() is not None:
            pass
        return executor.told, loop.stats().preemptions

    (roomy, none), (tight, some) = run(600), run(70)
    assert none == 0 and some > 0
    assert roomy == tight


def test_requests_with_drafts_move_between_engines_and_lose_no_token() -> None:
    load = crowd(0)
    config = replace(CONFIG, max_context_tokens=110, max_sequences=10)
    engines = []
    for _ in range(3):
        scheduler = Scheduler(config)
        engines.append(EngineLoop(scheduler, Watched(scheduler, 0.7), VirtualClock()))
    results, log = play_migrating(load, engines, LeastLoad(), EAGER, lambda tokens: 0.001 * tokens)
    assert sum(move.outcome == "migrated" for move in log) > 0
    records = {record.id: record for one in results for record in one.records}
    assert all(records[one.id].output_tokens == one.output_tokens for one in load)
    told: dict[str, set[int]] = {}
    for loop in engines:
        assert loop.scheduler.pool.used == 0
        executor = loop._executor
        assert isinstance(executor, Watched)
        for name, tokens in executor.told.items():
            assert not told.setdefault(name, set()) & set(tokens)
            told[name] |= set(tokens)
    words = SimulatedExecutor(price, vocabulary=97)
    for one in load:
        assert told[one.id] == set(words.new_tokens(one, len(one.prompt), one.output_tokens))
