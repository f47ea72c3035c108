"""Reading and writing spec files: what is refused, with which words, and that nothing else happens."""

import copy
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tongyun.errors import SpecError
from tongyun.specs import (
    Calibration,
    ChipSpec,
    Figure,
    WorkloadSpec,
    dumps,
    find,
    find_chip,
    load,
    loads,
    save,
)
from tongyun.specs.figure import DIMENSIONS, KINDS, LABELS, TIME
from tongyun.specs.form import Fact, Where, read_fields
from tongyun.specs.samples import (
    AttentionSample,
    GroupedMatmulSample,
    MatmulSample,
    MemorySample,
    OverheadSample,
)
from tongyun.units import DType, Source

GOOD = dumps(find_chip("h200"))
TDP = 'tdp = { w = 700, kind = "vendor", source = '
VENDOR = ', kind = "vendor", source = '


def tdp(figure: str) -> str:
    return broken(TDP, f"tdp = {{ {figure}{VENDOR}")


def broken(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (broken("[power]", "[powr]"), r"mine.toml: powr: unknown key 'powr'; did you mean power,"),
        (
            broken("[power]\ntdp", "[power]\ntpd"),
            r"power.tpd: unknown key 'tpd'; did you mean tdp\?",
        ),
        (broken(TDP, 'tdp = { kind = "vendor", source = '), r"power.tdp: no unit; .*exactly one of: kw, w"),
        (tdp("gb = 700"), r"power.tdp.gb: unknown key 'gb'.*watts"),
        (tdp("w = 700, kw = 0.7"), r"power.tdp: 2 units given \(w, kw\)"),
        (tdp("w = -1"), r"power.tdp.w: expected a finite number ≥ 0"),
        (tdp("w = inf"), r"power.tdp.w: expected a finite number"),
        (tdp("w = nan"), r"power.tdp.w: expected a finite number"),
        (tdp("w = true"), r"power.tdp.w: expected a number, got True"),
        (tdp('w = "700"'), r"power.tdp.w: expected a number, got '700'"),
        (tdp("w = 700, low = 800"), r"power.tdp: expected low ≤ value"),
        (tdp("w = 700, high = 1"), r"power.tdp: expected low ≤ value"),
        (
            broken(TDP, 'tdp = { w = 700, kind = "guess", source = '),
            r"power.tdp.kind: .*'guess'.*accepted: assumed",
        ),
        (broken(TDP, 'tdp = { w = 700, kind = "simulated", source = '), r"power.tdp.kind: unknown value"),
        (broken(TDP, "tdp = { w = 700, source = "), r"power.tdp: no kind"),
        (broken(TDP, 'tdp = { w = 700, kind = "vendor", note = '), r"power.tdp.note: unknown key"),
        (
            broken('kind = "accelerator"', 'kind = "gpu"'),
            r"kind: unknown value 'gpu'.*accepted: accelerator, cpu",
        ),
        (broken('name = "h200"', "name = 200"), r"name: expected a text"),
        (broken('name = "h200"', 'name = " "'), r"name: expected a text that is not empty"),
        (broken('name = "h200"\n', ""), r"name: missing"),
        (broken('["h200-sxm"]', '["a", "a"]'), r"aliases: the same text twice"),
        (broken("{ gb = 141,", "{ gb = 1e300, high = 1e305,"), r"memory.capacity: too large"),
        (
            broken(
                '{ count = 8, kind = "vendor", source = "HGX', '{ count = 8.5, kind = "vendor", source = "HGX'
            ),
            r"chips_per_node: expected a whole number",
        ),
        (broken("fraction = 0.8033", "fraction = 1.2"), r"matmul.achieved.bf16: 1.2 is above 1"),
        (GOOD.replace("fp8 =", "f8 ="), r"matmul.peak.f8: unknown data type 'f8'; did you mean fp8"),
        (broken('topology = "switch"', 'topology = "swich"'), r"scale_up.topology: .*did you mean switch"),
        ("name = \n", r"mine.toml: line 1: not TOML"),
        ("\n\nname = 'a\n", r"mine.toml: line 3: not TOML"),
        ("name = 'a'\nname = 'b'\n", r"mine.toml: line 2: not TOML"),
        ("power = 3", r"power: expected a table|chips_per_node: missing|name: missing"),
        ("x = " + "[" * 3000, r"not TOML|nested too deeply"),
        ("x = " + "9" * 5000, r"mine.toml: "),
    ],
)
def test_bad_files_are_refused_by_file_and_key(text: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        loads(text, ChipSpec, file="mine.toml")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match=r"bad.toml: cannot be read"):
        load(path, ChipSpec)


