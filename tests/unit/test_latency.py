import pytest

from tongyun.cloud.latency import Percentiles, RequestRecord, Slo, grouped, summarise
from tongyun.cloud.sched.request import Finish


def record(name="r", arrival=0.0, first=1.0, last=3.0, tokens=5, **more) -> RequestRecord:
    return RequestRecord(
        id=name,
        arrival_s=arrival,
        ended_s=more.pop("ended", last),
        prompt_tokens=more.pop("prompt", 10),
        output_tokens=tokens,
        first_token_s=first,
        last_token_s=last,
        **more,
    )


FAILED = RequestRecord(
    id="bad", arrival_s=0.0, ended_s=0.5, prompt_tokens=7, output_tokens=0, error="connection refused"
)


def test_one_record():
    one = record(arrival=0.5, first=1.0, last=3.0, tokens=5)
    assert (one.ttft_s, one.tpot_s, one.latency_s) == (0.5, 0.5, 2.5)
    assert one.ok


def test_one_token_has_no_tpot_and_misses_no_tpot_limit():
    one = record(first=1.0, last=1.0, tokens=1)
    assert one.tpot_s is None
    assert Slo(tpot_s=1e-9).met_by(one)


def test_percentiles_of_a_known_sample():
    known = Percentiles.of([float(n) for n in range(101)][::-1])
    assert known == Percentiles(
        mean=50.0, p50=50.0, p90=90.0, p99=99.0, p99_9=pytest.approx(99.9), most=100.0
    )
    assert Percentiles.of([1.0, None, 2.0]) == Percentiles(
        mean=1.5,
        p50=1.5,
        p90=pytest.approx(1.9),
        p99=pytest.approx(1.99),
        p99_9=pytest.approx(1.999),
        most=2.0,
    )
    assert Percentiles.of([None]) is None


def test_a_failed_request_counts_as_failed_and_nowhere_else():
    report = summarise([record(), record("s", arrival=1.0, first=2.0, last=4.0), FAILED])
    assert (report.requests, report.succeeded, report.failed) == (3, 2, 1)
    assert report.errors == (("connection refused", 1),)
    assert report.duration_s == 4.0
    assert report.prompt_tokens == 20 and report.output_tokens == 10
    assert report.output_tokens_per_s == 2.5
    assert report.total_tokens_per_s == 7.5
    assert report.requests_per_s == 0.5


@pytest.mark.parametrize("finish", [Finish.ABORT, Finish.ERROR])
def test_an_aborted_request_is_no_success(finish):
    report = summarise([record(finish=finish), record("s")])
    assert report.succeeded == 1 and report.errors == ((str(finish), 1),)


def test_goodput_counts_what_met_every_limit():
    fast = record("fast", first=0.1, last=0.5, tokens=5)
    slow_start = record("slow start", first=2.0, last=2.4, tokens=5)
    slow_flow = record("slow flow", first=0.1, last=4.0, tokens=5)
    report = summarise([fast, slow_start, slow_flow, FAILED], Slo(ttft_s=0.1, tpot_s=0.1))
    assert report.met_slo == 1
    assert report.attainment == 0.25
    assert report.goodput_requests_per_s == 0.25
    assert report.goodput_tokens_per_s == 1.25
    assert summarise([fast, slow_flow], Slo(latency_s=0.5)).met_slo == 1
    assert summarise([fast, slow_flow]).met_slo == 2


def test_nothing_to_sum_up_is_an_error():
    with pytest.raises(ValueError, match="no requests"):
        summarise([])
    with pytest.raises(ValueError, match="no time"):
        summarise([record(arrival=1.0, first=1.0, last=1.0)])


def test_a_run_in_which_everything_failed():
    report = summarise([FAILED])
    assert report.ttft_s is None and report.tpot_s is None
    assert report.output_tokens_per_s == 0.0 and report.attainment == 0.0


def test_groups_add_up_to_the_run():
    records = [
        record("a", priority_class="chat"),
        record("b", arrival=1.0, first=2.0, last=9.0, tokens=8, priority_class="batch", cached_tokens=4),
        record("c", first=0.5, last=2.0),
        FAILED,
    ]
    slo = Slo(ttft_s=1.0, tpot_s=0.6)
    whole, groups = summarise(records, slo), grouped(records, lambda one: one.priority_class, slo)
    reports = [group.report for group in groups.values()]
    assert list(groups) == ["", "batch", "chat"]
    for name in ("requests", "succeeded", "failed", "output_tokens", "met_slo", "output_tokens_within_slo"):
        assert sum(getattr(one, name) for one in reports) == getattr(whole, name)
    for name in ("requests_per_s", "output_tokens_per_s", "goodput_tokens_per_s"):
        assert sum(getattr(one, name) for one in reports) == pytest.approx(getattr(whole, name))
    assert sum(group.share for group in groups.values()) == pytest.approx(1.0)
    # Ten prompt tokens each: 15 and 15 computed for the others, 10 - 4 + 8 for the cached one.
    assert groups["batch"].share == pytest.approx(14 / 44)
    assert grouped([record(), FAILED], lambda one: one.priority_class) == {}
