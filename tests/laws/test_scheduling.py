"""What holds for every sequence of arrivals, steps and aborts, however small the cache."""

from __future__ import annotations

import random
from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from tongyun.cloud.sched.prefix import block_keys
from tongyun.cloud.sched.request import Batch, Finish, Request
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig
from tongyun.cloud.sched.sequence import State
from tongyun.errors import RequestError

TEXTS = [[0, 1, 1, 0, 1, 0, 0, 1, *rest] for rest in ([0] * 12, [1] * 12, [0, 1] * 6)]
"""Three texts that part at their ninth word."""


@st.composite
def stories(draw: st.DrawFn) -> tuple[SchedulerConfig, list[tuple]]:
    """A configuration and what happens to it.

    Only the seed and the length are drawn: lists drawn event by event come out too short
    and too sparse to fill a cache, and a cache that is never full tests nothing.
    """
    rng = random.Random(draw(st.integers(0, 2**32 - 1)))
    sequences = rng.randint(1, 5)
    block_tokens = rng.choice([1, 2, 3, 4])
    config = SchedulerConfig(
        blocks=rng.randint(20, 60) // block_tokens,
        block_tokens=block_tokens,
        max_context_tokens=rng.choice([16, 60, 60]),
        max_sequences=sequences,
        max_step_tokens=sequences + rng.choice([0, 1, 3, 12]),
        prefix_caching=rng.random() < 0.7,
        watermark=rng.choice([0.0, 0.0, 0.01, 0.3]),
    )
    priorities = rng.choice([0, 0, 2])
    return config, [happening(rng, priorities) for _ in range(draw(st.integers(10, 60)))]


def happening(rng: random.Random, priorities: int) -> tuple:
    match rng.choices(["add", "step", "abort", "abort within a step"], [4, 8, 1, 1])[0]:
        case "add":
            length = rng.choice([rng.randint(0, 4), rng.randint(1, 20), 16])
            return "add", rng.choice(TEXTS)[:length], rng.randint(0, 16), rng.randint(0, priorities)
        case kind:
            return kind, rng.randint(0, 30)


