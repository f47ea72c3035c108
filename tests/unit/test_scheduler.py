import pytest

from tongyun.cloud.sched.blocks import BlockPool
from tongyun.cloud.sched.prefix import ROOT, block_keys, child_key, packed
from tongyun.cloud.sched.request import Finish, Request
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig
from tongyun.errors import InputError, RequestError


def scheduler(**more) -> Scheduler:
    basis = {
        "blocks": 10,
        "block_tokens": 4,
        "max_context_tokens": 100,
        "max_sequences": 4,
        "max_step_tokens": 12,
        "watermark": 0.0,
    }
    return Scheduler(SchedulerConfig(**{**basis, **more}))


def request(name: str, prompt: int, output: int = 4, **more) -> Request:
    first = more.pop("first", ord(name[0]) * 100)
    return Request(id=name, prompt=tuple(range(first, first + prompt)), output_tokens=output, **more)


def step(target: Scheduler, **stopped: Finish) -> list[tuple[str, int, int, bool]]:
    batch = target.next_batch(0.0)
    assert batch is not None
    seen = [(p.request.id, p.start, p.length, p.samples) for p in batch.pieces]
    target.commit(batch, {p.request.id: 1 for p in batch.pieces if p.samples}, stopped)
    return seen


def test_decodes_come_first_and_prompts_fill_the_budget_in_chunks():
    target = scheduler()
    target.add(request("a", 3))
    target.add(request("b", 20))
    assert step(target) == [("a", 0, 3, True), ("b", 0, 9, False)]
    assert step(target) == [("a", 3, 1, True), ("b", 9, 11, True)]
    assert step(target) == [("a", 4, 1, True), ("b", 20, 1, True)]


def test_no_more_sequences_than_allowed():
    target = scheduler(max_sequences=2, max_step_tokens=12)
    for name in "abc":
        target.add(request(name, 2, 2))
    assert [piece[0] for piece in step(target)] == ["a", "b"]
    assert (target.running, target.waiting) == (2, 1)
    step(target)
    assert [piece[0] for piece in step(target)] == ["c"]


def test_the_latest_is_preempted_and_computed_again_with_what_it_had_produced():
    target = scheduler(blocks=4, prefix_caching=False)
    target.add(request("a", 7, 8))
    target.add(request("b", 5, 6))
    step(target)
    assert step(target) == [("a", 7, 1, True), ("b", 5, 1, True)]
    assert step(target) == [("a", 8, 1, True)]
    assert target.counters.preemptions == 1 and target.waiting == 1
    while (seen := step(target))[0][0] == "a":
        pass
    assert seen == [("b", 0, 7, True)]


def test_a_higher_priority_goes_first_and_takes_the_place_of_a_lower():
    target = scheduler(blocks=6, max_sequences=2)
    target.add(request("a", 8, 8))
    target.add(request("b", 8, 8))
    step(target)
    target.add(request("c", 8, 2, priority=1))
    assert [piece[:2] for piece in step(target)] == [("a", 8), ("c", 0)]
    assert target.counters.preemptions == 1


def test_equal_priorities_do_not_push_each_other_out():
    target = scheduler(max_sequences=2)
    for name in "ab":
        target.add(request(name, 4, 3, arrival_s=2.0))
    step(target)
    target.add(request("c", 4, 3, arrival_s=1.0))
    assert {piece[0] for piece in step(target)} == {"a", "b"}
    assert target.counters.preemptions == 0


def test_a_shared_prefix_is_computed_once_and_held_by_both():
    target = scheduler()
    target.add(request("a", 9, first=0))
    step(target)
    target.add(request("b", 11, first=0))
    assert step(target) == [("a", 9, 1, True), ("b", 8, 3, True)]
    a, b = (target._sequences[name].blocks for name in "ab")
    assert a[:2] == b[:2] and a[2] != b[2]
    assert [target.pool.holders(block) for block in b] == [2, 2, 1]
    assert target.counters.prefix_hit_tokens == 8


def test_the_last_token_is_computed_even_when_its_block_is_known():
    target = scheduler()
    for name in ("a", "b"):
        target.add(request(name, 8, 1, first=0))
        assert step(target)[0][1:] == ((0, 8, True) if name == "a" else (4, 4, True))


def test_idle_blocks_are_evicted_longest_unused_first_and_ends_before_beginnings():
    pool = BlockPool(4)
    chain, parent = pool.take(3), ROOT
    for at, block in enumerate(chain):
        contents = packed([at])
        key = child_key(parent, contents)
        pool.publish([block], [key], [parent], [contents])
        parent = key
    pool.release(chain)
    assert (pool.free, pool.idle, pool.used) == (4, 3, 0)
    assert pool.take(2)[1] == chain[2]
    assert pool.take(1) == [chain[1]]
    first = child_key(ROOT, packed([0]))
    assert pool.find(first, ROOT, packed([0])) == chain[0]
    assert not pool.can_take(1, sharing=[chain[0]]) and pool.can_take(1)


