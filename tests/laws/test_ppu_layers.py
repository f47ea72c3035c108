"""Layers captured once and repeated are those captured one by one; scratch does not grow with them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tongyun.chip.ppu import capture
from tongyun.specs import find_model, find_ppu

PPU = dataclasses.replace(find_ppu("zhenwu-810e").at(), hbm_bytes=10**12)


@pytest.mark.parametrize(("model", "chips"), [("Qwen/Qwen3-0.6B", 1), ("Qwen/Qwen3-235B-A22B", 8)])
@pytest.mark.parametrize(("tokens", "context"), [(64, 0), (1, 300)])
def test_repeated_layers_are_the_captured_ones_word_for_word(
    model: str, chips: int, tokens: int, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = find_model(model)
    given = {"tokens": tokens, "context": context, "layers": 5, "chips": chips}
    repeated = capture.compile_step(config, PPU, **given)
    monkeypatch.setattr(capture, "CAPTURED", 5)
    whole = capture.compile_step(config, PPU, **given)
    assert np.array_equal(repeated.program.words, whole.program.words)
    assert [each.layer for each in repeated.program.kernels] == [each.layer for each in whole.program.kernels]
    assert repeated.inputs == whole.inputs
    assert repeated.output_shapes == whole.output_shapes


def test_scratch_does_not_grow_with_the_layers() -> None:
    config, _ = find_model("Qwen/Qwen3-0.6B")
    sizes = [
        capture.compile_step(config, PPU, tokens=1024, context=64, layers=layers).program for layers in (4, 8)
    ]
    scratch = []
    for program in sizes:
        lasting = sum(each.room for each in program.tensors if each.role != "scratch")
        scratch.append(program.hbm_bytes - lasting)
    # Only the cache's new lengths, which are results, stay: 256 bytes a layer.
    assert scratch[1] - scratch[0] <= 4 * 256
