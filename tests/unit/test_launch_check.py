"""Launch files read by the engines themselves, where one can be asked.

An engine is asked in the Python that TONGYUN_VLLM_PYTHON, TONGYUN_SGLANG_PYTHON, TONGYUN_RAY_PYTHON or
TONGYUN_KUBERNETES_PYTHON names, or in this one where it is installed here.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

MODULES = {"vllm": "vllm", "sglang": "sglang", "ray": "ray", "kubernetes": "kubernetes_validate"}


def check() -> ModuleType:
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("launch_check")
    finally:
        sys.path.remove(folder)


@pytest.mark.parametrize("engine", MODULES)
def test_an_engine_reads_its_files(engine: str) -> None:
    python = os.environ.get(f"TONGYUN_{engine.upper()}_PYTHON")
    if python is None and importlib.util.find_spec(MODULES[engine]) is not None:
        python = sys.executable
    if python is None:
        pytest.skip(f"{MODULES[engine]} is not installed and TONGYUN_{engine.upper()}_PYTHON names no Python")
    given = {**dict.fromkeys(MODULES), engine: python}
    found = check().check(argparse.Namespace(**given, lws=None, only=""))
    read = [(one, verdict, why) for one, verdict, why in found if why != "not given" and verdict != "no file"]
    assert [row for row in read if row[1] != "accepted"] == []
    assert len(read) >= 15


def test_everything_a_plan_starts_is_found_in_its_files() -> None:
    """Asked of nobody: both pools, the router and every object of one plan reach who reads them."""
    found = check().check(argparse.Namespace(**dict.fromkeys(MODULES), lws=None, only="own drafts, pools"))
    asked: dict[str, list[object]] = {}
    for one, verdict, why in found:
        assert (verdict, why) == ("unread", "not given")
        asked.setdefault(one.program, []).append(one.value)
    assert {program: len(values) for program, values in asked.items()} == {
        "vLLM": 5,  # two scripts; a StatefulSet, a leader and a worker
        "SGLang": 5,
        "vllm-router": 2,
        "sglang-router": 2,
        "Ray": 1,
        "Kubernetes": 8,
        "LeaderWorkerSet": 2,
    }
    for words in asked["vLLM"]:
        assert (
            isinstance(words, list) and "--tensor-parallel-size" in words and "--speculative-config" in words
        )
