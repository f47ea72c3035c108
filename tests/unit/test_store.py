"""The run record: append-only, all or nothing, readable while it is written."""

import math
import multiprocessing
import os
import sqlite3
import threading
import time
from pathlib import Path

import pytest

from tongyun import store
from tongyun.errors import InputError
from tongyun.store import Run, Writer, runs
from tongyun.units import DType


def test_a_run_is_written_and_read_back(tmp_path: Path) -> None:
    with Writer.create(tmp_path, ["tongyun", "plan"]) as writer:
        writer.append("plan", {"tp": 2, "dtype": DType.BF16, "tpot_s": math.nan})
        writer.append_all("sample", ({"i": i} for i in range(3)))
    run = Run(writer.path)
    assert run.header == writer.header
    assert run.header.command == ("tongyun", "plan")
    assert run.header.versions["tongyun"] and run.header.machine["cores"]
    [plan] = run.rows("plan")
    assert plan.body == {"tp": 2, "dtype": "bf16", "tpot_s": None} and plan.at_s >= 0
    assert [row.body["i"] for row in run.rows("sample")] == [0, 1, 2]
    assert [row.seq for row in run.rows(after=2)] == [3, 4, 5]
    assert run.kinds() == {"plan": 1, "sample": 3, "end": 1}
    assert run.outcome == "done"
    assert [file.name for file in tmp_path.iterdir()] == [writer.path.name]


def test_an_error_ends_the_run_and_is_recorded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broke"), Writer.create(tmp_path, []) as writer:
        raise ValueError("broke")
    assert Run(writer.path).outcome == "ValueError: broke"


def test_others_read_while_it_is_written(tmp_path: Path) -> None:
    writer = Writer.create(tmp_path, [])
    run = Run(writer.path)
    assert run.outcome is None and list(run.rows()) == []
    writer.append("a", {"x": 1})
    assert [row.body for row in run.rows()] == [{"x": 1}]
    reading = run.rows()
    writer.append("a", {"x": 2})
    assert next(reading).body == {"x": 1}
    writer.append("a", {"x": 3})
    began = time.monotonic()
    writer.close()
    assert time.monotonic() - began < 5  # the reader above is not finished, and nobody waits for it
    assert [row.body["x"] for row in (*reading, *run.rows())] == [2, 3, 1, 2, 3]


def test_rows_come_all_or_none(tmp_path: Path) -> None:
    writer = Writer.create(tmp_path, [])
    with pytest.raises(TypeError, match="no JSON form"):
        writer.append_all("a", [{"x": 1}, {"x": object()}])
    with pytest.raises(TypeError, match="a row is an object, not list"):
        writer.append("a", [1])
    assert Run(writer.path).kinds() == {}
    writer.append("a", {"x": 1})
    writer.close()
    assert Run(writer.path).kinds() == {"a": 1}


@pytest.mark.parametrize(
    "sql",
    ["DELETE FROM row", "UPDATE row SET body = '{}'", "DELETE FROM header", "UPDATE header SET body = '1'"],
)
def test_what_is_written_stays(tmp_path: Path, sql: str) -> None:
    with Writer.create(tmp_path, []) as writer:
        writer.append("a", {"x": 1})
    db = sqlite3.connect(writer.path)
    with pytest.raises(sqlite3.IntegrityError, match="append only"):
        db.execute(sql)
    db.close()


def test_threads_share_a_writer(tmp_path: Path) -> None:
    with Writer.create(tmp_path, []) as writer:
        threads = [
            threading.Thread(target=lambda n=n: [writer.append(f"t{n}", {"i": i}) for i in range(50)])
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    kinds = Run(writer.path).kinds()
    assert [kinds[f"t{n}"] for n in range(4)] == [50] * 4
    assert [row.body["i"] for row in Run(writer.path).rows("t0")] == list(range(50))


def _write_and_die(folder: Path) -> None:
    writer = Writer.create(folder, ["dies"])
    for i in range(20):
        writer.append("a", {"i": i})
    os._exit(9)


def test_a_killed_run_keeps_its_rows(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_write_and_die, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    [run] = runs(tmp_path)
    assert run.outcome is None and len(list(run.rows("a"))) == 20


def test_what_is_no_record_is_refused_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "text.sqlite").write_text("hello, this is no database at all" * 10)
    sqlite3.connect(tmp_path / "empty.sqlite").close()
    for name in ("text", "empty"):
        with pytest.raises(InputError, match=f"{name}.sqlite: not a run record"):
            Run(tmp_path / f"{name}.sqlite")
    with pytest.raises(InputError, match="no such record"):
        Run(tmp_path / "none.sqlite")
    first, second = (Writer.create(tmp_path, [str(i)]) for i in range(2))
    first.close()
    second.close()
    assert {run.header.id for run in runs(tmp_path)} == {first.header.id, second.header.id}


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TONGYUN_HOME", str(tmp_path))
    assert store.home() == tmp_path
    monkeypatch.delenv("TONGYUN_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert store.home() == tmp_path / "tongyun"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert store.home() == Path.home() / ".local" / "share" / "tongyun"


def test_versions_and_machine() -> None:
    assert {"python", "tongyun", "numpy"} <= set(store.versions())
    machine = store.machine()
    assert machine["processor"] and int(machine["memory_bytes"]) > 2**28


def test_a_reader_takes_many_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_PAGE", 7)
    with Writer.create(tmp_path, []) as writer:
        writer.append_all("a", ({"i": i} for i in range(50)))
        writer.append("b", {})
    assert [row.body["i"] for row in Run(writer.path).rows("a")] == list(range(50))
    assert [row.seq for row in Run(writer.path).rows()] == list(range(1, 53))
