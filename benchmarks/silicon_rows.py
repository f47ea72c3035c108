"""Rows of the measured tables that `silicon.py` judges by: how they are read, and what a case of them is."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tongyun.chip.silicon import Library, Silicon

Array = NDArray[np.float64]
Price = Callable[[Silicon, Library, Array], Array]

CHIPS = {"a100": "a100_sxm", "h100": "h100_sxm"}
ENGINES = ("sglang", "vllm", "trtllm")
VERSIONS = {
    ("a100", "sglang"): "0.5.10",
    ("a100", "vllm"): "0.14.0",
    ("a100", "trtllm"): "1.0.0",
    ("h100", "sglang"): "0.5.14",
    ("h100", "vllm"): "0.24.0",
    ("h100", "trtllm"): "1.3.0rc20",
}
NCCL = {"a100": "2.27.3", "h100": "2.29.2"}
CACHE_BYTES = {"a100": 40 * 2**20, "h100": 50 * 2**20}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Measured rows of one kernel and how they are priced. `price(silicon, library, index)`."""

    bar: str
    what: str
    chip: str
    engine: str
    family: NDArray[np.int64]
    """0–9; 7 and up are held out."""
    measured_s: Array
    least_s: Array
    """Roofline with the datasheet's peaks: operations over rate, or compulsory bytes over bandwidth."""
    price: Price
    dropped: str = ""

    def rows(self, held_out: bool, most: int | None = None) -> Array:
        chosen = np.flatnonzero((self.family >= 7) == held_out)
        if most is not None and len(chosen) > most:
            chosen = np.random.default_rng(1).choice(chosen, most, replace=False)
        return chosen


class Columns(dict[str, NDArray[np.generic]]):
    """The columns of a table as arrays."""

    def keep(self, mask: NDArray[np.bool_]) -> Columns:
        return Columns({name: column[mask] for name, column in self.items()})

    def number(self, name: str) -> Array:
        return self[name].astype(np.float64)


def read(path: Path) -> Columns:
    from pyarrow import parquet

    table = parquet.read_table(path)
    return Columns(
        {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names if name != "device"}
    )


def families(*columns: NDArray[np.generic]) -> NDArray[np.int64]:
    """A digit for each row, the same for rows that agree in all columns."""
    names = ["x".join(str(v) for v in row) for row in zip(*columns, strict=True)]
    digit = {name: zlib.crc32(name.encode()) % 10 for name in set(names)}
    return np.asarray([digit[name] for name in names])
