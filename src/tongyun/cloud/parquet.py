"""Read the rows of a Parquet trace, a batch at a time; pyarrow comes with the extra `parquet`.

Decides nothing about a row: `trace` does.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tongyun.errors import InputError

_ROWS = 4096
"""Rows in memory at a time."""


def rows(path: Path, check: Callable[[Sequence[str]], None]) -> Generator[tuple[int, Mapping[str, Any]]]:
    """Each row by its number from 1, with its cells by column, once `check` has seen the columns' names."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise InputError(
            f"{path}: Parquet is read by pyarrow, which is not installed: pip install 'tongyun[parquet]'"
        ) from error
    with path.open("rb") as file:
        try:
            table = parquet.ParquetFile(file)
            check(table.schema_arrow.names)
            number = 0
            for batch in table.iter_batches(batch_size=_ROWS):
                for cells in batch.to_pylist():
                    number += 1
                    yield number, cells
        except pa.ArrowException as error:
            raise InputError(f"{path}: not a Parquet file that can be read: {error}") from error
