import json

import pytest

from tongyun.cloud.trace import read_trace
from tongyun.cloud.workload import Arrival
from tongyun.errors import InputError, TraceError

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
LINE = {"timestamp": 1500, "input_length": 600, "output_length": 7, "hash_ids": [4, 5]}


@pytest.fixture
def write(tmp_path):
    def make(name: str, text: str):
        path = tmp_path / name
        path.write_text(text)
        return path

    return make


def test_azure(write):
    path = write(
        "t.csv",
        f"{HEADER}2023-11-16 18:15:50.9951690,396,109\n"
        "2023-11-16 18:15:46.6805900,374,44\n\n"
        "2023-11-17 18:15:46.6805900,3,1\n",
    )
    assert read_trace(path) == [
        Arrival(0.0, 374, 44),
        Arrival(pytest.approx(4.314579), 396, 109),
        Arrival(86400.0, 3, 1),
    ]
    assert read_trace(path, limit=1) == [Arrival(0.0, 396, 109)]


def test_mooncake(write):
    second = json.dumps({**LINE, "timestamp": 4000, "hash_ids": []})
    path = write("t.jsonl", f"{json.dumps(LINE)}\n{second}\n")
    assert read_trace(path) == [Arrival(0.0, 600, 7, hash_ids=(4, 5)), Arrival(2.5, 600, 7)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("2023-11-16 18:15:46,374", "2 fields, not 3"),
        ("yesterday,374,44", "TIMESTAMP: 'yesterday'"),
        ("2023-11-16 18:15:46,-5,44", "ContextTokens: '-5'"),
        ("2023-11-16 18:15:46,374,4.5", "GeneratedTokens: '4.5'"),
        ("2023-11-16 18:15:46,374,0", "GeneratedTokens: 0"),
        ('2023-11-16 18:15:46,"374,0', "unexpected end of data"),
    ],
)
def test_azure_lines_are_refused_by_number(write, row, message):
    path = write("t.csv", f"{HEADER}2023-11-16 18:15:46,374,44\n{row}\n")
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}:3: ") and message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ({"timestamp": None}, "timestamp"),
        ({"timestamp": float("nan")}, "timestamp"),
        ({"timestamp": True}, "timestamp"),
        ({"input_length": "600"}, "input_length"),
        ({"output_length": 0}, "output_length"),
        ({"hash_ids": 3}, "hash_ids"),
        ({"hash_ids": [1.5]}, "hash_ids"),
        ({"hash_ids": [1, 2, 3]}, "3 blocks are more than 600"),
    ],
)
def test_mooncake_lines_are_refused_by_number(write, change, message):
    bad = change if isinstance(change, str) else json.dumps({**LINE, **change})
    path = write("t.jsonl", f"{json.dumps(LINE)}\n{bad}\n")
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)


def test_a_missing_key_is_named(write):
    path = write("t.jsonl", json.dumps({key: LINE[key] for key in LINE if key != "hash_ids"}))
    with pytest.raises(TraceError, match="hash_ids is missing"):
        read_trace(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", HEADER, "no requests"),
        ("t.csv", "", "columns are"),
        ("t.csv", "a,b,c\n1,2,3\n", "accepted: TIMESTAMP"),
        ("t.jsonl", "", "no requests"),
        ("t.json", "{}", "did you mean .jsonl"),
    ],
)
def test_other_files_are_refused(write, name, text, message):
    with pytest.raises(InputError, match=message):
        read_trace(write(name, text))


def test_a_missing_file_and_a_binary_one_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read_trace(tmp_path / "t.csv")


OWN = "arrival_s,class,prompt_tokens,output_tokens,hash_ids\n"


