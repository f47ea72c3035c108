import itertools

import numpy as np
import pytest

from tongyun.cloud.workload import (
    HASH_BLOCK_TOKENS,
    Arrival,
    Arrivals,
    Distribution,
    Lengths,
    Process,
    SharedPrefix,
    Workload,
    requests,
    sample,
    stretched,
)
from tongyun.errors import InputError

TEN_A_SECOND = Arrivals(process=Process.POISSON, rate_per_s=10.0)


def workload(**more) -> Workload:
    basis = {
        "arrivals": TEN_A_SECOND,
        "prompt": Lengths.fixed(100),
        "output": Lengths.fixed(20),
        "requests": 5000,
    }
    return Workload(**{**basis, **more})


def gaps(arrivals) -> np.ndarray:
    return np.diff([arrival.time_s for arrival in arrivals])


def test_poisson_gaps_have_the_rate_and_vary_as_much_as_they_last():
    between = gaps(sample(workload()))
    assert between.min() >= 0
    # Five standard errors of the mean and of the deviation of 5000 exponential gaps.
    assert between.mean() == pytest.approx(0.1, rel=5 / 5000**0.5)
    assert between.std() == pytest.approx(0.1, rel=5 * 2**0.5 / 5000**0.5)


@pytest.mark.parametrize("variation", [0.5, 3.0])
def test_gamma_gaps_have_the_variation_asked_for(variation):
    process = Arrivals(process=Process.GAMMA, rate_per_s=10.0, variation=variation)
    between = gaps(sample(workload(arrivals=process, requests=50_000)))
    assert between.mean() == pytest.approx(0.1, rel=0.08)
    assert between.std() / between.mean() == pytest.approx(variation, rel=0.08)


def test_constant_and_burst_arrivals():
    constant = sample(workload(arrivals=Arrivals(process=Process.CONSTANT, rate_per_s=4.0), requests=5))
    assert [a.time_s for a in constant] == [0.0, 0.25, 0.5, 0.75, 1.0]
    burst = sample(workload(arrivals=Arrivals(process=Process.BURST, rate_per_s=4.0, burst=2), requests=5))
    assert [a.time_s for a in burst] == [0.0, 0.0, 0.5, 0.5, 1.0]


def test_a_closed_loop_has_no_moments_of_its_own():
    closed = Arrivals(process=Process.CLOSED, users=3)
    assert {a.time_s for a in sample(workload(arrivals=closed, requests=7))} == {0.0}


@pytest.mark.parametrize(
    "arrivals",
    [
        TEN_A_SECOND,
        Arrivals(process=Process.GAMMA, rate_per_s=10.0, variation=8.0),
        Arrivals(process=Process.BURST, rate_per_s=2.0, burst=40),
    ],
)
def test_a_duration_ends_before_its_end_and_not_long_before(arrivals):
    drawn = sample(workload(arrivals=arrivals, requests=None, duration_s=500.0))
    more = sample(workload(arrivals=arrivals, requests=len(drawn) + 1, duration_s=None))
    assert drawn[-1].time_s < 500.0 <= more[-1].time_s
    assert [a.time_s for a in drawn] == pytest.approx([a.time_s for a in more[:-1]])


def test_lengths_follow_their_distribution_within_bounds():
    uniform = Lengths(distribution=Distribution.UNIFORM, low=3, high=5)
    assert {a.prompt_tokens for a in sample(workload(prompt=uniform))} == {3, 4, 5}
    spread = Lengths(distribution=Distribution.LOGNORMAL, mean=800.0, variation=0.5)
    drawn = np.array([a.output_tokens for a in sample(workload(output=spread, requests=50_000))])
    assert drawn.mean() == pytest.approx(800, rel=0.02)
    assert drawn.std() == pytest.approx(400, rel=0.05)
    cut = Lengths(distribution=Distribution.LOGNORMAL, mean=800.0, variation=2.0, low=100, high=1000)
    drawn = np.array([a.output_tokens for a in sample(workload(output=cut))])
    assert (drawn.min(), drawn.max()) == (100, 1000)


def test_the_same_seed_draws_the_same_and_another_does_not():
    spread = Lengths(distribution=Distribution.LOGNORMAL, mean=80.0, variation=0.5)
    assert sample(workload(prompt=spread, seed=3)) == sample(workload(prompt=spread, seed=3))
    assert sample(workload(prompt=spread, seed=3)) != sample(workload(prompt=spread, seed=4))


