"""The record of one run: what was asked, on what, and every row it produced.

A record is one SQLite file that is only ever appended to: triggers refuse changes.
Others may read it while it is written. Rows are a kind and a JSON object; what they
mean is known to whoever writes them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import sqlite3
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from tongyun import __version__
from tongyun.errors import InputError
from tongyun.report import plain, to_json

PACKAGES = ("torch", "numpy", "transformers")
_PAGE = 1000
_SCHEMA = """
CREATE TABLE header (key TEXT PRIMARY KEY, body TEXT NOT NULL) STRICT;
CREATE TABLE row (seq INTEGER PRIMARY KEY, at_s REAL NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL) STRICT;
CREATE INDEX row_kind ON row (kind, seq);
"""
_APPEND_ONLY = "CREATE TRIGGER {t}_{verb} BEFORE {verb} ON {t} BEGIN SELECT RAISE(ABORT, 'append only'); END"


def home() -> Path:
    """Where records and measured specs are kept: `$TONGYUN_HOME`, else the user's data directory."""
    if given := os.environ.get("TONGYUN_HOME"):
        return Path(given).expanduser()
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "tongyun"


def versions() -> dict[str, str]:
    """Versions of Python, Tongyun and what its numbers depend on, without importing any of it."""
    found = {"python": platform.python_version(), "tongyun": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str | int]:
    """This machine in words and numbers: processor, cores this process may use, memory, system."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


@dataclass(frozen=True, kw_only=True)
class Header:
    """Who ran what, when and where. `started` is UTC in ISO 8601."""

    id: str
    started: str
    command: tuple[str, ...]
    versions: Mapping[str, str]
    machine: Mapping[str, str | int]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that happened, `at_s` seconds after the run began."""

    seq: int
    at_s: float
    kind: str
    body: dict[str, Any]


class Writer:
    """Appends to a new record. Safe to share between threads; a block of rows is all or nothing."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)
        self._db.execute("PRAGMA journal_mode = WAL")  # readers do not wait for us, nor we for them
        self._db.execute("PRAGMA synchronous = NORMAL")

    @classmethod
    def create(cls, folder: Path, command: Iterable[str] | None = None) -> Writer:
        """Begin a record `folder/<id>.sqlite`; it appears there with its header already in it."""
        header = Header(
            id=f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}",
            started=datetime.now(UTC).isoformat(timespec="milliseconds"),
            command=tuple(sys.argv if command is None else command),
            versions=versions(),
            machine=machine(),
        )
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{header.id}.sqlite"
        temporary = folder / f".{header.id}.new"
        with closing(sqlite3.connect(temporary, isolation_level=None)) as db:
            db.executescript(f"BEGIN; {_SCHEMA}")
            db.executemany(
                "INSERT INTO header VALUES (?, ?)",
                [(key, to_json(value, indent=None)) for key, value in plain(header).items()],
            )
            for name in ("header", "row"):
                for verb in ("UPDATE", "DELETE"):
                    db.execute(_APPEND_ONLY.format(t=name, verb=verb))
            db.execute("COMMIT")
        temporary.replace(path)
        return cls(path, header)

    def append(self, kind: str, body: Any) -> None:
        """Add one row; `body` is a mapping or a dataclass."""
        self.append_all(kind, (body,))

    def append_all(self, kind: str, bodies: Iterable[Any]) -> None:
        """Add rows in one transaction: after a crash all of them are there or none."""
        at_s = time.monotonic() - self._began
        rows = [(at_s, kind, _object(body)) for body in bodies]
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.executemany("INSERT INTO row (at_s, kind, body) VALUES (?, ?, ?)", rows)
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def close(self) -> None:
        """Fold the journal into the file, so that the record is one file again."""
        with self._lock:
            self._db.execute("PRAGMA busy_timeout = 200")
            with suppress(sqlite3.OperationalError):  # a reader is in it: the journal stays beside the file
                self._db.execute("PRAGMA journal_mode = DELETE")
            self._db.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        outcome = "done" if error is None else f"{type(error).__name__}: {error}"
        self.append("end", {"outcome": outcome})
        self.close()


def _object(body: Any) -> str:
    value = plain(body)
    if not isinstance(value, dict):
        raise TypeError(f"a row is an object, not {type(body).__name__}")
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


class Run:
    """A record as a reader sees it, finished or still being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise InputError(f"{path}: no such record")
        try:
            with closing(self._connect()) as db:
                raw = {key: json.loads(body) for key, body in db.execute("SELECT key, body FROM header")}
            self.header = Header(**{**raw, "command": tuple(raw["command"])})
        except (sqlite3.DatabaseError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not a run record: {error}") from None

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True, timeout=30)

    def rows(self, kind: str | None = None, *, after: int = 0) -> Iterator[Row]:
        """Rows in the order written, those of one kind if given, those after `seq` `after`.

        Read a page at a time, so that a slow reader never holds the file against its writer.
        """
        of_kind = "" if kind is None else "AND kind = :kind"
        query = (
            f"SELECT seq, at_s, kind, body FROM row WHERE seq > :after {of_kind} ORDER BY seq LIMIT {_PAGE}"
        )
        with closing(self._connect()) as db:
            while page := db.execute(query, {"after": after, "kind": kind}).fetchall():
                for seq, at_s, name, body in page:
                    yield Row(seq=seq, at_s=at_s, kind=name, body=json.loads(body))
                after = page[-1][0]

    def kinds(self) -> dict[str, int]:
        """How many rows there are of each kind."""
        with closing(self._connect()) as db:
            return dict(db.execute("SELECT kind, count(*) FROM row GROUP BY kind ORDER BY kind"))

    @property
    def outcome(self) -> str | None:
        """How the run ended: `done`, or the error; None while it is written, or if it was killed."""
        end = list(self.rows("end"))
        return str(end[-1].body["outcome"]) if end else None


def runs(folder: Path) -> list[Run]:
    """The records in a folder, oldest first; files that are none are left out."""
    found = []
    for path in sorted(folder.glob("*.sqlite")):
        try:
            found.append(Run(path))
        except InputError:
            continue
    return found
