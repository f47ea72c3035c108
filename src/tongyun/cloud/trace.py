"""Read recorded workloads.

Two published formats: the Azure LLM inference CSV (moment, prompt and generated tokens)
and the Mooncake JSONL (the same and the hashes of 512-token prompt blocks); and a CSV or
Parquet file of one's own, whose columns have names. A line, or row, that is not what it
should be is refused by file and number, or left out where the caller keeps count; nothing
is repaired.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from tongyun.cloud.parquet import rows as parquet_rows
from tongyun.cloud.workload import HASH_BLOCK_TOKENS, Arrival
from tongyun.errors import InputError, TraceError, unknown

_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_NEEDED, _OPTIONAL = ("arrival_s", "prompt_tokens", "output_tokens"), ("model", "class", "hash_ids")
_MOONCAKE_KEYS = ("timestamp", "input_length", "output_length", "hash_ids")


Refuse = Callable[[TraceError], None]
"""What is done with a bad line: raise the error, or remember it and go on."""


def read_trace(
    path: Path, *, limit: int | None = None, skipped: list[TraceError] | None = None
) -> list[Arrival]:
    """Arrivals of a trace in order of time, the first at 0; `.jsonl` is Mooncake's format, `.csv`
    Azure's or, by its header, one of seconds and lengths with optional model, class and hash ids,
    and `.parquet` has the columns of the latter.

    `limit` keeps the first so many. With a list `skipped`, the errors of bad lines go there and
    the lines are left out; a bad header and a file that cannot be read are refused all the same.
    """

    def refuse(error: TraceError) -> None:
        if skipped is None:
            raise error
        skipped.append(error)

    readers: dict[str, Callable[[Path, Refuse], Generator[Arrival]]] = {
        ".csv": _csv,
        ".jsonl": _mooncake,
        ".parquet": _parquet,
    }
    if path.suffix not in readers:
        raise InputError(f"{path}: {unknown('trace format', path.suffix, readers)}")
    try:
        with closing(readers[path.suffix](path, refuse)) as read:
            arrivals = list(islice(read, limit))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error}") from error
    if not arrivals:
        raise skipped[0] if skipped else TraceError(path, 1, "the trace holds no requests")
    # Recorders write what ended, not what came, so neighbours may be out of order.
    arrivals.sort(key=lambda arrival: arrival.time_s)
    start_s = arrivals[0].time_s
    return [arrival._replace(time_s=arrival.time_s - start_s) for arrival in arrivals]


def _lines(path: Path) -> Generator[str]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from file


def _csv(path: Path, refuse: Refuse) -> Generator[Arrival]:
    with closing(_lines(path)) as lines:
        rows = csv.reader(lines, strict=True)
        try:
            header = next(rows, [])
            read = _azure_row if tuple(header) == _AZURE_COLUMNS else _own(path, header)
            for row in filter(None, rows):
                try:
                    arrival = read(path, rows.line_num, row)
                except TraceError as error:
                    refuse(error)
                else:
                    yield arrival
        except csv.Error as error:
            raise TraceError(path, rows.line_num, str(error)) from error


def _own(path: Path, header: list[str]) -> Callable[[Path, int, list[str]], Arrival]:
    """How to read a row under a header that names its columns, in any order."""
    _check_own(path, header, f"{', '.join(_AZURE_COLUMNS)}; or ")

    def read(path: Path, line: int, row: list[str]) -> Arrival:
        if len(row) != len(header):
            raise TraceError(path, line, f"{len(row)} fields, not {len(header)}")
        cells: dict[str, Any] = dict(zip(header, row, strict=True))
        for key in _NEEDED[1:]:
            cells[key] = _whole(path, line, key, cells[key])
        return _own_row(path, line, cells)

    return read


def _parquet(path: Path, refuse: Refuse) -> Generator[Arrival]:
    with closing(parquet_rows(path, lambda names: _check_own(path, names))) as rows:
        for number, cells in rows:
            try:
                arrival = _own_row(path, number, cells)
            except TraceError as error:
                refuse(error)
            else:
                yield arrival


def _check_own(path: Path, header: Sequence[str], others: str = "") -> None:
    lacking = [name for name in _NEEDED if name not in header]
    strange = [name for name in header if name not in (*_NEEDED, *_OPTIONAL)]
    if lacking or strange or len(set(header)) < len(header):
        accepted = f"{others}{', '.join(_NEEDED)} and any of {', '.join(_OPTIONAL)}"
        raise TraceError(path, 1, f"columns are {list(header)}; accepted: {accepted}")


def _own_row(path: Path, line: int, cells: Mapping[str, Any]) -> Arrival:
    prompt, output = (_positive(path, line, key, _integral(cells[key])) for key in _NEEDED[1:])
    told = cells.get("hash_ids") or ()
    if isinstance(told, str):
        told = [_whole(path, line, "hash_ids", one) for one in told.split()]
    if not isinstance(told, Sequence) or not all(_is_whole(one) and one >= 0 for one in told):
        raise TraceError(path, line, f"hash_ids: {told!r} are no whole numbers")
    _check_blocks(path, line, told, prompt)
    return Arrival(
        _seconds(path, line, cells["arrival_s"]),
        prompt,
        output,
        hash_ids=tuple(told),
        model=_label(path, line, "model", cells.get("model")),
        priority_class=_label(path, line, "class", cells.get("class")),
    )


def _integral(value: object) -> object:
    """Whole numbers of a column that also has empty cells are floats where others wrote them."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _label(path: Path, line: int, key: str, value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TraceError(path, line, f"{key}: {value!r} is no text")
    return value or None


