"""The PPU's timing simulator as a GPU, beside that GPU's measured products, attention and experts.

    python benchmarks/ppu_silicon.py [--data DIR] [--rows 200] [--fit]

DIR is the systems/data folder of aiconfigurator-core (Apache-2.0, not part of this project); without it the
installed package is used, and without either the benchmark is skipped. `specs/catalog/ppus/a100` and `h100`
carry at most six fitted figures each (kind derived), fitted to rows of the families that `fitted` rows are
drawn from; `held out` rows are of other (N, K), heads or (hidden, inner). Every kind is written as the
engine's call runs it: fp8 rows are made by a kernel before the product, attention is several kernels; heads
that it gives to Triton are left out. Rows are drawn at random among those of at most 0.6 TFLOP (0.2 for
attention and experts), so that simulating them takes minutes. `--fit` searches the fitted figures from those
of the catalogue, on rows of the families fitted to, and prints what it would write.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from silicon_kernels import SPILT, block_tiling, launched_early, library_chip, library_tiling, rows_again
from silicon_rows import CHIPS, VERSIONS, families, read
from silicon_tables import installed, routed_rows
from tongyun.chip.ppu.emit import attention, experts, rows
from tongyun.chip.ppu.emit.builder import Builder
from tongyun.chip.ppu.emit.mapper import BLOCK, Matmul, Tiling, splits
from tongyun.chip.ppu.emit.matmul import Scales, matmul, split_matmul
from tongyun.chip.ppu.emit.quantise import quantise, quantise_again
from tongyun.chip.ppu.isa import Type, Vec
from tongyun.chip.ppu.program import Program, Tensor
from tongyun.chip.ppu.timing import simulate
from tongyun.errors import Infeasible
from tongyun.specs import Ppu, find_ppu
from tongyun.units import Source

PRODUCT_FLOPS, OTHER_FLOPS = 6e11, 2e11
BARS = {
    "product": 12, "fp8": 12, "blocks": 12, "prefill": 15, "decode": 15, "experts": 20, "experts fp8": 20,
}  # fmt: skip
Made = tuple[Program, dict[str, ArrayLike], Ppu]
Row = Callable[[Ppu, int], Made]
Table = tuple[Row, NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]]
"""What a row is as a program and chip, measured seconds, family, and whether it may be drawn."""


def place(b: Builder, name: str, *shape: int, type: Type = Type.BF16) -> Tensor:
    return b.layout.place(name, shape, type, "input")


def product(m: int, n: int, k: int, ppu: Ppu) -> Program:
    """As `torch.nn.functional.linear`."""
    b = Builder(ppu)
    a, w, out = place(b, "a", m, k), place(b, "w", n, k), place(b, "out", m, n)
    parts = splits(Matmul(m=m, n=n, k=k), ppu)
    if parts > 1:
        split_matmul(b, a, w, out, parts, "product")
    else:
        with b.kernel("matmul", "product"):
            matmul(b, a, w, out)
    return b.program()


def scaled(m: int, n: int, k: int, ppu: Ppu, blocks: bool) -> tuple[Program, Ppu]:
    """As the engine's call: bf16 rows to fp8 and their scales, then the product; scales by row or by blocks.

    Scales by row are CUTLASS's kernel, whose tile follows from m alone, behind one that may read its rows
    twice; those by blocks DeepGEMM's, whose
    tile follows from its rule where that fits a core's SRAM. Tiles of which one lies across two blocks of
    the weight's scales are for timing alone: the kernel reads the first block's.
    """
    b, chip = Builder(ppu), ppu if blocks else library_chip(ppu, m)
    x, w, out = place(b, "x", m, k), place(b, "w", n, k, type=Type.FP8), place(b, "out", m, n)
    deep, high = (k // BLOCK, -(-n // BLOCK)) if blocks else (1, n)
    a, scale = place(b, "a", m, k, type=Type.FP8), place(b, "scale", m, deep, type=Type.F32)
    columns = place(b, "columns", high, deep, type=Type.F32)
    tiling: Tiling | None = library_tiling(m)
    if blocks:
        found = block_tiling(m, n, k, ppu.cores)
        shape = Matmul(
            m=m, n=n, k=k, left=Type.FP8, right=Type.FP8, rows=m * deep, columns=high * deep, blocks=True
        )
        tiling = found.tiling if found.tiling.sram_bytes(shape) <= ppu.sram_bytes else None
        if found.spills:
            chip = replace(ppu, tensor_flops={kind: each / SPILT for kind, each in ppu.tensor_flops.items()})
    again = 0 if blocks else rows_again(m, k, ppu.cores)
    with b.kernel("quantise", "rows"):
        if again:
            quantise_again(b, rows.Rows.of(x), a, scale, at_once=again)
        else:
            quantise(b, rows.Rows.of(x), a, scale)
    with b.kernel("matmul", "product"):
        matmul(b, a, w, out, scales=Scales(rows=scale, columns=columns, blocks=blocks), tiling=tiling)
    program = b.program()
    return program, launched_early(program, chip, ("matmul",)) if blocks else chip


DTYPES = {
    "product": "bfloat16", "fp8": "fp8", "blocks": "fp8_block", "experts": "bfloat16",
    "experts fp8": "fp8_block",
}  # fmt: skip
"""As the tables name them."""


def products(folder: Path, chip: str, kind: str = "product") -> Table:
    t = read(folder / "gemm" / "sglang" / VERSIONS[chip, "sglang"] / "gemm_perf.parquet")
    m, n, k = (t.number(axis) for axis in "mnk")
    fits = (t["gemm_dtype"] == DTYPES[kind]) & (2 * m * n * k <= PRODUCT_FLOPS) & (k % 32 == 0)
    fits &= (kind != "blocks") | (k % BLOCK == 0)

    def row(ppu: Ppu, i: int) -> Made:
        sizes = int(m[i]), int(n[i]), int(k[i])
        if kind == "product":
            return product(*sizes, ppu), {}, ppu
        program, chip = scaled(*sizes, ppu, kind == "blocks")
        return program, {}, chip

    return row, t.number("latency") * 1e-3, families(n, k), fits


def called(b: Builder, shape: attention.Attention, new: Tensor) -> None:
    """What the engine's call launches before attention: keys and values to the cache, the plan of tiles."""
    with b.kernel("copy", "keep"):
        rows.elementwise(b, Vec.COPY, new, place(b, "slots", *new.shape))
    lengths = place(b, "lengths", shape.sequences, 1, type=Type.F32)
    with b.kernel("copy", "plan"):
        rows.elementwise(b, Vec.COPY, lengths, place(b, "tiles", shape.sequences, 1, type=Type.F32))


