"""The kernel models on chips and kernels nothing was fitted to: H800 and H20.

    python benchmarks/silicon_elsewhere.py --data DIR

DIR is `bench_data` of alibaba/InferSim: latencies of DeepGEMM products (plain and
grouped, fp8 with block scales already quantised), FlashInfer, FlashAttention-3 and
FlashMLA. The H800 is an H100 with a narrower link; the H20 has the same cores, fewer of
them, at a quarter of the matrix rate. The kernels belong to no engine's library, so
`any` prices them, less the launches and quantisation that these tables do not time.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tongyun.chip import attention, grouped
from tongyun.chip.matmul import matmul_s
from tongyun.chip.silicon import Library, Silicon, library, silicon
from tongyun.units import DType

Array = NDArray[np.float64]
CHIPS = ("h800", "h20")


def column(rows: list[dict[str, str]], name: str) -> Array:
    return np.asarray([float(row[name]) for row in rows])


def load(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row.values())]


def show(what: str, chip: str, predicted: Array, measured_us: Array) -> None:
    ratio = predicted * 1e6 / measured_us
    error = np.abs(ratio - 1) * 100
    print(
        f"{what:34} {chip:5} {len(error):5d} {np.median(error):7.1f}% {error.mean():6.1f}% "
        f"{np.quantile(error, 0.9):6.1f}% {np.mean(error < 20):5.0%} {np.median(ratio) - 1:+7.1%}"
    )


def products(data: Path, chip: Silicon, lib: Library) -> None:
    rows = load(data / "gemm" / chip.name / "data.csv")
    m, n, k = (column(rows, name) for name in "mnk")
    dtype = DType.FP8
    s = matmul_s(m, n, k, chip, dtype=dtype, block_scales=True, quantised=True, library=lib)
    show("products fp8", chip.name, s, column(rows, "latency_us"))


def experts(data: Path, chip: Silicon, lib: Library) -> None:
    for phase in ("prefill", "decode"):
        rows = load(data / "grouped_gemm" / phase / chip.name / "data.csv")
        for which in ("up", "down"):
            predicted = []
            for row in rows:
                local, hidden, inner = (
                    int(row[key]) for key in ("num_local_experts", "hidden_size", "intermediate_size")
                )
                n, k = (2 * inner, hidden) if which == "up" else (hidden, inner)
                each = np.full(grouped.BINS, float(row["tokens_per_expert"]))
                s = grouped.grouped_s(
                    each,
                    n,
                    k,
                    chip,
                    experts=local,
                    weight=DType.FP8,
                    compute=DType.FP8,
                    efficiency=lib.block_efficiency,
                    stream=lib.moe_stream,
                )
                predicted.append(float(s) + lib.launch_s)
            show(
                f"experts fp8 {phase}, {which}",
                chip.name,
                np.asarray(predicted),
                column(rows, f"{which}_proj_us"),
            )


def decoding(data: Path, chip: Silicon, lib: Library) -> None:
    for kind in ("mha", "mla"):
        for path in sorted((data / kind / "decode" / chip.name).glob("*.csv")):
            rows = [row for row in load(path) if "batch_size" in row]
            a, b, c = (int(x) for x in path.stem.split("-"))
            of = attention.Heads.grouped(a, b, c) if kind == "mha" else attention.Heads.latent(a, b, c)
            for name in sorted({row.get("kv_dtype", "bf16") for row in rows}):
                some = [row for row in rows if row.get("kv_dtype", "bf16") == name]
                s = attention.decode_s(
                    column(some, "batch_size"),
                    column(some, "kv_len") - 1,
                    of,
                    chip,
                    cache=DType.FP8 if "fp8" in name else DType.BF16,
                    library=replace(lib, decode_launches=1.0),
                )
                show(f"{kind} decode {path.stem} {name}", chip.name, s, column(some, "latency_us"))


def prompts(data: Path, chip: Silicon, lib: Library) -> None:
    for kind in ("mha", "mla"):
        for path in sorted((data / kind / "prefill" / chip.name).glob("*.csv")):
            rows = [row for row in load(path) if row["dtype"] == "bf16"]
            a, b, c = (int(x) for x in path.stem.split("-"))
            of = (
                attention.Heads.grouped(a, b, c)
                if kind == "mha"
                else attention.Heads.latent_expanded(a, b + c, b)
            )
            lone = replace(lib, prefill_launches=1.0, prefill_passes=0.0)
            s = attention.prefill_s(1.0, column(rows, "seq_len"), 0.0, of, chip, library=lone)
            show(f"{kind} prefill {path.stem}", chip.name, s, column(rows, "latency_us"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="InferSim's bench_data folder")
    data = parser.parse_args().data
    if data is None:
        print("nothing judged: give InferSim's bench_data folder with --data")
        return
    lib = library("any")
    print(
        f"{'operator':34} {'chip':5} {'rows':>5} {'median':>8} {'mean':>7} {'p90':>7} {'<20%':>5} {'bias':>7}"
    )
    for name in CHIPS:
        for table in (products, experts, prompts, decoding):
            table(data, silicon(name), lib)


if __name__ == "__main__":
    main()