def test_the_rate_does_not_change_the_lengths():
    spread = Lengths(distribution=Distribution.LOGNORMAL, mean=80.0, variation=0.5)
    slow = sample(workload(prompt=spread, arrivals=Arrivals(process=Process.POISSON, rate_per_s=1.0)))
    fast = sample(workload(prompt=spread))
    assert [a.prompt_tokens for a in slow] == [a.prompt_tokens for a in fast]
    assert slow[-1].time_s == pytest.approx(10 * fast[-1].time_s)


def test_prefix_groups_share_their_beginning_and_nothing_else():
    drawn = sample(workload(prefix=SharedPrefix(tokens=60, groups=3, share=0.5), requests=200))
    groups = {a.prefix_group for a in drawn}
    assert groups == {None, 0, 1, 2}
    assert 60 < sum(a.prefix_group is not None for a in drawn) < 140
    made = list(requests(drawn, vocabulary=50_000))
    for (a, one), (b, two) in itertools.combinations(zip(drawn[:40], made[:40], strict=True), 2):
        same = a.prefix_group is not None and a.prefix_group == b.prefix_group
        assert (one.prompt[:60] == two.prompt[:60]) == same
        assert one.prompt[60:] != two.prompt[60:]


def test_a_prompt_shorter_than_the_prefix_is_its_beginning():
    drawn = [Arrival(0.0, 10, 1, 0, 60), Arrival(0.0, 100, 1, 0, 60)]
    short, long = requests(drawn, vocabulary=1000)
    assert len(short.prompt) == 10 and short.prompt == long.prompt[:10]


def test_hash_ids_share_whole_blocks():
    size = HASH_BLOCK_TOKENS
    drawn = [
        Arrival(0.0, size + 100, 1, hash_ids=(7, 8)),
        Arrival(0.0, 2 * size + 50, 1, hash_ids=(7, 9)),
        Arrival(0.0, size - 5, 1, hash_ids=(7,)),
    ]
    one, two, three = requests(drawn, vocabulary=100_000)
    assert [len(r.prompt) for r in (one, two, three)] == [size + 100, 2 * size + 50, size - 5]
    assert one.prompt[:size] == two.prompt[:size]
    assert one.prompt[size:] != two.prompt[size : size + 100]
    assert three.prompt == one.prompt[: size - 5]


def test_requests_carry_what_the_arrival_says():
    (one,) = requests([Arrival(2.5, 30, 4)], vocabulary=100, name="q")
    assert (one.id, one.arrival_s, len(one.prompt), one.output_tokens) == ("q0", 2.5, 30, 4)
    assert one.ignore_eos and 0 <= min(one.prompt) <= max(one.prompt) < 100


def test_stretching_changes_the_rate_only():
    assert stretched([Arrival(2.0, 3, 4)], 2.5) == [Arrival(5.0, 3, 4)]
    with pytest.raises(InputError, match="positive"):
        stretched([], 0.0)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Arrivals(process=Process.POISSON), "arrival.rate_per_s"),
        (lambda: Arrivals(process=Process.POISSON, rate_per_s=float("nan")), "arrival.rate_per_s"),
        (lambda: Arrivals(process=Process.POISSON, rate_per_s=-1.0), "arrival.rate_per_s"),
        (lambda: Arrivals(process=Process.CLOSED, rate_per_s=1.0, users=2), "arrival.rate_per_s"),
        (lambda: Arrivals(process=Process.CLOSED), "arrival.users"),
        (lambda: Arrivals(process=Process.GAMMA, rate_per_s=1.0, variation=0.0), "arrival.variation"),
        (lambda: Arrivals(process=Process.BURST, rate_per_s=1.0, burst=0), "arrival.burst"),
        (lambda: Lengths.fixed(0), "length.mean"),
        (lambda: Lengths(distribution=Distribution.UNIFORM), "length.high"),
        (lambda: Lengths(distribution=Distribution.UNIFORM, low=5, high=4), "length.high"),
        (lambda: Lengths(distribution=Distribution.LOGNORMAL, mean=5.0, variation=-1.0), "length.variation"),
        (lambda: SharedPrefix(tokens=0), "prefix.tokens"),
        (lambda: SharedPrefix(tokens=5, share=1.5), "prefix.share"),
        (lambda: workload(duration_s=5.0), "requests"),
        (lambda: workload(requests=None), "requests"),
        (lambda: workload(requests=0), "requests"),
        (lambda: workload(requests=None, duration_s=float("inf")), "duration_s"),
        (lambda: workload(seed=-1), "seed"),
    ],
)
def test_nonsense_is_refused_by_key(make, key):
    with pytest.raises(InputError, match=f"workload: {key}: must be"):
        make()