def attended(folder: Path, chip: str, kind: str) -> Table:
    name = {"prefill": "context", "decode": "generation"}[kind]
    path = folder / "attention" / "sglang" / VERSIONS[chip, "sglang"] / f"{name}_attention_perf.parquet"
    t = read(path)
    window = t["window_size"] if "window_size" in t else np.zeros(len(t["isl"]))
    flash = np.asarray(["triton" not in str(name) for name in t["kernel_source"]])
    t = t.keep((np.nan_to_num(window.astype(np.float64)) == 0) & flash)
    batch, width, heads = t.number("batch_size"), t.number("head_dim"), t.number("num_heads")
    kv, tokens = t.number("num_key_value_heads"), t.number("isl")
    behind = t.number("step") if kind == "decode" else np.zeros(len(tokens))
    flops = 4 * batch * heads * tokens * (tokens + behind) * width
    cache = 4 * batch * kv * (tokens + behind) * width
    fits = (t["attn_dtype"] == "bfloat16") & (t["kv_cache_dtype"] == "bfloat16") & (flops <= OTHER_FLOPS)
    fits &= (cache < 20e9) & (batch * heads * width * tokens < 2e9)

    def row(ppu: Ppu, i: int) -> Made:
        b = Builder(ppu)
        shape = attention.Attention(
            sequences=int(batch[i]), tokens=int(tokens[i]), heads=int(heads[i]), kv_heads=int(kv[i]),
            width=int(width[i]), room=int(tokens[i] + behind[i]), scale=0.1,
            query_stride=int(heads[i] * width[i]) * 2, alone=True,
        )  # fmt: skip
        q, out = (place(b, x, int(batch[i] * tokens[i]), int(heads[i] * width[i])) for x in ("q", "out"))
        held = [place(b, x, int(batch[i]), int(kv[i]), shape.room, int(width[i])) for x in ("k", "v")]
        called(b, shape, place(b, "new", int(batch[i] * tokens[i]), 2 * int(kv[i] * width[i])))
        position = place(b, "position", 1, type=Type.I32)
        attention.emit(b, shape, q, (held[0], held[1]), out, position, kind)
        program = b.program()
        as_run = ppu if chip == "a100" else launched_early(program, ppu, ("merge",))
        return program, {"position": [int(behind[i])]}, as_run

    return row, t.number("latency") * 1e-3, families(heads, kv, width), fits


