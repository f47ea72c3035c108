"""The PPU's timing simulator beside SCALE-Sim on the same products, in one run.

    python benchmarks/ppu_scalesim.py [--peer ENV/bin/python] [--turns 20]

ENV is an environment of its own with scalesim (package index, MIT; 3.0.0 with NumPy before 2). Both simulate
one array of 32 × 32 multiply-adds a cycle with three SRAMs of 1 MiB (ours: 3 MiB in one) and 64 bytes a
cycle to memory. They are not the same machine: SCALE-Sim walks a weight-stationary systolic array operand by
operand, ours runs the instructions that the compiler emits for tiles, with HBM and L2 latencies. The cycles
therefore stand side by side and are no test of each other; seconds are this machine's wall time, each
simulator's own work without starting an interpreter (ours the mean of the turns after a first).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from ppu import product
from tongyun.chip.ppu.timing import simulate
from tongyun.specs import Ppu, find_ppu
from tongyun.units import DType

SHAPES = (
    (128, 128, 128),
    (64, 512, 256),
    (256, 256, 256),
    (384, 256, 384),
    (512, 512, 512),
    (4096, 4096, 4096),
)
MOST = 384**3
"""Products beyond take SCALE-Sim many minutes and are not asked of it."""
SIDE, SRAM_KIB, BYTES = 32, 1024, 64
CONFIG = f"""\
[general]
run_name = one
[architecture_presets]
ArrayHeight: {SIDE}
ArrayWidth: {SIDE}
IfmapSramSzkB: {SRAM_KIB}
FilterSramSzkB: {SRAM_KIB}
OfmapSramSzkB: {SRAM_KIB}
IfmapOffset: 0
FilterOffset: 10000000
OfmapOffset: 20000000
Dataflow: ws
Bandwidth: {BYTES // 2}
ReadRequestBuffer: 512
WriteRequestBuffer: 512
[layout]
IfmapCustomLayout: False
FilterCustomLayout: False
IfmapSRAMBankBandwidth: 10
IfmapSRAMBankNum: 10
IfmapSRAMBankPort: 2
FilterSRAMBankBandwidth: 10
FilterSRAMBankNum: 10
FilterSRAMBankPort: 2
[sparsity]
SparsitySupport: false
SparseRep: ellpack_block
OptimizedMapping: false
BlockSize: 8
RandomNumberGeneratorSeed: 40
[run_presets]
InterfaceBandwidth: USER
UseRamulatorTrace: False
"""
PEER = """\
import contextlib, io, json, time
from scalesim.scale_sim import scalesim
begun = time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    run = scalesim(save_disk_space=True, verbose=False, config="one.cfg", topology="one.csv",
                   layout="layout.csv", input_type_gemm=True)
    run.run_scale(top_path="out")
layer = run.runner.single_layer_sim_object_list[0]
print(json.dumps([time.perf_counter() - begun, layer.get_compute_report_items()[1]]))
"""


def array(ppu: Ppu) -> Ppu:
    """One core with SCALE-Sim's array, memories and bandwidth; the rest as `ppu` has it."""
    return replace(
        ppu, name="array", cores=1, tile_m=SIDE, tile_n=SIDE, tile_k=SIDE,
        tensor_flops={DType.BF16: 2.0 * SIDE * SIDE}, sram_bytes=3 * SRAM_KIB * 1024, port_bytes=float(BYTES),
        l2_rate=float(BYTES), hbm_bytes_per_s=BYTES * ppu.clock_hz,
    )  # fmt: skip


def ours(shape: tuple[int, int, int], ppu: Ppu, turns: int) -> tuple[float, float]:
    """(wall seconds, simulated cycles)."""
    program = product(*shape, ppu)
    cycles = simulate(program, ppu).cycles[0]
    begun = time.perf_counter()
    for _ in range(turns):
        simulate(program, ppu)
    return (time.perf_counter() - begun) / turns, float(cycles)


def theirs(shape: tuple[int, int, int], python: str) -> tuple[float, float]:
    """(wall seconds, simulated cycles) of SCALE-Sim."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        (here / "one.cfg").write_text(CONFIG)
        (here / "one.csv").write_text("Layer,M,N,K,\none," + ",".join(map(str, shape)) + ",\n")
        columns = ",".join(["1"] * 20)
        (here / "layout.csv").write_text(f"Layer,{columns},\none,{columns},\n")
        done = subprocess.run(
            [python, "-c", PEER], cwd=folder, capture_output=True, text=True, check=True, timeout=600
        )
    seconds, cycles = json.loads(done.stdout.splitlines()[-1])
    return float(seconds), float(cycles)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", help="Python of an environment with scalesim")
    parser.add_argument("--turns", type=int, default=20)
    given = parser.parse_args()
    if given.peer is None:
        print("SCALE-Sim is not asked: --peer names its Python")
    ppu = array(find_ppu("zhenwu-810e").at())
    heads = ("least cycles", "ours", "theirs", "ours s", "theirs s", "ratio")
    print(f"{'m × n × k':>18} " + " ".join(f"{head:>12}" for head in heads))
    for shape in SHAPES:
        m, n, k = shape
        seconds, cycles = ours(shape, ppu, given.turns)
        peer = theirs(shape, given.peer) if given.peer and m * n * k <= MOST else None
        told = ["", "", ""]
        if peer is not None:
            told = [f"{peer[1]:,.0f}", f"{peer[0]:.2f}", f"{peer[0] / seconds:,.0f}"]
        row = [f"{m * n * k // SIDE**2:,}", f"{cycles:,.0f}", told[0], f"{seconds:.6f}", *told[1:]]
        print(f"{f'{m} × {n} × {k}':>18} " + " ".join(f"{cell:>12}" for cell in row), flush=True)


if __name__ == "__main__":
    main()