def test_a_csv_that_names_its_columns(write):
    path = write("t.csv", f"{OWN}2.5,batch,600,7,4 5\n1,,20,3,\n")
    assert read_trace(path) == [
        Arrival(0.0, 20, 3),
        Arrival(1.5, 600, 7, hash_ids=(4, 5), priority_class="batch"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1,a,20,3", "4 fields, not 5"),
        ("soon,a,20,3,", "arrival_s: 'soon'"),
        ("nan,a,20,3,", "arrival_s: 'nan'"),
        ("1,a,20.5,3,", "prompt_tokens: '20.5'"),
        ("1,a,20,0,", "output_tokens: 0"),
        ("1,a,20,3,1 x", "hash_ids: 'x'"),
        ("1,a,20,3,1 2", "2 blocks are more than 20"),
    ],
)
def test_its_lines_are_refused_by_number_or_skipped(write, row, message):
    path = write("t.csv", f"{OWN}0,a,20,3,\n{row}\n")
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}:3: ") and message in str(caught.value)
    skipped = []
    assert len(read_trace(path, skipped=skipped)) == 1 and message in str(skipped[0])


def test_its_header_is_refused_by_what_is_accepted(write):
    for header in ("arrival_s,prompt_tokens", "arrival_s,prompt_tokens,output_tokens,colour"):
        with pytest.raises(TraceError, match=r"accepted: .*arrival_s"):
            read_trace(write("t.csv", f"{header}\n"))


@pytest.fixture
def parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    from pyarrow import parquet as files

    def make(**columns):
        path = tmp_path / "t.parquet"
        files.write_table(pyarrow.table(columns), path)
        return path

    return make


def test_parquet_has_the_columns_of_the_csv(parquet):
    path = parquet(
        prompt_tokens=[600, 20],
        arrival_s=[3.5, 1.0],
        output_tokens=[7.0, 5.0],
        hash_ids=[[4, 5], None],
        model=["a", None],
        **{"class": [None, "batch"]},
    )
    assert read_trace(path) == [
        Arrival(0.0, 20, 5, priority_class="batch"),
        Arrival(2.5, 600, 7, hash_ids=(4, 5), model="a"),
    ]
    assert read_trace(parquet(arrival_s=[0], prompt_tokens=[600], output_tokens=[1], hash_ids=["4 5"])) == [
        Arrival(0.0, 600, 1, hash_ids=(4, 5))
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"arrival_s": [0.0, -1.0]}, ":2: arrival_s: '-1.0' is no number of seconds"),
        ({"arrival_s": [0.0, None]}, ":2: arrival_s: 'None' is no number"),
        ({"prompt_tokens": [5, 0]}, ":2: prompt_tokens: 0 is no positive"),
        ({"prompt_tokens": [5.0, 1.5]}, ":2: prompt_tokens: 1.5 is no positive"),
        ({"output_tokens": ["1", "x"]}, ":1: output_tokens: '1' is no positive"),
        ({"hash_ids": [[1], [1, 2]]}, ":2: hash_ids: 2 blocks are more than 5 tokens fill"),
        ({"hash_ids": [[1], [-1]]}, ":2: hash_ids: [-1] are no whole numbers"),
        ({"class": [None, 3]}, ":2: class: 3 is no text"),
        ({"tokens": [1, 2]}, ":1: columns are "),
    ],
)
def test_parquet_rows_are_refused_by_number(parquet, columns, message):
    rows = {"arrival_s": [0.0, 1.0], "prompt_tokens": [5, 5], "output_tokens": [1, 1]}
    with pytest.raises(TraceError) as caught:
        read_trace(parquet(**{**rows, **columns}))
    assert message in str(caught.value)


def test_bad_parquet_rows_are_left_out_and_counted(parquet):
    skipped: list[TraceError] = []
    path = parquet(arrival_s=[0.0, 1.0, 2.0], prompt_tokens=[5, 0, 5], output_tokens=[1, 1, 0])
    assert read_trace(path, skipped=skipped) == [Arrival(0.0, 5, 1)]
    assert [error.line for error in skipped] == [2, 3]


def test_what_is_no_parquet_is_refused_by_file(parquet, write):
    path = write("t.parquet", "arrival_s,prompt_tokens\n" * 10)
    with pytest.raises(InputError, match=r"t\.parquet: not a Parquet file"):
        read_trace(path)


def test_without_pyarrow_the_extra_is_named(write, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"t\.parquet: .*pip install 'tongyun\[parquet\]'"):
        read_trace(write("t.parquet", "x"))