def mixed(folder: Path, chip: str, kind: str = "experts") -> Table:
    t = read(folder / "moe" / "sglang" / VERSIONS[chip, "sglang"] / "moe_perf.parquet")
    triton = np.asarray(["triton" in str(name) for name in t["kernel_source"]])
    t = t.keep((t["moe_dtype"] == DTYPES[kind]) & (t["moe_ep_size"].astype(int) == 1) & triton)
    hidden, tokens, count = t.number("hidden_size"), t.number("num_tokens"), t.number("num_experts")
    inner, top = t.number("inter_size") / t.number("moe_tp_size"), t.number("topk")
    shares = routed_rows(t)
    flops = 6 * tokens * top * hidden * inner
    step = BLOCK if kind == "experts fp8" else 32
    fits = (flops <= OTHER_FLOPS) & (inner % step == 0) & (6 * count * hidden * inner < 70e9)
    fits &= (kind == "experts") | (hidden % BLOCK == 0)

    def row(ppu: Ppu, i: int) -> Made:
        sizes = Mixture(*(int(each[i]) for each in (count, hidden, inner, tokens, top)))
        many = sizes.count
        each = np.repeat(shares[i], many // len(shares[i])) if many % len(shares[i]) == 0 else None
        if each is None:
            each = np.interp((np.arange(many) + 0.5) / many, (np.arange(32) + 0.5) / 32, shares[i])
        each = np.random.default_rng(0).permutation(each)
        ends = np.rint(np.cumsum([0.0, *each]) * sizes.pairs / each.sum()).astype(int)
        return mixture(sizes, ppu, kind == "experts fp8"), {"expert_offset": ends}, ppu

    return row, t.number("latency") * 1e-3, families(hidden, inner), fits


@dataclass(frozen=True)
class Mixture:
    count: int
    hidden: int
    inner: int
    tokens: int
    top: int

    @property
    def pairs(self) -> int:
        return self.tokens * self.top


def mixture(m: Mixture, ppu: Ppu, fp8: bool) -> Program:
    """As the engine's fused call; in fp8 by scaled blocks, rows made fp8 before each of the two products."""
    b, kind = Builder(ppu), Type.FP8 if fp8 else Type.BF16
    up, down = (
        place(b, "up", m.count, 2 * m.inner, m.hidden, type=kind),
        place(b, "down", m.count, m.hidden, m.inner, type=kind),
    )
    index = [place(b, name, m.pairs, type=Type.I32) for name in ("token", "place")]
    offset = place(b, "offset", m.count + 1, type=Type.I32)
    both, act = place(b, "both", m.pairs, 2 * m.inner), place(b, "act", m.pairs, m.inner)
    made, out = place(b, "made", m.pairs, m.hidden), place(b, "out", m.tokens, m.hidden)
    x, scales = given(b, place(b, "x", m.tokens, m.hidden), up, fp8)
    with b.kernel("experts_up", "up"):
        experts.grouped(b, x, up, both, offset, token=index[0], scales=scales)
    with b.kernel("swiglu", "act"):
        left = rows.Rows(tensor=both, rows=m.pairs, cols=m.inner, stride=4 * m.inner)
        right = replace(left, offset=2 * m.inner)
        rows.swiglu(b, left, right, act)
    act, scales = given(b, act, down, fp8)
    with b.kernel("experts_down", "down"):
        experts.grouped(b, act, down, made, offset, scales=scales)
    with b.kernel("combine", "sum"):
        experts.combine(b, made, place(b, "share", m.tokens, m.top), index[1], out, top=m.top)
    return b.program()


def given(b: Builder, x: Tensor, weight: Tensor, fp8: bool) -> tuple[Tensor, Scales | None]:
    """Rows as a grouped product takes them, and the scales of both sides."""
    if not fp8:
        return x, None
    (many, width), (count, high, _) = x.shape, weight.shape
    deep = width // BLOCK
    q = place(b, f"{x.name}.fp8", many, width, type=Type.FP8)
    scale = place(b, f"{x.name}.scale", many, deep, type=Type.F32)
    columns = place(b, f"{weight.name}.scale", count, -(-high // BLOCK), deep, type=Type.F32)
    with b.kernel("quantise", x.name):
        quantise(b, rows.Rows.of(x), q, scale)
    return q, Scales(rows=scale, columns=columns, blocks=True)


def judged(table: Table, held_out: bool, most: int, ppu: Ppu) -> NDArray[np.float64]:
    """Errors in percent of rows drawn from a table."""
    row, measured_s, family, fits = table
    allowed = np.flatnonzero(fits & ((family >= 7) == held_out))
    chosen = np.random.default_rng(0).choice(allowed, min(most, len(allowed)), replace=False)
    ours = np.full(len(chosen), np.nan)
    for place, i in enumerate(chosen):
        try:
            program, symbols, chip = row(ppu, int(i))
        except Infeasible:
            # More queries share a key head than SRAM has room for; the count of rows says how many are left.
            continue
        ours[place] = simulate(program, chip, symbols).seconds
    error = 100 * (ours / measured_s[chosen] - 1)
    return error[np.isfinite(error)]


FIGURES = {
    "core.port": "bytes_per_cycle",
    "core.tensor_achieved": "fraction",
    "core.attention.hidden": "fraction",
    "shared.l2_rate": "bytes_per_cycle",
    "shared.hbm_achieved": "fraction",
    "shared.hbm_latency": "ns",
    "shared.barrier": "us",
}
"""What may be fitted, and its unit in the catalogue; what is fitted of it is of kind derived there."""


def figures(chip: str) -> dict[str, float]:
    """The fitted figures of a chip of the catalogue, in its units."""
    ppu, known = find_ppu(chip).at(), dict(find_ppu(chip).figures())
    values = {
        "core.port": ppu.port_bytes,
        "core.tensor_achieved": 1 / ppu.tensor_peak,
        "core.attention.hidden": ppu.softmax_hidden,
        "shared.l2_rate": ppu.l2_rate,
        "shared.hbm_achieved": ppu.hbm_bytes_per_s / ppu.hbm_peak_bytes_per_s,
        "shared.hbm_latency": ppu.hbm_latency_s * 1e9,
        "shared.barrier": ppu.barrier_s * 1e6,
    }
    return {name: value for name, value in values.items() if known[name].source is Source.DERIVED}


def with_figures(ppu: Ppu, given: dict[str, float]) -> Ppu:
    tensor = given.get("core.tensor_achieved", 1 / ppu.tensor_peak)
    hbm = given.get("shared.hbm_achieved", ppu.hbm_bytes_per_s / ppu.hbm_peak_bytes_per_s)
    return replace(
        ppu,
        port_bytes=given.get("core.port", ppu.port_bytes),
        tensor_flops={kind: flops * ppu.tensor_peak * tensor for kind, flops in ppu.tensor_flops.items()},
        tensor_peak=1 / tensor,
        softmax_hidden=given.get("core.attention.hidden", ppu.softmax_hidden),
        l2_rate=given.get("shared.l2_rate", ppu.l2_rate),
        hbm_bytes_per_s=ppu.hbm_peak_bytes_per_s * hbm,
        hbm_latency_s=given.get("shared.hbm_latency", ppu.hbm_latency_s * 1e9) * 1e-9,
        barrier_s=given.get("shared.barrier", ppu.barrier_s * 1e6) * 1e-6,
    )


def fitted(tables: Mapping[str, Table], most: int, chip: str) -> tuple[dict[str, float], float, float]:
    """(figures, loss before, after) by a search along each figure, by 10, 4 and 1.5 %.

    The loss is the mean absolute log error of each kind over its bar, averaged over the kinds.
    """
    ppu = find_ppu(chip).at()

    def loss(given: dict[str, float]) -> float:
        if any(given.get(name, 0) > 1 for name, unit in FIGURES.items() if unit == "fraction"):
            return float("inf")
        tried = with_figures(ppu, given)
        errors = {kind: judged(table, False, most, tried) for kind, table in tables.items()}
        each = [np.abs(np.log1p(error / 100)).mean() / BARS[kind] for kind, error in errors.items()]
        return 100 * float(np.mean(each))

    best = figures(chip)
    least = begun = loss(best)
    for step in (1.1, 1.04, 1.015):
        better = True
        while better:
            better = False
            for name in best:
                for factor in (step, 1 / step):
                    tried = best | {name: best[name] * factor}
                    away = loss(tried)
                    if away < least - 1e-5:
                        best, least, better = tried, away, True
                        break
    return best, begun, least


KINDS = {
    "a100": ("product", "prefill", "decode", "experts"),
    "h100": ("product", "fp8", "blocks", "prefill", "decode", "experts", "experts fp8"),
}


def table_of(folder: Path, chip: str, kind: str) -> Table:
    if kind in {"prefill", "decode"}:
        return attended(folder, chip, kind)
    return (mixed if kind.startswith("experts") else products)(folder, chip, kind)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="the package's systems/data folder")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--fit", action="store_true", help="search the fitted figures on --rows of each kind")
    parser.add_argument("--chips", default=",".join(CHIPS))
    parser.add_argument("--kinds", help="some of: " + ", ".join(KINDS["h100"]))
    given = parser.parse_args()
    folder = given.data or installed()
    if folder is None or find_spec("pyarrow") is None:
        print("skipped: needs aiconfigurator-core (or its systems/data folder, --data) and pyarrow")
        return
    chips = [(chip, folder / CHIPS[chip]) for chip in given.chips.split(",")]
    wanted = given.kinds.split(",") if given.kinds else KINDS["h100"]
    for chip, place in chips:
        tables = {kind: table_of(place, chip, kind) for kind in KINDS[chip] if kind in wanted}
        if given.fit:
            show_fit(chip, *fitted(tables, given.rows, chip))
        else:
            show_errors(chip, tables, given.rows, header=chip == chips[0][0])


def show_fit(chip: str, found: dict[str, float], before: float, after: float) -> None:
    print(f"{chip}: mean error over bar {before:.4f} with the catalogue's figures, {after:.4f} with")
    for key, value in found.items():
        print(f"  {key} = {value:.4g} {FIGURES[key]}", flush=True)


def show_errors(chip: str, tables: Mapping[str, Table], rows: int, *, header: bool) -> None:
    heads = ("MAPE %", "median %", "p90 %", "max %", "bias %", "bar %")
    if header:
        print(
            f"{'chip':>5} {'kind':>11} {'rows':>9} {'count':>5} " + " ".join(f"{head:>8}" for head in heads)
        )
    ppu = find_ppu(chip).at()
    for kind, table in tables.items():
        for held_out in (False, True):
            error = judged(table, held_out, rows, ppu)
            away = np.abs(error)
            cells = [away.mean(), np.median(away), np.percentile(away, 90), away.max(), np.median(error)]
            which = "held out" if held_out else "fitted"
            line = " ".join(f"{cell:>8.1f}" for cell in (*cells, BARS[kind]))
            print(f"{chip:>5} {kind:>11} {which:>9} {len(error):>5} {line}", flush=True)


if __name__ == "__main__":
    main()
