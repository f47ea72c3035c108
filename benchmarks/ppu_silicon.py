"""The PPU's timing simulator, given the datasheet of a GPU, beside that GPU's measured products.

    python benchmarks/ppu_silicon.py [--data DIR]

DIR is the systems/data folder of aiconfigurator-core (Apache-2.0, not part of this project); without it the
installed package is used, and without either the benchmark is skipped. Nothing is fitted: the
specs in `specs/catalog/ppus` are datasheets and assumed latencies. Rows are drawn at random from the bf16
products of A100 and H100 up to 0.6 TFLOP.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from silicon_tables import CHIPS, VERSIONS, installed, read
from tongyun.chip.ppu.emit.builder import Builder
from tongyun.chip.ppu.emit.matmul import matmul
from tongyun.chip.ppu.isa import Type
from tongyun.chip.ppu.timing import simulate
from tongyun.specs import Ppu, find_ppu

ROWS = 200
MOST_FLOPS = 6e11


def simulated_s(m: int, n: int, k: int, ppu: Ppu) -> float:
    b = Builder(ppu)
    a = b.layout.place("a", (m, k), Type.BF16, "input")
    w = b.layout.place("w", (n, k), Type.BF16, "weight")
    out = b.layout.place("out", (m, n), Type.BF16, "output")
    with b.kernel("matmul", "product"):
        matmul(b, a, w, out)
    return simulate(b.program(), ppu).seconds + ppu.barrier_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="the package's systems/data folder")
    folder = parser.parse_args().data or installed()
    if folder is None or find_spec("pyarrow") is None:
        print("skipped: needs aiconfigurator-core (or its systems/data folder, --data) and pyarrow")
        return
    print(f"{'chip':>5} {'rows':>5} {'MAPE %':>7} {'median %':>9} {'p90 %':>6} {'bias %':>7}")
    for chip, name in CHIPS.items():
        table = read(folder / name / "gemm" / "sglang" / VERSIONS[chip, "sglang"] / "gemm_perf.parquet")
        m, n, k = (table.number(axis) for axis in "mnk")
        fits = (table["gemm_dtype"] == "bfloat16") & (2 * m * n * k <= MOST_FLOPS) & (k % 32 == 0)
        chosen = np.random.default_rng(0).choice(np.flatnonzero(fits), ROWS, replace=False)
        ppu = find_ppu(chip).at()
        ours = np.array([simulated_s(int(m[i]), int(n[i]), int(k[i]), ppu) for i in chosen])
        error = 100 * (ours / (table.number("latency")[chosen] * 1e-3) - 1)
        away = np.abs(error)
        spread = f"{np.median(away):>9.1f} {np.percentile(away, 90):>6.1f} {np.median(error):>7.1f}"
        print(f"{chip:>5} {ROWS:>5} {away.mean():>7.1f} {spread}")


if __name__ == "__main__":
    main()
