"""The catalogue: every file is valid, and the figures people will check are those of their sources."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tongyun.cloud.workload import Workload, sample
from tongyun.errors import SpecError
from tongyun.specs import (
    dumps,
    every,
    find,
    find_chip,
    find_fabric,
    find_ppu,
    find_price,
    find_storage,
    find_workload,
    loads,
    names,
)
from tongyun.specs.contents import facts
from tongyun.specs.figure import Corner
from tongyun.specs.schema import SCHEMAS
from tongyun.units import DType, Source

ALL = [(kind, name) for kind in SCHEMAS for name in names(kind)]
G, T = 1e9, 1e12


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_file_is_valid_named_as_its_stem_and_round_trips(kind: str, name: str) -> None:
    spec = find.find(kind, name)
    assert spec.name == name
    assert loads(dumps(spec), SCHEMAS[kind]) == spec
    assert all(len(figure.reference) > 4 for _, figure, _ in facts(spec))


@pytest.mark.parametrize("kind", SCHEMAS)
def test_names_and_aliases_are_unique(kind: str) -> None:
    assert [spec.name for spec in every(kind)] == names(kind)


@pytest.mark.parametrize("name", names("chips"))
def test_chip_is_complete_for_the_planner(name: str) -> None:
    spec = find_chip(name)
    assert set(spec.matmul.peak) == set(spec.matmul.achieved) and DType.BF16 in spec.matmul.peak
    assert find_price(name).chip == name
    slow, nominal, fast = (spec.at(corner) for corner in Corner)
    for better in ("memory_bytes_per_s", "memory_bytes", "achieved_memory", "achieved_attention"):
        assert getattr(slow, better) <= getattr(nominal, better) <= getattr(fast, better)
    for worse in ("kernel_launch_s", "step_host_s", "tdp_w"):
        assert getattr(slow, worse) >= getattr(nominal, worse) >= getattr(fast, worse)
    for link in (spec.scale_up, spec.scale_out):
        if link is not None and link.fabric is not None:
            assert find_fabric(link.fabric).name == link.fabric


# bf16, fp8, memory GB, TB/s, scale-up GB/s per direction, domain: the published figures.
PEAKS = {
    "a100": (312, None, 80, 2.04, 300, 8),
    "a800": (312, None, 80, 2.04, 200, 8),
    "h20": (148, 296, 96, 4.0, 450, 8),
    "h100": (989, 1979, 80, 3.35, 450, 8),
    "h800": (989, 1979, 80, 3.35, 200, 8),
    "h200": (989, 1979, 141, 4.8, 450, 8),
    "b200": (2250, 4500, 180, 7.7, 900, 8),
    "b300": (2250, 4500, 288, 7.75, 900, 8),
    "gb200": (2500, 5000, 186, 8.0, 900, 72),
    "gb300": (2500, 5000, 288, 8.0, 900, 72),
    "tpu-v5e": (197, None, 16, 0.82, 180, 256),
    "tpu-v5p": (459, 459, 95, 2.76, 540, 8960),
    "tpu-v6e": (918, 918, 32, 1.6, 360, 256),
    "tpu7x": (2307, 4614, 192, 7.4, 600, 9216),
    "trainium2": (667, 1299, 96, 2.9, 640, 16),
    "trainium3": (671, 2517, 144, 4.9, 1280, 64),
    "mi300x": (1307, 2610, 192, 5.3, 448, 8),
    "mi325x": (1300, 2610, 256, 6.0, 448, 8),
    "mi355x": (2500, 5000, 288, 8.0, 535.5, 8),
    "ascend-910b2": (353.9, None, 64, 1.6, 196, 8),
    "ascend-910c": (752, None, 128, 3.2, 196, 384),
    "ascend-950dt": (486, 919, 96, 4.0, 840, 64),
    "rubin": (4000, 17500, 288, 22, 1800, 72),
    "zhenwu-810e": (118.7, None, 96, 2.4, 350, 16),
    "zhenwu-m890": (356.1, 712.2, 144, 4.0, 400, 128),
}


@pytest.mark.parametrize("name", names("chips"))
def test_peaks_against_the_published_table(name: str) -> None:
    bf16, fp8, memory, bandwidth, link, domain = PEAKS[name]
    chip = find_chip(name).at()
    assert chip.peak_flops_per_s[DType.BF16] == pytest.approx(bf16 * T)
    if fp8 is None:
        assert DType.FP8 not in chip.peak_flops_per_s
    else:
        assert chip.peak_flops_per_s[DType.FP8] == pytest.approx(fp8 * T)
    assert chip.memory_bytes == memory * G
    assert chip.memory_bytes_per_s == pytest.approx(bandwidth * T)
    assert chip.scale_up is not None
    assert (chip.scale_up.bytes_per_s, chip.scale_up.domain) == (pytest.approx(link * G), domain)


# int8, fp4 (None: not published for this chip), TDP where published.
MORE = {
    "a100": (624, None, 400),
    "a800": (624, None, 400),
    "h20": (296, None, 400),
    "h100": (1979, None, 700),
    "h800": (1979, None, 700),
    "h200": (1979, None, 700),
    "b200": (4500, 9000, 1000),
    "b300": (154, 12600, 1100),
    "gb200": (5000, 10000, 1200),
    "gb300": (165, 15000, 1400),
    "tpu-v5e": (394, None, None),
    "tpu-v5p": (918, None, None),
    "tpu-v6e": (1836, None, None),
    "tpu7x": (None, None, None),
    "trainium2": (None, None, None),
    "trainium3": (None, 2517, None),
    "mi300x": (2600, None, 750),
    "mi325x": (2600, None, 1000),
    "mi355x": (5000, 10100, None),
    "ascend-910c": (1503, None, None),
    "ascend-950dt": (None, 1783, None),
    "rubin": (2500, 35000, None),
    "zhenwu-810e": (237.4, None, 400),
}


@pytest.mark.parametrize("name", MORE)
def test_low_precision_and_power_against_the_published_table(name: str) -> None:
    spec = find_chip(name)
    for dtype, rate in zip((DType.INT8, DType.FP4), MORE[name], strict=False):
        assert (dtype in spec.matmul.peak) == (rate is not None)
        if rate is not None:
            assert spec.matmul.peak[dtype].value == pytest.approx(rate * T)
    tdp = MORE[name][2]
    assert (spec.power.tdp.source is Source.ASSUMED) == (tdp is None)
    if tdp is not None:
        assert spec.power.tdp.value == tdp


def test_the_810e_is_what_is_public_about_it_and_says_what_is_not() -> None:
    spec = find_chip("810e")
    assert spec.name == "zhenwu-810e" and spec.chips_per_node.value == 16
    peak = spec.matmul.peak[DType.BF16]
    assert peak.source is Source.DERIVED and peak.value == pytest.approx(1945e15 / 16384, rel=1e-3)
    assert spec.scale_up is not None and spec.scale_up.ports is not None
    assert spec.scale_up.topology == "ports" and spec.scale_up.ports.value == 7
    assert 2 * spec.scale_up.bandwidth.value == 700 * G
    assert spec.memory.capacity.high == 98304 * 2**20
    bandwidth = spec.memory.bandwidth
    assert bandwidth.source is Source.ASSUMED
    assert (bandwidth.low, bandwidth.value, bandwidth.high) == (1.6e12, 2.4e12, 2.8e12)
    assert spec.has_range and spec.at("slow").memory_bytes_per_s == 1.6e12
    assert spec.power.tdp.value == 400


def test_conflicts_between_sources_are_ranges() -> None:
    assert (find_chip("h20").power.tdp.low, find_chip("h20").power.tdp.high) == (400, 550)
    assert find_chip("b200").memory.capacity.high == 192 * G
    assert find_chip("b200").memory.bandwidth.high == 8 * T
    assert find_chip("h20").at("slow").tdp_w == 550


def test_measured_efficiency_is_the_measured_rate_over_the_peak() -> None:
    h100 = find_chip("h100").matmul.achieved[DType.BF16]
    assert h100.source is Source.MEASURED and h100.value == pytest.approx(794.5 / 989, abs=1e-4)
    mi300x = find_chip("mi300x")
    achieved = mi300x.matmul.achieved[DType.BF16].value * mi300x.matmul.peak[DType.BF16].value
    assert achieved == pytest.approx(668.4 * T, rel=1e-3)


def test_provenance_of_a_resolved_chip() -> None:
    chip = find_chip("h200").at()
    assert chip.sources_of("matmul.peak.bf16") == {Source.VENDOR}
    assert chip.sources_of("memory") == {Source.VENDOR, Source.ASSUMED}
    assert chip.sources_of("matmul.peak.bf") == frozenset()
    assert chip.sources >= {Source.VENDOR, Source.MEASURED, Source.DERIVED, Source.ASSUMED}
    assert hash(chip) == hash(find_chip("h200").at("nominal"))


def test_clouds() -> None:
    hpn = find_fabric("hpn-7.0")
    assert hpn.bandwidth.value * 8 * hpn.endpoints_per_node.value == pytest.approx(3.2e12)
    assert hpn.endpoints_per_segment is not None and hpn.endpoints_per_segment.value == 1024
    assert find_fabric("hpn8").bandwidth.value == 100 * G
    [largest] = [s for s in hpn.efficiency if s.ranks == 1024 and s.payload_bytes == 2**30]
    assert largest.fraction == 0.315
    cpfs = find_storage("cpfs-lingjun")
    assert cpfs.client_bandwidth.value == 25 * G and cpfs.write_bandwidth.value == 200 * G
    assert cpfs.read_density is not None
    assert cpfs.read_density.value * 1000 * 2**40 == pytest.approx(400 * G)


@pytest.mark.parametrize("name", names("workloads"))
def test_a_workload_draws_arrivals_of_its_shape(name: str) -> None:
    spec = find_workload(name)
    arrivals = sample(Workload.from_spec(spec))
    assert len(arrivals) == spec.requests
    for lengths, drawn in (
        (spec.input, [a.prompt_tokens for a in arrivals]),
        (spec.output, [a.output_tokens for a in arrivals]),
    ):
        mean = sum(drawn) / len(drawn)
        spread = 0.0 if lengths.variation is None else lengths.variation.value
        # five standard errors of a mean of that many draws
        assert abs(mean / lengths.mean.value - 1) <= 5 * spread / len(drawn) ** 0.5 + 0.02
    share = sum(a.prefix_tokens > 0 for a in arrivals) / len(arrivals)
    assert share == pytest.approx(0 if spec.prefix is None else spec.prefix.share.value, abs=0.25)


def test_nccl_samples_are_bus_bandwidth() -> None:
    samples = find_fabric("nvlink-h100").collectives
    by = {(s.collective, s.payload_bytes): s.bus_bytes_per_s for s in samples}
    assert by["all_reduce", 512 * 2**20] == 445 * G
    assert 8192 / by["all_reduce", 8192] * 2 * 7 / 8 == pytest.approx(16.0e-6, rel=5e-3)


def test_lookup_by_case_alias_path_and_nearest_name(tmp_path: Path) -> None:
    assert find_chip("H200") == find_chip("h200-sxm")
    mine = tmp_path / "mine.toml"
    mine.write_text(dumps(find_chip("h200")))
    assert find_chip(str(mine)) == find_chip("h200")
    with pytest.raises(SpecError, match=r"unknown chip 'h20O'; did you mean h20, h200.*accepted: a100"):
        find_chip("h20O")
    with pytest.raises(SpecError, match="no such file"):
        find_chip(str(tmp_path / "none.toml"))
    with pytest.raises(SpecError, match="cannot be read"):
        folder = tmp_path / "folder.toml"
        folder.mkdir()
        find_chip(str(folder))


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(dumps(find_chip("h200")))
    assert find_chip(str(mine)).name == "h200"
    mine.write_text(dumps(find_chip("a100")))
    assert find_chip(str(mine)).name == "a100"


def test_two_files_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chips").mkdir()
    for name in ("one", "two"):
        (tmp_path / "chips" / f"{name}.toml").write_text(dumps(find_chip("h200")))
    monkeypatch.setattr(find, "CATALOG", tmp_path)
    with pytest.raises(SpecError, match=r"two\.toml: name: 'h200' already names .*one.toml"):
        list(every("chips"))


def test_the_whole_catalogue_loads_fast() -> None:
    def spent(work: Callable[[], object]) -> float:
        find._load.cache_clear()
        began = time.process_time()
        work()
        return time.process_time() - began

    def whole() -> list[object]:
        return [spec for kind in SCHEMAS for spec in every(kind)]

    assert len(whole()) == len(ALL)
    # 0.1 s and 2.5 ms on an idle machine; tests share theirs
    assert min(spent(whole) for _ in range(3)) < 0.5
    assert min(spent(lambda: find_chip("h200")) for _ in range(5)) < 0.02


@pytest.mark.parametrize("chip", ["a100", "h100"])
def test_a_ppu_has_at_most_six_figures_fitted_to_measurements(chip: str) -> None:
    figures = [figure for _, figure in find_ppu(chip).figures()]
    fitted = [figure for figure in figures if "measured" in figure.reference]
    assert 0 < len(fitted) <= 6
    assert all(figure.source is Source.DERIVED for figure in fitted)
