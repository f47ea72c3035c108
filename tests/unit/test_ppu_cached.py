"""Compiled steps on disk: found again, told apart, and compiled anew when damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tongyun.chip.ppu import capture
from tongyun.chip.ppu.cached import cached_step, program_path
from tongyun.chip.ppu.fusions import Fusions
from tongyun.chip.ppu.program import Program
from tongyun.errors import InputError
from tongyun.specs import find_model, find_ppu

STEP: dict[str, Any] = {"tokens": 4, "context": 0, "layers": 1, "fusions": Fusions()}


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The cache in a folder of the test's own; one entry for each step that was compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls: list[int] = []
    real = capture.compile_step

    def counted(*given: Any, **step: Any) -> Any:
        calls.append(1)
        return real(*given, **step)

    monkeypatch.setattr(capture, "compile_step", counted)
    return calls


def test_a_step_is_compiled_once_and_again_when_its_file_is_damaged(compiled: list[int]) -> None:
    ppu, (config, _) = find_ppu("zhenwu-810e").at(), find_model("Qwen/Qwen3-0.6B")
    first, second = (cached_step(config, ppu, **STEP) for _ in range(2))
    assert len(compiled) == 1
    assert np.array_equal(first.words, second.words)
    assert first.tensors == second.tensors
    assert first.kernels == second.kernels
    path = program_path(config, ppu, **STEP)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError):
            Program.load(path)
        again = cached_step(config, ppu, **STEP)
        assert np.array_equal(again.words, first.words)
        assert path.read_bytes() == whole
    assert len(compiled) == 5
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no half-written file is left"


def test_what_a_program_depends_on_is_in_its_name() -> None:
    spec, (config, _) = find_ppu("zhenwu-810e"), find_model("Qwen/Qwen3-0.6B")
    ppu = spec.at()
    names = {
        program_path(config, ppu, **STEP),
        program_path({**config, "hidden_size": 512}, ppu, **STEP),
        program_path(config, find_ppu("a100").at(), **STEP),
        *(
            program_path(config, ppu, **{**STEP, **other})
            for other in (
                {"tokens": 5}, {"context": 1}, {"layers": 2}, {"fusions": Fusions(norm=False)},
            )
        ),
    }  # fmt: skip
    assert len(names) == 7