def _seconds(path: Path, line: int, told: object) -> float:
    try:
        moment_s = float(told) if isinstance(told, str) or _is_number(told) else -1.0  # type: ignore[arg-type]
    except ValueError:
        moment_s = -1.0
    if not 0 <= moment_s < float("inf"):
        raise TraceError(path, line, f"arrival_s: '{told}' is no number of seconds")
    return moment_s


def _check_blocks(path: Path, line: int, hash_ids: Sequence[int], prompt: int) -> None:
    if (len(hash_ids) - 1) * HASH_BLOCK_TOKENS >= prompt:
        raise TraceError(path, line, f"hash_ids: {len(hash_ids)} blocks are more than {prompt} tokens fill")


def _azure_row(path: Path, line: int, row: list[str]) -> Arrival:
    if len(row) != len(_AZURE_COLUMNS):
        raise TraceError(path, line, f"{len(row)} fields, not {len(_AZURE_COLUMNS)}")
    try:
        # Naive moments differ by the same amount in any zone; only differences are used.
        moment = datetime.fromisoformat(row[0]).replace(tzinfo=None)
    except ValueError as error:
        raise TraceError(path, line, f"TIMESTAMP: '{row[0]}' is no date and time") from error
    prompt, output = (
        _positive(path, line, key, _whole(path, line, key, text))
        for key, text in zip(_AZURE_COLUMNS[1:], row[1:], strict=True)
    )
    return Arrival((moment - _EPOCH).total_seconds(), prompt, output)


def _whole(path: Path, line: int, key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise TraceError(path, line, f"{key}: '{text}' is no whole number")
    return int(text)


_EPOCH = datetime(1970, 1, 1)


def _mooncake(path: Path, refuse: Refuse) -> Generator[Arrival]:
    with closing(_lines(path)) as lines:
        for line, text in enumerate(lines, start=1):
            if text.strip():
                try:
                    arrival = _mooncake_line(path, line, text)
                except TraceError as error:
                    refuse(error)
                else:
                    yield arrival


def _mooncake_line(path: Path, line: int, text: str) -> Arrival:
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise TraceError(path, line, f"not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(entry, dict):
        raise TraceError(path, line, "not a JSON object")
    for key in _MOONCAKE_KEYS:
        if key not in entry:
            raise TraceError(path, line, f"{key} is missing; accepted: {', '.join(_MOONCAKE_KEYS)}")
    milliseconds = entry["timestamp"]
    if not _is_number(milliseconds) or not 0 <= milliseconds < float("inf"):
        raise TraceError(path, line, f"timestamp: {milliseconds!r} is no number of milliseconds")
    prompt = _positive(path, line, "input_length", entry["input_length"])
    output = _positive(path, line, "output_length", entry["output_length"])
    hash_ids = entry["hash_ids"]
    if not isinstance(hash_ids, list) or not all(_is_whole(one) and one >= 0 for one in hash_ids):
        raise TraceError(path, line, "hash_ids: must be a list of whole numbers")
    _check_blocks(path, line, hash_ids, prompt)
    return Arrival(milliseconds / 1e3, prompt, output, hash_ids=tuple(hash_ids))


def _positive(path: Path, line: int, key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TraceError(path, line, f"{key}: {value!r} is no positive whole number")
    return value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
