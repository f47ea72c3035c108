"""The load generator against engines whose latencies are known beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from fakes import EOS
from typer.testing import CliRunner

from tongyun.cli.bench import bench
from tongyun.cloud.latency import RequestRecord, Slo
from tongyun.cloud.load import LoadOptions, LoadRun, Observer, measure
from tongyun.cloud.probe import Target
from tongyun.cloud.workload import Arrival, Arrivals, Lengths, Process, Workload, sample
from tongyun.errors import InputError, ServiceError
from tongyun.store import Run

TTFT_S, TPOT_S = 0.06, 0.01


def arrivals(count: int, rate_per_s: float = 50.0) -> list[Arrival]:
    process = Arrivals(process=Process.POISSON, rate_per_s=rate_per_s)
    return sample(
        Workload(arrivals=process, prompt=Lengths.fixed(40), output=Lengths.fixed(12), requests=count)
    )


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_known_latencies_come_back(open_gateway: Any, api: Any) -> None:
    seen: list[RequestRecord] = []
    with open_gateway(ttft_s=TTFT_S, tpot_s=TPOT_S) as running:
        load = arrivals(40)
        run = measure(
            Target(url=running.url, api=api),
            load,
            LoadOptions(slo=Slo(ttft_s=10.0, tpot_s=TPOT_S / 10), warmup_requests=2),
            Observer(record=seen.append),
        )
    report = run.report
    assert (report.requests, report.succeeded, report.failed, len(seen)) == (40, 40, 0, 40)
    assert (report.prompt_tokens, report.output_tokens) == (40 * 40, 40 * 12)
    # What the engine did on this machine, however busy; the runs of other lengths are probes.
    served = [moments for moments in running.engine.moments.values() if len(moments) == 13][-40:]
    assert report.ttft_s is not None
    assert report.tpot_s is not None
    true_ttft_s = median(moments[1] - moments[0] for moments in served)
    true_tpot_s = median((moments[-1] - moments[1]) / 11 for moments in served)
    assert TTFT_S <= true_ttft_s <= report.ttft_s.p50 <= true_ttft_s + 0.05
    assert report.tpot_s.p50 == pytest.approx(true_tpot_s, rel=0.15)
    assert report.met_slo == 0
    assert run.as_json()["source"] == "measured"
    assert [r.id for r in run.records] == [f"r{i}" for i in range(40)]
    assert run.uncounted == 0


def test_an_open_loop_does_not_wait_and_a_limit_shows_in_the_latency(open_gateway: Any) -> None:
    with open_gateway(ttft_s=0.2, tpot_s=0.005) as running:

        def run(limit: int | None) -> LoadRun:
            burst = [Arrival(0.0, 10, 2)] * 8
            return measure(
                Target(url=running.url), burst, LoadOptions(concurrency_limit=limit, warmup_requests=0)
            )

        free, limited = run(None), run(2)
    assert free.report.ttft_s is not None
    assert limited.report.ttft_s is not None
    assert free.report.duration_s < limited.report.duration_s / 2
    assert limited.report.duration_s > 0.8
    assert limited.report.ttft_s.most > 0.8
    assert limited.lag_s.most > 0.6


def test_failures_are_counted_by_kind(open_gateway: Any) -> None:
    with open_gateway(capacity=60) as running:
        load = [Arrival(0.01 * i, 50 if i % 2 else 10, 20) for i in range(10)]
        run = measure(Target(url=running.url), load, LoadOptions(warmup_requests=1))
    assert (run.report.succeeded, run.report.failed) == (5, 5)
    assert run.report.errors == (("HTTP 400 context_length_exceeded", 5),)
    assert run.details["HTTP 400 context_length_exceeded"] == "more KV blocks than there are"
    assert run.report.output_tokens == 5 * 20


def test_ignored_end_of_text_gives_the_asked_length(open_gateway: Any) -> None:
    with open_gateway(answer=lambda request, at: EOS) as running:
        run = measure(Target(url=running.url), arrivals(5), LoadOptions(warmup_requests=0))
    assert run.report.output_tokens == 5 * 12


def test_a_server_that_goes_away(open_gateway: Any) -> None:
    with open_gateway() as running:
        url = running.url
    with pytest.raises(ServiceError, match="cannot connect"):
        measure(Target(url=url), arrivals(1), LoadOptions())


def test_refusals_before_anything_is_timed(open_gateway: Any) -> None:
    with open_gateway(api_key="k", context_tokens=50) as running:
        with pytest.raises(ServiceError, match="invalid_api_key"):
            measure(Target(url=running.url), arrivals(1), LoadOptions())
        with pytest.raises(InputError, match=r"unknown model 'fak'; did you mean fake\?"):
            measure(Target(url=running.url, model="fak", api_key="k"), arrivals(1), LoadOptions())
        with pytest.raises(InputError, match=r"40 \+ 12 tokens; fake takes at most 50"):
            measure(Target(url=running.url, api_key="k"), arrivals(1), LoadOptions())


def test_the_command(open_gateway: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TONGYUN_HOME", str(tmp_path))
    flags = ["--requests", "20", "--rate", "100", "--isl", "20", "--osl", "4", "--slo-ttft-ms", "5000"]
    with open_gateway(tpot_s=0.002) as running:
        answer = CliRunner().invoke(bench, ["serving", "--url", running.url, *flags, "--json"])
        shown = CliRunner().invoke(bench, ["serving", "--url", running.url, *flags])
        short = CliRunner().invoke(bench, ["serving", "--url", running.url, "--trace", str(_trace(tmp_path))])
    assert answer.exit_code == shown.exit_code == short.exit_code == 0, answer.output
    result = json.loads(answer.stdout)
    assert (result["succeeded"], result["output_tokens"], result["met_slo"]) == (20, 80, 20)
    assert result["goodput_requests_per_s"] == result["requests_per_s"] > 0
    assert Run(Path(result["record"])).kinds() == {"request": 20, "load": 1, "end": 1}
    for word in ("TTFT ms", "TPOT ms", "p99", "goodput requests/s", "measured"):
        assert word in shown.stdout
    assert "3 of 3 requests" in short.stdout


def _trace(folder: Path) -> Path:
    file = folder / "t.jsonl"
    lines = [
        {"timestamp": 10 * i, "input_length": 600, "output_length": 3, "hash_ids": [1, i]} for i in range(3)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--endpoint", "chats"], "did you mean chat"),
        (["--slo-ttft-ms", "0"], "--slo-ttft-ms"),
        (["--concurrency-limit", "0"], "--concurrency-limit"),
        (["--rate", "-1"], "rate"),
        (["--requests", "0"], "requests"),
        (["--isl", "0"], "length"),
    ],
)
def test_bad_flags_are_input_errors(flags: list[str], says: str) -> None:
    answer = CliRunner().invoke(bench, ["serving", "--url", "http://127.0.0.1:1", *flags])
    assert isinstance(answer.exception, InputError)
    assert says in str(answer.exception)
