import pytest

from tongyun.cloud.engine.clock import VirtualClock
from tongyun.cloud.engine.interface import StepError
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.protocol import StepResult
from tongyun.cloud.engine.simulated import SimulatedExecutor, StepLoad
from tongyun.cloud.sched.request import Batch, Finish, Piece, Request
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig
from tongyun.cloud.simulate import simulate
from tongyun.cloud.workload import (
    Arrival,
    Arrivals,
    Distribution,
    Lengths,
    Process,
    SharedPrefix,
    Workload,
    sample,
)
from tongyun.cloud.workload import requests as made
from tongyun.units import Cost, Source

CONFIG = SchedulerConfig(
    blocks=100, block_tokens=4, max_context_tokens=300, max_sequences=4, max_step_tokens=16
)


def per_token(load: StepLoad) -> Cost:
    """One second, and a tenth for each token: easy to add up by hand."""
    seconds = 1.0 + 0.1 * float(load.new_tokens.sum())
    return Cost(seconds=seconds, joules=2.0, sources=frozenset({Source.ASSUMED}))


def request(name: str, arrival: float, prompt: int, output: int) -> Request:
    return Request(id=name, prompt=tuple(range(prompt)), output_tokens=output, arrival_s=arrival)


def test_times_of_two_requests_add_up_by_hand():
    run = simulate(
        [request("a", 10.0, 20, 3), request("b", 12.0, 4, 2)], CONFIG, SimulatedExecutor(per_token)
    )
    a, b = run.records
    # a alone: 16 tokens until 12.6, when b waits; then 4 of a and 4 of b until 14.4.
    assert a.first_token_s == pytest.approx(14.4)
    assert b.first_token_s == pytest.approx(14.4)
    # Two decodes of two tokens until 15.6, then a's last token alone until 16.7.
    assert b.ended_s == pytest.approx(15.6) and a.ended_s == pytest.approx(16.7)
    assert a.ttft_s == pytest.approx(4.4) and b.ttft_s == pytest.approx(2.4)
    assert a.tpot_s == pytest.approx((16.7 - 14.4) / 2)
    assert (a.output_tokens, b.output_tokens) == (3, 2)
    assert run.stats.steps == 4 and run.stats.busy_s == pytest.approx(6.7)
    assert run.stats.finished == {Finish.LENGTH: 2}


def test_idle_time_is_skipped():
    run = simulate([request("a", 0.0, 4, 1), request("b", 1e6, 4, 1)], CONFIG, SimulatedExecutor(per_token))
    assert run.records[1].ttft_s == pytest.approx(1.4)
    assert run.stats.busy_s == pytest.approx(2.8)


def test_a_prefix_seen_before_costs_nothing_but_its_last_block():
    run = simulate(
        [request("a", 0.0, 12, 1), request("b", 100.0, 12, 1)], CONFIG, SimulatedExecutor(per_token)
    )
    assert run.records[1].cached_tokens == 8
    assert run.records[1].ttft_s == pytest.approx(1.4)


def test_a_refused_request_is_recorded_and_the_rest_go_on():
    run = simulate([request("a", 0.0, 500, 1), request("b", 1.0, 4, 1)], CONFIG, SimulatedExecutor(per_token))
    assert not run.records[0].ok and "context" in str(run.records[0].error)
    assert run.records[1].ok


def test_a_closed_loop_keeps_its_users_busy():
    requests = [request(f"r{n}", 0.0, 4 if n else 500, 3) for n in range(6)]
    run = simulate(requests, CONFIG, SimulatedExecutor(per_token), users=1)
    assert [r.ok for r in run.records] == [False] + [True] * 5
    ends = [r.ended_s for r in run.records]
    assert [r.arrival_s for r in run.records[2:]] == ends[1:-1]
    with pytest.raises(ValueError, match="at least one user"):
        simulate(requests, CONFIG, SimulatedExecutor(per_token), users=0)


