"""Node and domain borders: what fits between them, and what they do to the tokens of a chip."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tongyun.codesign.answer import Answer, Plan
from tongyun.codesign.places import Room
from tongyun.codesign.plan import plan
from tongyun.codesign.space import Question, cuts, default_dtype
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision
from tongyun.model.shard import Shard
from tongyun.specs import ChipSpec, Figure, find_chip, find_model

SIZES = (16, 32, 64, 128)


def wired(chip: ChipSpec, *, domain: int | None = None, network: float = 1.0) -> ChipSpec:
    """The chip with another scale-up domain, or a network so many times as fast and as quick."""

    def times(figure: Figure, factor: float) -> Figure:
        return replace(
            figure, value=factor * figure.value, low=factor * figure.low, high=factor * figure.high
        )

    up, out = chip.scale_up, chip.scale_out
    assert up is not None and out is not None
    if domain is not None:
        assert up.domain is not None
        up = replace(up, domain=replace(up.domain, value=domain, low=domain, high=domain))
    out = replace(out, bandwidth=times(out.bandwidth, network), latency=times(out.latency, 1 / network))
    return replace(chip, scale_up=up, scale_out=out)


def answer(model: str, chip: ChipSpec, chips: int, tpot_s: float) -> Answer:
    config = ModelConfig.from_hf(find_model(model)[0], name=model)
    return plan(
        Question(
            model=config,
            chip=chip,
            chips=chips,
            isl=4000,
            osl=500,
            precision=Precision.of(default_dtype(config, chip)),
            ttft_s=2.0,
            tpot_s=tpot_s,
        )
    )


def best(found: Answer) -> tuple[Plan, float]:
    assert found.best is not None, found.limit
    return found.best.plan, found.best.figures.tok_s_per_chip


# ── what fits ────────────────────────────────────────────────────────────────────────

rooms = st.builds(Room.of, st.integers(1, 90), st.integers(1, 24), behind=st.integers(0, 40))
shapes = st.builds(Shard, tp=st.integers(1, 40), pp=st.integers(1, 4))


@given(rooms, shapes)
@settings(deadline=None, max_examples=300)
def test_what_fits_leaves_no_place_for_one_more(room: Room, shard: Shard) -> None:
    count = room.fits(shard)
    left = room.without(shard, count)
    assert left.chips == room.chips - count * shard.ranks
    assert left.fits(shard) == 0
    assert all(size <= room.domain for size in left.gaps)
    unit = shard.ranks if shard.ranks <= room.domain else shard.stage_ranks
    if unit <= room.domain:
        assert count == sum(n * (size // unit) for size, n in room.gaps.items()) * unit // shard.ranks


def test_a_replica_does_not_straddle_a_border_it_could_avoid() -> None:
    """Eight nodes of eight hold eight replicas of six chips, not ten; two racks of 72 hold a wide one."""
    assert Room.of(64, 8).fits(Shard(tp=6)) == 8
    assert Room.of(128, 72).fits(Shard(tp=64)) == 1
    assert Room.of(144, 72).fits(Shard(tp=64)) == 2
    assert Room.of(24, 8).fits(Shard(tp=12)) == 2
    assert Room.of(24, 8).fits(Shard(tp=6, pp=2)) == 1


def test_wide_cuts_are_tried_up_to_all_chips() -> None:
    config = ModelConfig.from_hf(find_model("deepseek-ai/DeepSeek-V3")[0], name="v3")
    chip = find_chip("h100").at()
    for chips in SIZES:
        assert any(shard.dp == shard.ep == chips for shard in cuts(config, chip, chips).legal)


# ── what borders do ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("model", "chip", "tpot_s"),
    [
        ("Qwen/Qwen3-235B-A22B", "h100", 0.03),
        ("deepseek-ai/DeepSeek-V3", "h100", 0.05),
        ("deepseek-ai/DeepSeek-V3", "gb200", 0.05),
    ],
)
def test_sizes_are_not_replication_of_one(model: str, chip: str, tpot_s: float) -> None:
    rates = [best(answer(model, find_chip(chip), chips, tpot_s))[1] for chips in SIZES]
    assert len({f"{rate:.6g}" for rate in rates}) >= 2, rates


def test_experts_over_nodes_are_read_less_often_and_pay_the_network() -> None:
    """On H100 a wide replica wins although its exchange crosses nodes; on a crawling network none does."""
    model = "deepseek-ai/DeepSeek-V3"
    wide, rate = best(answer(model, find_chip("h100"), 32, 0.05))
    _, narrow_rate = best(answer(model, find_chip("h100"), 16, 0.05))
    assert wide.shard.ranks == 32 and wide.shard.ep == 32
    assert rate > narrow_rate
    slow = wired(find_chip("h200"), network=1e-3)
    found = [best(answer(model, slow, chips, 0.05)) for chips in SIZES]
    assert all(kind.shard.ranks <= 8 for plan, _ in found for _, kind in plan.kinds)
    assert len({f"{rate:.9g}" for _, rate in found}) == 1


def test_a_faster_network_serves_no_less_and_a_perfect_one_has_no_border() -> None:
    """On an infinitely fast network the rate of a chip rises with the replica as it does in one domain."""
    model, chips = "deepseek-ai/DeepSeek-V3", 64
    rates = [
        best(answer(model, wired(find_chip("h200"), network=factor), chips, 0.05))[1]
        for factor in (1e-3, 1.0, 4.0, 1e9)
    ]
    assert rates == sorted(rates)
    plan, perfect = best(answer(model, wired(find_chip("h200"), network=1e9), chips, 0.05))
    assert plan.shard.ranks > 8
    assert perfect >= best(answer(model, wired(find_chip("h200"), domain=64), chips, 0.05))[1]


def test_a_larger_domain_moves_the_border() -> None:
    """On a slow network replicas end where domains do; on the catalogue's two domains are worth joining,
    as tokens cross once for each domain."""
    model, domains = "deepseek-ai/DeepSeek-V3", (8, 16, 64)
    for network, widths in ((0.25, (8, 16, 64)), (1.0, (16, 32, 64))):
        plans = [
            best(answer(model, wired(find_chip("h200"), domain=domain, network=network), 64, 0.05))
            for domain in domains
        ]
        assert tuple(plan.shard.ranks for plan, _ in plans) == widths
        rates = [rate for _, rate in plans]
        assert rates[0] < rates[1] < rates[2]


def test_a_rack_and_most_of_another_are_not_two_of_them() -> None:
    """128 chips are one domain of 72 and 56 of the next: fewer tokens a chip than 64 of one domain."""
    model = "deepseek-ai/DeepSeek-V3"
    plan, rate = best(answer(model, find_chip("gb200"), 128, 0.05))
    _, one = best(answer(model, find_chip("gb200"), 64, 0.05))
    assert rate < one
    assert plan.chips + plan.idle_chips == 128
    assert plan.others
