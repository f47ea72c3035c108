"""`tongyun plan` under a demand: percentiles by play, fewest chips, nothing left out uncounted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from tongyun.cli import build
from tongyun.cloud.workload import Arrival
from tongyun.codesign.demand import of_trace
from tongyun.errors import Infeasible, InputError

ASKED = ["--model", "Qwen/Qwen3-8B", "--chip", "h20", "--chips", "8", "--ttft-ms", "3000", "--tpot-ms", "40"]
SIZES = ["--isl", "1000", "--osl", "100"]


def found(*flags: str) -> dict[str, Any]:
    result = CliRunner().invoke(build(), ["plan", *ASKED, "--json", *flags])
    assert result.exit_code == 0, result.exception
    demand: dict[str, Any] = json.loads(result.stdout)["demand"]
    return demand


def refused(*flags: str) -> BaseException | None:
    return CliRunner().invoke(build(), ["plan", *ASKED, "--json", *flags]).exception


def test_the_best_keeps_both_limits_at_p99_and_leaves_the_other_chips_free() -> None:
    demand = found(*SIZES, "--rate", "4")
    best = demand["best"]
    assert best["ttft_s"]["p50"] <= best["ttft_s"]["p99"] <= 3
    assert best["tpot_s"]["p50"] <= best["tpot_s"]["p99"] <= 0.04
    assert best["chips"] + best["free_chips"] == 8
    assert best == demand["trials"][-1] and "simulated" in best["source"]


def test_more_requests_never_take_fewer_chips() -> None:
    chips = [found(*SIZES, "--rate", rate)["best"]["chips"] for rate in ("1", "8", "24")]
    assert chips == sorted(chips) and chips[0] < chips[-1]


def test_the_same_demand_gives_the_same_bytes() -> None:
    assert json.dumps(found("--workload", "chat")) == json.dumps(found("--workload", "chat"))


def test_a_described_workload_brings_lengths_that_spread_and_prefixes_that_are_shared() -> None:
    best = found("--workload", "chat", "--rate", "4")["best"]
    assert best["prefix_hits"] > 0.1
    assert best["ttft_s"]["p99"] > best["ttft_s"]["p50"]


def test_a_rate_nothing_carries_is_an_answer_of_no() -> None:
    error = refused(*SIZES, "--rate", "100000")
    assert isinstance(error, Infeasible)
    assert "carries 100000 requests/s" in str(error)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--rate", "3"], "how long are requests"),
        ([*SIZES, "--workload", "chat"], "one of --workload and --trace"),
        ([*SIZES, "--rate", "-1"], "accepted: a positive number"),
        (["--workload", "chatt"], "chat"),
    ],
)
def test_wrong_demands_are_refused(flags: list[str], says: str) -> None:
    error = refused(*flags)
    assert isinstance(error, InputError) and says in str(error)


def test_a_trace_is_played_at_its_own_rate_or_stretched_to_another() -> None:
    recorded = [Arrival(0.5 * i, 100, 10) for i in range(11)]
    assert of_trace(recorded, name="t").rate_per_s == pytest.approx(2)
    faster = of_trace(recorded, 4.0, name="t")
    assert faster.arrivals[-1].time_s == pytest.approx(2.5)
    with pytest.raises(InputError, match="have no rate"):
        of_trace(recorded[:1], name="t")
