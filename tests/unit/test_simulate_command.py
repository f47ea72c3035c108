"""`tongyun simulate`: what it prints, what it refuses, and that its figures are those of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tongyun.cli import build
from tongyun.errors import Infeasible, InputError

BASE = ["simulate", "--model", "Qwen/Qwen3-8B", "--chip", "h200"]
CUT = ["--tp", "1", "--batch", "32"]


def run(*flags: str) -> dict[str, Any]:
    done = CliRunner().invoke(build(), [*BASE, *flags, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def refused(*flags: str) -> Exception:
    done = CliRunner().invoke(build(), [*BASE, *flags])
    assert isinstance(done.exception, Exception)
    return done.exception


def test_a_light_load_is_served_as_fast_as_it_comes() -> None:
    told = run("--chips", "2", "--rate", "4", "--isl", "500", "--osl", "50", "--requests", "200", *CUT)
    report = told["report"]
    assert report["succeeded"] == report["requests"] == 200
    assert report["output_tokens"] == 200 * 50
    assert told["output_tokens_per_s"] == pytest.approx(4 * 50, rel=0.25)
    assert told["pools"][0]["plan"]["replicas"] == len(told["engines"]) == 2
    assert 0 < told["use"] < 1
    assert told["joules"] > 0 and told["usd_per_mtoken"] > 0
    assert "simulated" in told["source"]
    assert report["ttft_s"]["p50"] <= report["ttft_s"]["p99"] <= report["ttft_s"]["p99_9"]


def test_without_a_cut_the_best_plan_is_taken_and_is_within_its_limits() -> None:
    told = run("--chips", "4", "--workload", "smoke", "--ttft-ms", "2000", "--tpot-ms", "30")
    assert told["pools"][0]["plan"]["shard"]["pp"] == 1
    assert told["attainment"] > 0.9


def test_bursts_make_the_first_token_wait() -> None:
    flags = ("--rate", "6", "--isl", "2000", "--osl", "50", "--requests", "300", *CUT)
    even, bursty = run(*flags), run(*flags, "--variation", "4")
    assert bursty["report"]["ttft_s"]["p99"] > 2 * even["report"]["ttft_s"]["p99"]
    occupied = bursty["kv_occupancy"][0]
    assert 0 < occupied["mean"] < occupied["p99"] <= occupied["most"] <= 1


def test_conversations_of_a_trace_find_their_prefixes(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 1000 * i, "input_length": 2048, "output_length": 20, "hash_ids": [i % 5, 10, 11, 12]}
        for i in range(40)
    ]
    trace = tmp_path / "turns.jsonl"
    trace.write_text("\n".join(map(json.dumps, lines)))
    flags = ("--chips", "5", "--trace", str(trace), *CUT)
    spread = run(*flags, "--router", "round-robin")
    kept = run(*flags, "--router", "prefix")
    off = run(*flags, "--no-prefix-caching")
    assert off["prefix_hits"] == 0
    # Five conversations on five engines in turn meet their own prefix as well.
    assert kept["prefix_hits"] >= spread["prefix_hits"] > 0.5


def test_what_cannot_be_simulated_is_refused_by_name(tmp_path: Path) -> None:
    assert "--rate, --workload and --trace" in str(refused(*CUT))
    assert "not --rate and --workload" in str(refused("--rate", "1", "--workload", "smoke"))
    assert "least-load" in str(refused("--rate", "1", "--router", "least-lod", *CUT))
    assert "--stretch is about --trace" in str(refused("--rate", "1", "--stretch", "2", *CUT))
    assert "--variation is about --rate" in str(refused("--workload", "smoke", "--variation", "2", *CUT))
    assert "takes 8" in str(refused("--rate", "1", "--tp", "8"))
    bad = tmp_path / "bad.csv"
    bad.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,ten,44\n")
    told = refused("--trace", str(bad))
    assert isinstance(told, InputError) and "bad.csv" in str(told) and "2" in str(told)


def test_bad_lines_are_left_out_and_counted_where_asked(tmp_path: Path) -> None:
    trace = tmp_path / "some.csv"
    good = "2023-11-16 18:15:46,100,10\n2023-11-16 18:15:47,100,10\n"
    trace.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{good}yesterday,1,1\n1,2\n{good}")
    done = CliRunner().invoke(build(), [*BASE, *CUT, "--trace", str(trace), "--skip-bad", "--json"])
    assert done.exit_code == 0
    assert "2 bad lines left out" in done.stderr and "some.csv" in done.stderr and "4" in done.stderr
    assert json.loads(done.stdout)["report"]["succeeded"] == 4
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n")
    assert "yesterday" in str(refused(*CUT, "--trace", str(trace), "--skip-bad"))


def test_a_model_that_does_not_fit_says_by_how_much() -> None:
    flags = ["simulate", "--model", "Qwen/Qwen3-235B-A22B", "--chip", "h200", "--rate", "1", "--tp", "1"]
    told = CliRunner().invoke(build(), flags).exception
    assert isinstance(told, Infeasible)
    # 470 GB of bf16 weights: to the byte, and what would hold them.
    assert "lacks 341,025,783,296 bytes (341 GB)" in str(
        told
    ) and "470,187,269,120 bytes (470 GB) of weights" in str(told)
    assert "Would fit: tp4 pp1 ep1 dp1, 4 chips a replica" in str(told)
    fits = CliRunner().invoke(build(), [*flags[:-1], "4", "--chips", "4", "--requests", "3"])
    assert fits.exit_code == 0


def test_results_are_told_by_class_and_model_and_add_up(tmp_path: Path) -> None:
    trace = tmp_path / "mine.csv"
    rows = [f"{i / 4},{500 + 40 * (i % 3)},{10 + i % 7},{'chat' if i % 3 else 'batch'}" for i in range(60)]
    trace.write_text("arrival_s,prompt_tokens,output_tokens,class\n" + "\n".join(rows))
    told = run("--trace", str(trace), "--ttft-ms", "500", *CUT)
    classes = told["classes"]
    assert set(classes) == {"chat", "batch"} and told["models"] == {}
    assert classes["batch"]["report"]["requests"] == 20
    for name in ("goodput_tokens_per_s", "output_tokens_per_s", "joules"):
        assert sum(one[name] for one in classes.values()) == pytest.approx(told[name])
    spent = sum(one["usd_per_mtoken"] * one["report"]["output_tokens"] for one in classes.values())
    assert spent == pytest.approx(told["usd_per_mtoken"] * told["report"]["output_tokens"])
    shown = CliRunner().invoke(build(), [*BASE, "--trace", str(trace), *CUT]).output
    assert "class" in shown and "batch" in shown and "20 of 20" in shown
