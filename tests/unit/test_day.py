"""A day's curve: arrivals follow it, exactly in the mean, and a flat one changes nothing."""

import numpy as np
import pytest

from tongyun.cloud.day import DAY_S, Curve, Steps, Wave
from tongyun.cloud.workload import Arrivals, Lengths, Process, Workload, sample
from tongyun.errors import InputError, SpecError
from tongyun.specs import find_workload

CURVES = [
    Wave(swing=0.6, peak_s=15 * 3600.0),
    Wave(swing=1.0, peak_s=0.0, period_s=50.0, begin_s=12.0),
    Steps(factors=tuple(range(24)), begin_s=30 * 3600.0 + 7.0),
    Steps(factors=(0.0, 3.0, 0.0, 1.0), period_s=40.0),
]


@pytest.mark.parametrize("curve", CURVES)
def test_the_integral_of_the_factor_up_to_a_moment_is_when_it_came_evenly(curve: Curve) -> None:
    period_s = curve.period_s  # type: ignore[attr-defined]
    even_s = np.sort(np.random.default_rng(3).uniform(0, 3 * period_s, 500))
    moments_s = curve.stretch(even_s)
    assert (np.diff(moments_s) >= 0).all() and moments_s[0] >= 0
    fine_s = np.linspace(0, 4 * period_s, 400_001)
    each = curve.factor((fine_s[1:] + fine_s[:-1]) / 2) * np.diff(fine_s)
    whole_s = np.interp(moments_s, fine_s, np.concatenate(([0.0], np.cumsum(each))))
    assert whole_s == pytest.approx(even_s, abs=period_s * 3e-5)


@pytest.mark.parametrize("curve", [Wave(swing=0.0, peak_s=5.0, begin_s=9.0), Steps(factors=(2.0,) * 24)])
def test_a_flat_day_changes_nothing(curve: Curve) -> None:
    even_s = np.cumsum(np.random.default_rng(1).exponential(30.0, 9000))
    assert curve.stretch(even_s) == pytest.approx(even_s, rel=1e-12)
    assert curve.factor(even_s) == pytest.approx(1.0)


def drawn(curve: Curve, variation: float = 1.0) -> np.ndarray:
    arrivals = Arrivals(process=Process.DIURNAL, rate_per_s=2.0, variation=variation, day=curve)
    fixed = Lengths.fixed(10)
    load = Workload(arrivals=arrivals, prompt=fixed, output=fixed, requests=180_000, seed=5)
    return np.array([arrival.time_s for arrival in sample(load)])


def test_each_hour_has_its_share_of_a_poisson_process() -> None:
    curve = Wave(swing=0.6, peak_s=15 * 3600.0)
    counts, _ = np.histogram(drawn(curve), bins=24, range=(0, DAY_S))
    due = 2.0 * 3600 * curve.factor((np.arange(24) + 0.5) * 3600)
    # A Poisson count deviates by its root; five of them, and the curve's bend within an hour.
    assert (np.abs(counts - due) < 5 * np.sqrt(due) + 0.006 * due).all()
    # Within the hour of the peak, gaps vary as much as they last.
    gaps = np.diff(drawn(curve)[counts[:15].sum() : counts[:16].sum()])
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, rel=0.05)


def test_bursts_ride_on_the_curve() -> None:
    curve = Steps(factors=(1.0, 3.0), period_s=DAY_S)
    moments_s = drawn(curve, variation=4.0)
    morning = moments_s[moments_s < DAY_S / 2]
    assert len(morning) / 43_200 == pytest.approx(1.0, rel=0.15)
    assert np.diff(morning).std() / np.diff(morning).mean() == pytest.approx(4.0, rel=0.1)


def test_an_hour_without_load_stays_empty() -> None:
    curve = Steps(factors=(0.0, *[1.0] * 23))
    moments_s = drawn(curve)
    assert (moments_s % DAY_S >= 3600).all()


FILE = """
name = "mine"
title = "Mine"
requests = 1000
seed = 1
[arrival]
process = "diurnal"
rate = { per_s = 4, kind = "assumed", source = "test" }
{day}
[input]
distribution = "fixed"
mean = { tokens = 10, kind = "assumed", source = "test" }
[output]
distribution = "fixed"
mean = { tokens = 10, kind = "assumed", source = "test" }
"""


def read(tmp_path, day: str) -> Workload:
    path = tmp_path / "mine.toml"
    path.write_text(FILE.replace("{day}", day))
    return Workload.from_spec(find_workload(str(path)))


def test_a_file_names_hours_or_a_wave_and_a_day_may_be_played_faster(tmp_path) -> None:
    hours = ", ".join(str(1 + hour) for hour in range(24))
    text = f'[arrival.day]\nhourly = {{ ratios = [{hours}], kind = "measured", source = "test" }}'
    assert read(tmp_path, text).arrivals.day == Steps(factors=tuple(map(float, range(1, 25))))
    quick = '{{ {} = {}, kind = "assumed", source = "test" }}'
    lines = [("swing", "fraction", 0.5), ("peak", "h", 12), ("begin", "h", 6), ("period", "h", 1)]
    text = "[arrival.day]\n" + "\n".join(f"{key} = {quick.format(unit, n)}" for key, unit, n in lines)
    wave = read(tmp_path, text).arrivals.day
    assert wave == Wave(swing=0.5, peak_s=1800.0, begin_s=900.0, period_s=3600.0)
    assert Workload.from_spec(find_workload("chat-day")).arrivals.day == Wave(swing=0.6, peak_s=54_000.0)


@pytest.mark.parametrize(
    ("day", "says"),
    [
        ("", "a diurnal process has day, rate"),
        ('[arrival.day]\nswing = { fraction = 0.5, kind = "assumed", source = "t" }', "swing and peak"),
        ('[arrival.day]\nhourly = { ratios = [1, 2], kind = "assumed", source = "t" }', "24 numbers"),
        (
            f'[arrival.day]\nhourly = {{ ratios = {[0] * 24}, kind = "assumed", source = "t" }}',
            "all of them are zero",
        ),
    ],
)
def test_a_day_that_is_none_is_refused_by_key(tmp_path, day: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        read(tmp_path, day)


def test_nonsense_is_refused() -> None:
    with pytest.raises(InputError, match=r"day\.swing"):
        Wave(swing=1.5, peak_s=0.0)
    with pytest.raises(InputError, match=r"day\.hourly"):
        Steps(factors=(0.0, 0.0))
    with pytest.raises(InputError, match=r"arrival\.day"):
        Arrivals(process=Process.DIURNAL, rate_per_s=1.0)
    with pytest.raises(InputError, match=r"arrival\.day"):
        Arrivals(process=Process.POISSON, rate_per_s=1.0, day=CURVES[0])