@pytest.mark.parametrize("dimension", DIMENSIONS, ids=lambda d: d.name)
@given(data=st.data())
@settings(max_examples=30)
def test_every_figure_survives_writing_and_reading(dimension: Any, data: st.DataObject) -> None:
    if dimension.whole:
        numbers: Any = st.integers(0, 10**9).map(float)
    else:
        numbers = st.floats(0, dimension.most or 1e18, allow_subnormal=False)
    low, value, high = sorted(data.draw(st.tuples(numbers, numbers, numbers)))
    figure = Figure.of(value, Source.ASSUMED, "a 'quoted' \"source\"\n\\ with µ", low=low, high=high)
    form = Fact(dimension)
    assert form.read(form.plain(figure), Where("x")) == figure
    assert set(dimension.units) <= set(LABELS)


def test_units_mean_what_they_say() -> None:
    form = Fact(TIME)
    figure = form.read({"us": 5, "low": 0.1, "kind": "measured", "source": "s"}, Where("x"))
    assert (figure.value, figure.low, figure.high) == (5e-6, 1e-7, 5e-6)
    assert figure.source is Source.MEASURED
    assert set(KINDS) == {Source.VENDOR, Source.MEASURED, Source.DERIVED, Source.ASSUMED}


def calibrated() -> ChipSpec:
    base = find_chip("h200")
    samples = Calibration(
        when="2026-01-02T03:04:05+00:00",
        tool="tongyun calibrate",
        machine={"processor": 'AMD "EPYC"', "cores": 2, "load": 0.25, "shared": True},
        matmul=(MatmulSample(dtype=DType.BF16, m=1, n=1024, k=512, seconds=1.25e-6),),
        grouped_matmul=(GroupedMatmulSample(dtype=DType.F32, m=8, n=64, k=32, groups=4, seconds=3e-5),),
        memory=(MemorySample(footprint_bytes=2**20, bytes_per_s=1.234567890123e10),),
        attention=(
            AttentionSample(
                dtype=DType.F32, batch=2, queries=1, context=512, heads=16, kv_heads=8, head_dim=128,
                seconds=1e-4,
            ),
        ),
        overhead=(OverheadSample(what="kernel launch", count=100, seconds=1.5e-5),),
    )  # fmt: skip
    return ChipSpec(
        name="local",
        title="This machine",
        vendor="AMD",
        kind="cpu",
        status="local",
        chips_per_node=base.chips_per_node,
        matmul=base.matmul,
        memory=base.memory,
        overhead=base.overhead,
        power=base.power,
        calibration=samples,
    )


def test_a_calibrated_chip_round_trips_through_a_file(tmp_path: Path) -> None:
    spec = calibrated()
    path = tmp_path / "deep" / "local.toml"
    save(spec, path)
    assert load(path, ChipSpec) == spec
    assert spec.at().calibration == spec.calibration
    assert [file.name for file in path.parent.iterdir()] == ["local.toml"]


WORKLOAD = dumps(find.find_workload("code-agent"))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"gamma"', '"poisson"', r"arrival: a poisson process has rate, not rate, variation"),
        ('"gamma"', '"closed"', r"arrival: a closed process has users, not rate, variation"),
        ("per_s = 0.2", "per_s = 0", r"arrival: rate is zero"),
        (
            '[input]\ndistribution = "lognormal"',
            '[input]\ndistribution = "fixed"',
            r"input: variation belongs",
        ),
        ("tokens = 400", "tokens = 0", r"output: a length is at least one token"),
        ("requests = 256", "requests = 0", r"requests: expected a whole number ≥ 1"),
        ("fraction = 0.95", "fraction = 95", r"prefix.share: 95 is above 1"),
    ],
)
def test_a_workload_that_contradicts_itself_is_refused(old: str, new: str, said: str) -> None:
    assert old in WORKLOAD
    with pytest.raises(SpecError, match=said):
        loads(WORKLOAD.replace(old, new), WorkloadSpec)