def test_a_key_is_not_proof_the_tokens_are_compared():
    pool = BlockPool(2)
    (block,) = pool.take(1)
    pool.publish([block], [b"same key"], [ROOT], [packed([1, 2])])
    assert pool.find(b"same key", ROOT, packed([1, 2])) == block
    assert pool.find(b"same key", ROOT, packed([1, 3])) is None
    assert pool.find(b"same key", b"other", packed([1, 2])) is None


def test_keys_name_the_whole_prefix():
    one, two = block_keys([1, 2, 3, 4, 5], 2), block_keys([9, 2, 3, 4], 2)
    assert len(one) == len(two) == 2
    assert not set(one) & set(two)
    assert block_keys([1, 2, 3, 4], 2) == one


@pytest.mark.parametrize(
    ("prompt", "output", "fits"), [(36, 5, True), (36, 6, False), (41, 1, False), (40, 1, True)]
)
def test_a_request_larger_than_the_cache_is_refused(prompt, output, fits):
    # Ten blocks of four, and the last token produced needs no place.
    target = scheduler()
    if fits:
        target.add(request("a", prompt, output))
        while target.has_work:
            step(target)
        assert target.counters.output_tokens == output
    else:
        with pytest.raises(RequestError, match="KV cache holds at most 41") as caught:
            target.add(request("a", prompt, output))
        assert caught.value.code == "context_length_exceeded"


def test_stopping_wins_over_the_length_limit():
    target = scheduler()
    target.add(request("a", 3, 1))
    batch = target.next_batch(0.0)
    assert batch is not None
    assert target.commit(batch, {"a": 1}, {"a": Finish.STOP}) == {"a": Finish.STOP}
    assert target.pool.used == 0


def test_a_turn_is_two_calls():
    target = scheduler()
    assert target.next_batch(0.0) is None
    target.add(request("a", 3))
    batch = target.next_batch(0.0)
    assert batch is not None
    with pytest.raises(RuntimeError, match="twice"):
        target.next_batch(0.0)
    target.commit(batch, {"a": 1}, {})
    with pytest.raises(RuntimeError, match="not proposed"):
        target.commit(batch, {"a": 1}, {})


def test_waiting_time_is_counted_until_admission():
    target = scheduler()
    target.add(request("a", 3, arrival_s=2.0))
    target.next_batch(5.0)
    assert target.counters.queued_s == 3.0


def test_many_aborts_leave_no_trail():
    target = scheduler()
    for n in range(1000):
        target.add(request(f"r{n}", 3))
        assert target.abort(f"r{n}")
    assert len(target._waiting._heap) < 20 and not target.has_work and target.next_batch(0.0) is None


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"blocks": 0}, "blocks"),
        ({"block_tokens": 0}, "block_tokens"),
        ({"max_step_tokens": 3}, "max_step_tokens"),
        ({"watermark": 1.0}, "watermark"),
    ],
)
def test_impossible_limits_are_refused_by_name(change, key):
    with pytest.raises(InputError, match=f"scheduler: {key}: "):
        scheduler(**change)


def test_what_was_handed_over_is_not_computed_again_until_it_is_lost() -> None:
    config = SchedulerConfig(
        blocks=12,
        block_tokens=4,
        max_context_tokens=48,
        max_sequences=2,
        max_step_tokens=16,
        watermark=0.0,
        prefix_caching=False,
    )
    scheduler = Scheduler(config)
    old = Request(id="old", prompt=tuple(range(21)), output_tokens=20, handed_tokens=20)
    new = Request(id="new", prompt=tuple(range(100, 121)), output_tokens=8, handed_tokens=20, arrival_s=1.0)
    scheduler.add(old)
    scheduler.add(new)
    computed = {"old": [], "new": []}
    while (batch := scheduler.next_batch(0.0)) is not None:
        for piece in batch.pieces:
            computed[piece.request.id].append(piece.length)
        scheduler.commit(batch, {piece.request.id: 7 for piece in batch.pieces if piece.samples}, {})
    assert computed["old"] == [1] * 20
    assert scheduler.counters.preemptions == 1
    # One token at a time until its blocks were taken, then all that was known by then.
    known = computed["new"].index(16)
    assert computed["new"][:known] == [1] * known
    assert sum(computed["new"][known:]) > 21
    assert scheduler.pool.used == 0


def test_more_than_the_prompt_cannot_be_handed_over() -> None:
    scheduler = Scheduler(SchedulerConfig(blocks=12, max_context_tokens=48))
    with pytest.raises(RequestError, match="handed over"):
        scheduler.add(Request(id="r", prompt=(1, 2), output_tokens=1, handed_tokens=2))