def next_token(history: list[int]) -> int:
    """A model of two words: the next token depends on all that came before."""
    return (sum(history) + len(history) // 3) % 2


class Witness:
    """Runs a scheduler beside a plain record of what it was asked, and checks it at every instant.

    `kv` is a cache in which each slot remembers the whole prefix it was computed from, so a
    wrong block, a stale block or a skipped token shows as a wrong prefix.
    """

    def __init__(self, settings: SchedulerConfig) -> None:
        self.config = settings
        self.scheduler = Scheduler(settings)
        self.requests: dict[str, Request] = {}
        self.produced: dict[str, list[int]] = defaultdict(list)
        self.ended: dict[str, Finish] = {}
        self.rejected = 0
        self.kv: dict[tuple[int, int], tuple[int, ...]] = {}
        self.batches: list[list[tuple]] = []

    def add(self, prompt: list[int], output: int, priority: int) -> None:
        one = Request(
            id=f"r{len(self.requests) + self.rejected}",
            prompt=tuple(prompt),
            output_tokens=output,
            priority=priority,
        )
        try:
            self.scheduler.add(one)
        except RequestError:
            self.rejected += 1
        else:
            self.requests[one.id] = one

    def abort(self, number: int) -> None:
        """Mostly one that is in flight; now and then one that never was or has ended."""
        living = sorted(set(self.requests) - set(self.ended))
        name = living[number % len(living)] if living and number < 25 else f"r{number}"
        in_flight = name in self.requests and name not in self.ended
        assert self.scheduler.abort(name) == in_flight
        if in_flight:
            self.ended[name] = Finish.ABORT

    def step(self, stop: int | None = None, abort: int | None = None) -> None:
        batch = self.scheduler.next_batch(0.0)
        assert (batch is not None) == (len(self.ended) < len(self.requests))
        if batch is None:
            return
        self.check_blocks()
        self.check_ranks()
        tokens = self.execute(batch)
        if abort is not None:
            self.abort(abort)
        ids = sorted(tokens)
        stopped = {ids[stop]: Finish.STOP} if stop is not None and stop < len(ids) else {}
        ended = self.scheduler.commit(batch, tokens, stopped)
        for name, token in tokens.items():
            if self.ended.get(name) is not Finish.ABORT:
                self.produced[name].append(token)
        assert not set(ended) & set(self.ended)
        self.ended |= ended
        self.check_blocks()

    def execute(self, batch: Batch) -> dict[str, int]:
        assert 0 < batch.tokens <= self.config.max_step_tokens
        assert len(batch.pieces) <= self.config.max_sequences
        assert len({piece.request.id for piece in batch.pieces}) == len(batch.pieces)
        self.batches.append(
            [(p.request.id, p.start, tuple(p.tokens), p.samples, tuple(p.blocks)) for p in batch.pieces]
        )
        size, tokens = self.config.block_tokens, {}
        for piece in batch.pieces:
            known = [*piece.request.prompt, *self.produced[piece.request.id]]
            assert list(piece.history) == known
            assert len(piece.tokens) == piece.length >= 1
            assert piece.samples == (piece.end == len(known))
            for at in range(piece.start, piece.end):
                self.kv[piece.blocks[at // size], at % size] = tuple(known[: at + 1])
        for piece in batch.pieces:
            # What attention would read, after every piece of the step has written.
            for at in range(piece.end):
                assert self.kv[piece.blocks[at // size], at % size] == tuple(piece.history[: at + 1])
            if piece.samples:
                tokens[piece.request.id] = next_token(list(piece.history))
        return tokens

    def check_blocks(self) -> None:
        pool, held = self.scheduler.pool, defaultdict(int)
        for seq in self.scheduler._sequences.values():
            assert len(set(seq.blocks)) == len(seq.blocks)
            for block in seq.blocks:
                held[block] += 1
        assert all(pool.holders(block) == held.get(block, 0) for block in range(pool.total))
        blank, idle = pool._blank, list(pool._idle)
        assert sorted([*blank, *idle, *held]) == list(range(pool.total))
        assert pool.used == len(held) and pool.free == len(blank) + len(idle)
        assert None not in {pool._key[b] for b in idle}
        assert {pool._key[b] for b in blank} <= {None}
        named = {key: block for block, key in enumerate(pool._key) if key is not None}
        assert pool._block_by_key == named
        self.check_contents()

    def check_contents(self) -> None:
        """A block that can be found holds, in full, the tokens it is found by."""
        size = self.config.block_tokens
        for seq in self.scheduler._sequences.values():
            keys = block_keys(seq.history, size)
            for at, block in enumerate(seq.blocks):
                key = self.scheduler.pool._key[block]
                if key is not None:
                    assert key == keys[at]
                    assert (at + 1) * size <= seq.computed

    def check_ranks(self) -> None:
        """Who runs ranks before who waits, but for a higher priority that finds no room yet."""
        sequences = self.scheduler._sequences.values()
        waiting = [seq.rank for seq in sequences if seq.state is State.WAITING]
        for running in (seq.rank for seq in sequences if seq.state is not State.WAITING):
            assert all(running < other or other[0] < running[0] for other in waiting)
        for group in (self.scheduler._decoding, self.scheduler._prefilling):
            assert group == sorted(group, key=lambda seq: seq.rank)

    def play(self, events: list[tuple]) -> None:
        for event in events:
            match event:
                case ("add", prompt, output, priority):
                    self.add(prompt, output, priority)
                case ("step", stop):
                    self.step(stop=stop if stop < 5 else None)
                case ("abort", number):
                    self.abort(number)
                case ("abort within a step", number):
                    self.step(abort=number)
            self.check_blocks()
            in_flight = len(self.requests) - len(self.ended)
            assert in_flight == self.scheduler.running + self.scheduler.waiting

    def finish(self) -> None:
        """Run until idle. The bound is every token computed once per preemption and admission."""
        for _ in range(20_000):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("the scheduler does not come to an end")


def test_stories_are_hard_enough():
    """The laws below mean something only if caches fill up, prefixes are found and priorities clash."""
    totals: dict[str, int] = defaultdict(int)

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(stories())
    def count(story):
        witness = Witness(story[0])
        witness.play(story[1])
        witness.finish()
        counters = witness.scheduler.counters
        totals["preempted"] += counters.preemptions > 0
        totals["shared"] += counters.prefix_hit_tokens > 0
        totals["rejected"] += witness.rejected > 0
        totals["aborted"] += Finish.ABORT in witness.ended.values()
        totals["stopped"] += Finish.STOP in witness.ended.values()

    count()
    assert all(totals[what] >= 10 for what in ("preempted", "shared", "rejected", "aborted", "stopped")), (
        totals
    )


@settings(max_examples=300, deadline=None)
@given(stories())
def test_every_admitted_request_ends_and_every_block_comes_back(story):
    witness = Witness(story[0])
    witness.play(story[1])
    witness.finish()
    pool = witness.scheduler.pool
    assert pool.used == 0 and pool.free == pool.total
    assert set(witness.ended) == set(witness.requests)
    adds = sum(event[0] == "add" for event in story[1])
    assert adds == len(witness.requests) + witness.rejected
    for name, request in witness.requests.items():
        history = list(request.prompt)
        for token in witness.produced[name]:
            assert token == next_token(history)
            history.append(token)
        if witness.ended[name] is Finish.LENGTH:
            assert len(witness.produced[name]) == request.output_tokens
        else:
            assert len(witness.produced[name]) <= request.output_tokens


@settings(max_examples=120, deadline=None)
@given(stories())
def test_same_story_same_batches(story):
    first, second = Witness(story[0]), Witness(story[0])
    for witness in (first, second):
        witness.play(story[1])
        witness.finish()
    assert first.batches == second.batches


@settings(max_examples=120, deadline=None)
@given(stories())
def test_each_position_is_computed_once_per_life(story):
    """Positions go up without gap or repeat; only a preemption or a prefix hit may jump."""
    witness = Witness(story[0])
    witness.play(story[1])
    witness.finish()
    reached: dict[str, int] = {}
    restarts = first_jumps = 0
    for batch in witness.batches:
        for name, start, tokens, *_ in batch:
            if name not in reached:
                first_jumps += start
            elif start != reached[name]:
                restarts += 1
            reached[name] = start + len(tokens)
    counters = witness.scheduler.counters
    assert restarts <= counters.preemptions
    assert first_jumps <= counters.prefix_hit_tokens
    if not witness.config.prefix_caching:
        assert counters.prefix_hit_tokens == 0
    computed = sum(len(tokens) for batch in witness.batches for _, _, tokens, *_ in batch)
    assert counters.computed_tokens <= computed


@settings(max_examples=120, deadline=None)
@given(stories())
def test_prefix_caching_never_changes_what_is_produced(story):
    plain = story[0].__class__(**{**vars(story[0]), "prefix_caching": False})
    cached = story[0].__class__(**{**vars(story[0]), "prefix_caching": True})
    adds = [event for event in story[1] if event[0] == "add"]
    produced = []
    for settings_ in (plain, cached):
        witness = Witness(settings_)
        witness.play(adds)
        witness.finish()
        produced.append(dict(witness.produced))
    assert produced[0] == produced[1]


@settings(max_examples=120, deadline=None)
@given(stories())
def test_first_come_first_admitted_without_priorities(story):
    """Nobody gets a first token computed before an earlier request got one of its own."""
    witness = Witness(story[0])
    for event in story[1]:
        if event[0] == "add":
            witness.add(event[1], event[2], 0)
        elif event[0] == "step":
            witness.step()
    witness.finish()
    firsts = [name for batch in witness.batches for name, *_ in batch]
    order = sorted(set(firsts), key=firsts.index)
    assert order == sorted(order, key=lambda name: int(name[1:]))