def test_requests_out_of_order_or_named_twice_are_errors():
    with pytest.raises(ValueError, match="arrives before"):
        simulate([request("a", 2.0, 4, 1), request("b", 1.0, 4, 1)], CONFIG, SimulatedExecutor(per_token))
    with pytest.raises(ValueError, match="two requests"):
        simulate([request("a", 2.0, 4, 1), request("a", 2.0, 4, 1)], CONFIG, SimulatedExecutor(per_token))


def test_a_price_that_fails_is_no_failed_request():
    def broken(load: StepLoad) -> Cost:
        raise ZeroDivisionError("no bandwidth")

    with pytest.raises(StepError, match="no bandwidth"):
        simulate([request("a", 0.0, 4, 1)], CONFIG, SimulatedExecutor(broken))


def test_the_load_of_a_step():
    one = request("a", 0.0, 8, 4)
    pieces = [Piece(one, 8, 1, True, [0] * 9, [0]), Piece(one, 3, 5, False, [0] * 9, [0])]
    load = StepLoad.of(Batch(pieces))
    assert load.new_tokens.tolist() == [1, 5]
    assert load.context.tolist() == [8, 3]
    assert load.samples == 1


class Recording:
    """Copies every batch it is given, then lets another executor run it."""

    def __init__(self, inner) -> None:
        self.inner, self.batches = inner, []

    def execute(self, batch: Batch) -> StepResult:
        self.batches.append(
            [(p.request.id, p.start, tuple(p.tokens), p.samples, tuple(p.blocks)) for p in batch.pieces]
        )
        return self.inner.execute(batch)


class Measured:
    """Stands in for a real executor: finds tokens through its own cache, and durations differ."""

    def __init__(self) -> None:
        self.slots: dict[tuple[int, int], int] = {}
        self.steps = 0

    def execute(self, batch: Batch) -> StepResult:
        size, tokens = CONFIG.block_tokens, {}
        for piece in batch.pieces:
            for at, token in enumerate(piece.tokens, start=piece.start):
                self.slots[piece.blocks[at // size], at % size] = token
            if piece.samples:
                at = len(piece.request.prompt) - 1
                last = self.slots[piece.blocks[at // size], at % size]
                tokens[piece.request.id] = (31 * last + piece.end) % 32_000
        self.steps += 1
        return StepResult(tokens=tokens, duration_s=0.5 + self.steps % 3)


def test_simulated_and_measured_executors_are_given_the_same_batches():
    load = Workload(
        arrivals=Arrivals(process=Process.POISSON, rate_per_s=1.0),
        prompt=Lengths(distribution=Distribution.UNIFORM, low=1, high=60),
        output=Lengths(distribution=Distribution.UNIFORM, low=1, high=90),
        prefix=SharedPrefix(tokens=20, groups=2),
        requests=60,
    )
    tight = SchedulerConfig(
        blocks=40, block_tokens=4, max_context_tokens=160, max_sequences=6, max_step_tokens=24
    )
    recorded = []
    for executor in (Recording(SimulatedExecutor(per_token)), Recording(Measured())):
        loop = EngineLoop(Scheduler(tight), executor, VirtualClock())
        for one in made(sample(load), vocabulary=500):
            loop.add(one)
        while loop.step() is not None:
            pass
        assert loop.stats().preemptions > 0 and loop.stats().prefix_hit_tokens > 0
        assert loop.stats().kv_blocks_used == 0
        recorded.append(executor.batches)
    assert recorded[0] == recorded[1]


def test_a_record_keeps_the_model_and_class_its_request_arrived_with():
    arrivals = [Arrival(0.0, 8, 2, model="m", priority_class="batch"), Arrival(0.0, 8, 2)]
    run = simulate(made(arrivals, vocabulary=100), CONFIG, SimulatedExecutor(per_token))
    assert [(one.model, one.priority_class) for one in run.records] == [("m", "batch"), (None, None)]
