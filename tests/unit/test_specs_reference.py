"""A figure that is another file's: taken whole, and refused by key where there is none."""

from __future__ import annotations

import pytest

from tongyun.errors import SpecError
from tongyun.specs import PpuSpec, find_chip, find_ppu, loads
from tongyun.specs.find import CATALOG

TEXT = (CATALOG / "ppus" / "zhenwu-810e.toml").read_text(encoding="utf-8")
LINE = 'barrier = { same_as = "chips/zhenwu-810e#overhead.kernel_launch" }'


def test_a_reference_brings_number_range_kind_and_source() -> None:
    assert find_ppu("zhenwu-810e").shared.barrier == find_chip("zhenwu-810e").overhead.kernel_launch


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("chips/zhenwu-810#overhead.kernel_launch", "zhenwu-810e"),
        ("chip/zhenwu-810e#overhead.kernel_launch", "chips"),
        ("chips/zhenwu-810e#overhead.kernel_lunch", "kernel_launch"),
        ("chips/zhenwu-810e#overhead", "unknown key"),
        ("chips/zhenwu-810e", "kind/name#key"),
        ("chips/zhenwu-810e#memory.bandwidth", "unknown key"),
        ("ppus/zhenwu-810e#shared.barrier", "no figure with a number"),
    ],
)
def test_a_reference_to_nothing_is_refused_by_key(given: str, said: str) -> None:
    assert LINE in TEXT
    text = TEXT.replace(LINE, f'barrier = {{ same_as = "{given}" }}')
    with pytest.raises(SpecError, match=r"shared\.barrier") as refused:
        loads(text, PpuSpec)
    assert said in str(refused.value)


def test_a_reference_says_nothing_beside() -> None:
    text = TEXT.replace(LINE, LINE.replace(" }", ", us = 1 }"))
    with pytest.raises(SpecError, match="us"):
        loads(text, PpuSpec)