def test_a_chip_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(
        SpecError, match=r"matmul: peak and achieved need the same data types; only one has fp4"
    ):
        loads(broken("fp8 = { fraction", "fp4 = { fraction").replace("\nint8 = ", "\nint4 = "), ChipSpec)
    with pytest.raises(SpecError, match=r"power: idle is above tdp"):
        loads(tdp("w = 7"), ChipSpec)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["matmul"]["columns"].reverse(), r"calibration.matmul.columns: expected \['dtype', 'm'"),
        (lambda c: c["matmul"]["rows"][0].pop(), r"calibration.matmul.rows.0: expected 5 values"),
        (lambda c: c["matmul"]["rows"][0].__setitem__(4, 0), r"rows.0.seconds: expected a number above 0"),
        (lambda c: c["matmul"]["rows"][0].__setitem__(1, True), r"rows.0.m: expected a whole number"),
        (lambda c: c["matmul"]["rows"][0].__setitem__(0, "bf"), r"rows.0.dtype: unknown value 'bf'"),
        (lambda c: c["matmul"].__setitem__("unit", "s"), r"calibration.matmul.unit: unknown key"),
        (lambda c: c["machine"].__setitem__("x", [1]), r"calibration.machine.x: expected a text or a number"),
        (lambda c: c.pop("when"), r"calibration.when: missing"),
    ],
)
def test_bad_samples_are_refused(change: Any, said: str) -> None:
    raw = tomllib.loads(dumps(calibrated()))
    change(raw["calibration"])
    with pytest.raises(SpecError, match=said):
        read_fields(ChipSpec, raw, Where("mine.toml"))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chip.toml"
    save(find_chip("h200"), path)
    monkeypatch.setattr("tongyun.specs.write.dumps", lambda spec: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(find_chip("a100"), path)
    assert load(path, ChipSpec).name == "h200"
    assert [file.name for file in tmp_path.iterdir()] == ["chip.toml"]


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(
        st.sampled_from(["gb", "w", "kind", "source", "low", "x"]), st.integers(0, 9), max_size=3
    ),
)
CALIBRATED = tomllib.loads(dumps(calibrated()))


@given(st.data())
@settings(max_examples=150)
def test_a_mutated_spec_is_refused_or_valid_never_a_crash(data: st.DataObject) -> None:
    raw: Any = copy.deepcopy(CALIBRATED)
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(raw, data)
    try:
        spec = read_fields(ChipSpec, raw, Where("mine.toml"))
    except SpecError as error:
        assert str(error).startswith("mine.toml: ")
    else:
        assert all(math.isfinite(figure.value) and figure.low <= figure.high for _, figure in spec.figures())
        assert loads(dumps(spec), ChipSpec) == spec


def mutate(raw: Any, data: st.DataObject) -> None:
    """Replace, remove or add something at a random depth."""
    while True:
        keys = list(raw) if isinstance(raw, dict) else list(range(len(raw)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        if isinstance(raw[key], dict | list) and raw[key] and data.draw(st.integers(0, 3)):
            raw = raw[key]
            continue
        what = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if what == "replace":
            raw[key] = data.draw(JUNK)
        elif what == "remove":
            del raw[key]
        elif isinstance(raw, dict):
            raw[data.draw(st.text(min_size=1, max_size=6))] = data.draw(JUNK)
        return


@given(st.integers(0, len(GOOD) - 1), st.text(alphabet='{}[]=",.\n #x0-', max_size=3), st.integers(0, 5))
@settings(max_examples=100)
def test_mutated_text_is_refused_or_valid_never_a_crash(at: int, put: str, cut: int) -> None:
    try:
        spec = loads(GOOD[:at] + put + GOOD[at + cut :], ChipSpec, file="mine.toml")
    except SpecError as error:
        assert str(error).startswith("mine.toml: ")
    else:
        assert loads(dumps(spec), ChipSpec) == spec
