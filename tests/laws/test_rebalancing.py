"""Experts placed anew during a run: none is lost, few move, and it helps where picks drift."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tongyun.cli.fleet import read_fleet
from tongyun.cloud.engine.simulated import SimulatedExecutor
from tongyun.cloud.perfetto import events
from tongyun.cloud.record import Recorder
from tongyun.cloud.sched.experts import Placement, balanced, moves, placed_anew
from tongyun.cloud.sched.router import LeastLoad
from tongyun.cloud.schedule import Schedule
from tongyun.cloud.workload import Arrivals, Distribution, Lengths, Process, Workload, sample
from tongyun.codesign import fleet as fleets
from tongyun.codesign.fleet import Played
from tongyun.codesign.rebalance import Traffic
from tongyun.errors import InputError
from tongyun.report import to_json
from tongyun.specs import find_chip

FLEET = """
name = "wide"
model = "Qwen/Qwen3-30B-A3B"
chip = "h100"

[experts]
skew = {{ ratio = {skew}, kind = "assumed", source = "this test" }}
rebalance = true
redundant = 16
{more}
[[pool]]
replicas = 1
tp = 1
ep = 8
dp = 8
"""
DRIFT = 'drift = { fraction = 0.3, kind = "assumed", source = "this test" }\ndrift_s = 4.0\n'
WINDOW = "window_s = 1.5\n"
SHARE = 'move_share = { fraction = 0.2, kind = "assumed", source = "this test" }\n'
LOAD = sample(
    Workload(
        arrivals=Arrivals(process=Process.POISSON, rate_per_s=60.0),
        prompt=Lengths(distribution=Distribution.FIXED, mean=2000),
        output=Lengths(distribution=Distribution.UNIFORM, low=20, high=200),
        requests=600,
        seed=3,
    )
)


def played(
    folder: Path, more: str, skew: float = 0.6, pools: str = "", recorder: Recorder | None = None
) -> Played:
    path = folder / "fleet.toml"
    text = FLEET.format(skew=skew, more=more)
    path.write_text(text if not pools else text[: text.index("[[pool]]")] + pools)
    _, fleet = read_fleet(path, isl=2000, osl=200)
    return fleet.play(LOAD, LeastLoad(), chip=find_chip("h100").at(), recorder=recorder)


def tpot_s(one: Played) -> float:
    assert one.report.tpot_s is not None
    return one.report.tpot_s.mean


# ── the policy ───────────────────────────────────────────────────────────────────────


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[float], list[float], int, int]:
    """What was counted before and what since, ranks, and copies."""
    ranks, each = draw(st.integers(2, 8)), draw(st.integers(1, 8))
    loads = st.lists(st.integers(0, 10_000), min_size=ranks * each, max_size=ranks * each)
    before, now = draw(loads), draw(loads)
    return [one + 1.0 for one in before], [float(one) for one in now], ranks, ranks * draw(st.integers(0, 3))


@settings(deadline=None, max_examples=200)
@given(case=cases())
def test_every_expert_stays_somewhere_and_the_busiest_rank_never_gets_more(
    case: tuple[list[float], list[float], int, int],
) -> None:
    before_counts, counts, ranks, redundant = case
    before = balanced(before_counts, ranks, redundant)
    after = placed_anew(before, counts, redundant)
    assert {len(rank) for rank in after.ranks} == {len(before.ranks[0])}
    assert {expert for rank in after.ranks for expert in rank} == set(range(len(counts)))
    most = [where.picks(counts).sum(axis=1).max() for where in (before, after)]
    assert most[1] < most[0] or after == before
    for source, target in moves(before, after, [rank // 2 for rank in range(ranks)]):
        assert source != target


def test_chance_moves_nothing_and_a_mended_placement_is_near_a_new_one() -> None:
    rng = np.random.default_rng(1)
    law = np.arange(1, 129, dtype=np.float64) ** -0.6
    where = balanced(law.tolist(), 16, 32)
    same = rng.multinomial(200_000, law / law.sum()).tolist()
    assert placed_anew(where, same, 32) == where
    moved = law.copy()
    moved[:40] = np.roll(law[:40], 7)
    counts = rng.multinomial(2_000_000, moved / moved.sum()).tolist()
    mended, fresh = placed_anew(where, counts, 32), balanced(counts, 16, 32)
    crowded = [
        one.picks(moved.tolist()).sum(axis=1).max() * 16 / moved.sum() for one in (where, mended, fresh)
    ]
    assert crowded[0] > 1.15
    assert crowded[1] < 1.05
    assert crowded[2] <= crowded[1]
    near = [0] * 16
    assert len(moves(where, mended, near)) < 0.5 * len(moves(where, fresh, near))


def test_weights_come_from_near_and_the_fullest_rank_sets_the_pace() -> None:
    before = Placement(ranks=((0, 1), (2, 3), (0, 2), (1, 3)))
    after = Placement(ranks=((0, 2), (2, 3), (0, 2), (0, 3)))
    assert moves(before, after, [0, 0, 1, 1]) == [(1, 0), (2, 3)]
    assert moves(before, after, [0, 1, 0, 1]) == [(2, 0), (0, 3)]
    chip, up = find_chip("h100").at(), find_chip("h100").at().scale_up
    assert up is not None
    traffic = Traffic.of([before, before], [after, after], [0, 0, 1, 1])
    assert (traffic.experts, traffic.far.sum()) == (4, 0)
    whole = traffic.seconds(1e9, chip, 1.0)
    assert whole == pytest.approx(up.latency_s + 2e9 / (up.achieved * up.bytes_per_s))
    assert traffic.seconds(1e9, chip, 0.5) - up.latency_s == pytest.approx(2 * (whole - up.latency_s))
    out = replace(chip, scale_out=None)
    with pytest.raises(InputError, match="no links between ranks"):
        Traffic.of([before], [after], [0, 1, 0, 1]).seconds(1e9, out, 1.0)


# ── the run ──────────────────────────────────────────────────────────────────────────


def test_under_drifting_skew_it_is_better_with_than_without(tmp_path: Path) -> None:
    fresh, stale, stood, beside = (
        played(tmp_path, more) for more in ("", DRIFT, DRIFT + WINDOW, DRIFT + WINDOW + SHARE)
    )
    assert stale.rebalanced is None
    for one, standing in ((stood, True), (beside, False)):
        assert tpot_s(fresh) < tpot_s(one) < tpot_s(stale)
        assert one.report.output_tokens_per_s > stale.report.output_tokens_per_s
        assert one.rebalanced
        for move in one.rebalanced:
            assert move.standing is standing
            assert move.crowding_after < move.crowding_before
            assert move.moved_bytes > 0
            assert move.seconds > 0
            assert move.moment_s == pytest.approx(1.5 * round(move.moment_s / 1.5))


def test_with_even_picks_and_with_nothing_to_mend_a_window_changes_nothing(tmp_path: Path) -> None:
    for skew in (0.0, 0.6):
        without, watched = played(tmp_path, "", skew), played(tmp_path, WINDOW, skew)
        moved_s = sum(move.seconds for move in watched.rebalanced or ())
        assert watched.report.duration_s <= without.report.duration_s + moved_s
        assert not watched.rebalanced
        assert to_json(watched.report) == to_json(without.report)


@pytest.mark.parametrize("more", [DRIFT + WINDOW, DRIFT + WINDOW + SHARE, DRIFT])
def test_leaps_and_single_steps_tell_the_same_and_so_does_a_second_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str
) -> None:
    leapt, again = played(tmp_path, more), played(tmp_path, more)
    monkeypatch.setattr(fleets, "LeapingExecutor", SimulatedExecutor)
    stepped = played(tmp_path, more)
    assert again == leapt
    assert stepped.report == leapt.report
    assert stepped.rebalanced == leapt.rebalanced
    assert [(one.steps, one.busy_s) for one in stepped.engines] == [
        (one.steps, one.busy_s) for one in leapt.engines
    ]


def test_no_expert_is_sent_while_others_are_on_their_way(tmp_path: Path) -> None:
    log = played(tmp_path, DRIFT + WINDOW + SHARE.replace("0.2", "0.001")).rebalanced
    assert log is not None
    assert max(move.seconds for move in log) > 1.5
    for one, following in pairwise(log):
        assert following.moment_s >= one.moment_s + one.seconds


@pytest.mark.parametrize("more", [DRIFT + WINDOW, DRIFT + WINDOW + SHARE])
def test_a_recorder_changes_nothing_and_the_trace_has_every_move(tmp_path: Path, more: str) -> None:
    schedule = Schedule()
    told, plain = played(tmp_path, more, recorder=Recorder(schedule.pool)), played(tmp_path, more)
    assert told.report == plain.report
    log = told.rebalanced
    assert log is not None
    for engine in schedule.engines:
        assert [end_s - begin_s for begin_s, end_s, _ in engine.moves] == pytest.approx(
            [one.seconds for one in log]
        )
        for (begin_s, end_s, standing), one in zip(engine.moves, log, strict=True):
            steps = [step for step in engine.stretches() if step.begin_s < end_s and step.end_s > begin_s]
            assert begin_s >= one.moment_s
            assert bool(steps) is not standing
            # A leap ends with the step that is under way when the price changes.
            for step in steps:
                if step.begin_s < begin_s < step.end_s:
                    assert step.end_s - begin_s < 1.01 * (step.end_s - step.begin_s) / step.steps
    names = [event["name"] for event in events(schedule)]
    assert names.count("experts move" if log[0].standing else "experts set off") == 8 * len(log)


def test_two_pools_each_place_their_own(tmp_path: Path) -> None:
    pools = "".join(
        f'[[pool]]\nrole = "{role}"\nreplicas = 1\ntp = 1\nep = 8\ndp = 8\n' for role in ("prefill", "decode")
    )
    stale, mended = (played(tmp_path, more, pools=pools) for more in (DRIFT, DRIFT + WINDOW))
    assert {move.role for move in mended.rebalanced or ()} == {"prefill", "decode"}
    assert mended.report.succeeded == stale.report.succeeded == len(LOAD)
    assert mended.report.latency_s is not None
    assert stale.report.latency_s is not None
    assert mended.report.latency_s.mean < stale.report.latency_s.mean


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (WINDOW.replace("1.5", "0"), "experts.window_s"),
        ("drift_s = 2.0\n", "drift, which says how much, is missing"),
        (SHARE, "move_share is of weights that move after a window"),
        (WINDOW + SHARE.replace("0.2", "1.0"), "move_share: accepted: above 0 and below 1"),
    ],
)
def test_what_cannot_be_combined_is_refused(tmp_path: Path, more: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        played(tmp_path, more)


def test_a_window_without_placement_by_load_or_with_one_rank_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    text = FLEET.format(skew=0.6, more=WINDOW)
    path.write_text(text.replace("rebalance = true\nredundant = 16\n", ""))
    with pytest.raises(InputError, match="window_s needs rebalance = true"):
        read_fleet(path)
    path.write_text(text.replace("redundant = 16\n", "").replace("ep = 8\ndp = 8", "ep = 1\ndp = 1"))
    with pytest.raises(InputError, match="one rank has all experts; none can move"):
        read_fleet(path)
