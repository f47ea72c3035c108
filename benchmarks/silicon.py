"""How well the kernel models price A100 and H100, on shape families they were not fitted to.

    python benchmarks/silicon.py [--data DIR]          print the error tables
    python benchmarks/silicon.py --fit [--data DIR]    fit, rewrite silicon.toml, print

DIR holds `<gpu>/<operator>/<engine>/<version>/*.parquet` as in the package
aiconfigurator-core (Apache-2.0; `pip install --no-deps aiconfigurator-core pyarrow`);
without --data the installed package is used. Only the A100 and H100 tables are opened.

A family is a whole (n, k), (query heads, key heads, width), (hidden, inner) or number
of ranks × operation; three families of ten are held out by a hash of their name and
judged, never fitted. Collectives have too few families for that and hold out payloads
two by two; the table says so. Errors are |predicted / measured − 1|.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from silicon_rows import CHIPS, ENGINES, Case
from silicon_tables import BARS, ODD, gather, installed
from tongyun.chip.silicon import FITTED, Library, Silicon, library, silicon, tables

Array = NDArray[np.float64]

# -------------------------------------------------------------------- fit

World = tuple[dict[str, Silicon], dict[str, Library]]
Knob = tuple[str, str]
"""Owner (`a100`, `vllm`, or `*` for all libraries) and field."""


def put(world: World, knobs: Sequence[Knob], logs: Array) -> World:
    chips, libraries = dict(world[0]), dict(world[1])
    for (owner, field), log in zip(knobs, logs, strict=True):
        value = float(np.exp(log))
        if owner in chips:
            chips[owner] = replace(
                chips[owner], **{field: min(value, 0.99) if "efficiency" in field else value}
            )
        for name in libraries if owner == "*" else [owner] if owner in libraries else []:
            libraries[name] = replace(libraries[name], **{field: value})
    return chips, libraries


def residuals(world: World, cases: Sequence[Case], rows: Sequence[Array], neutral: bool) -> Array:
    out = []
    for case, i in zip(cases, rows, strict=True):
        lib = world[1]["any" if neutral or case.engine == "nccl" else case.engine]
        out.append(np.log(case.price(world[0][case.chip], lib, i) / case.measured_s[i]))
    return np.concatenate(out)


def fit(
    world: World, knobs: Sequence[Knob], cases: Sequence[Case], *, most: int = 500, neutral: bool = False
) -> World:
    """Least pseudo-Huber error of the logarithms (scale 0.1): damped Gauss-Newton on the knobs' logs."""
    rows = [case.rows(held_out=False, most=most) for case in cases]
    weight = np.concatenate([np.full(len(i), 1 / np.sqrt(max(len(i), 1))) for i in rows])
    owners = {**world[0], **world[1]}
    first = next(iter(world[1]))
    x = np.log([getattr(owners[first if o == "*" else o], f) for o, f in knobs])

    def loss(r: Array) -> float:
        return float(np.sum(weight**2 * (np.sqrt(1 + (r / 0.1) ** 2) - 1)))

    r, damping = residuals(put(world, knobs, x), cases, rows, neutral), 1e-2
    for _ in range(25):
        steps = [put(world, knobs, x + 0.02 * np.eye(len(x))[j]) for j in range(len(x))]
        jacobian = np.stack([(residuals(w, cases, rows, neutral) - r) / 0.02 for w in steps], axis=1)
        scale = weight / (1 + (r / 0.1) ** 2) ** 0.25
        a, b = jacobian * scale[:, None], r * scale
        normal = a.T @ a
        before = loss(r)
        while damping < 1e4:
            move = np.linalg.solve(
                normal + damping * (np.diag(np.diag(normal)) + 1e-9 * np.eye(len(x))), -a.T @ b
            )
            tried = x + np.clip(move, -0.5, 0.5)
            r_tried = residuals(put(world, knobs, tried), cases, rows, neutral)
            if loss(r_tried) < before:
                x, r, damping = tried, r_tried, damping / 3
                break
            damping *= 4
        if before - loss(r) < 1e-4 * before:
            break
    return put(world, knobs, x)


def fit_all(cases: Sequence[Case]) -> World:
    """Chips on bf16 products and collectives, libraries on the rest, then one library for all engines."""
    world: World = ({c: silicon(c) for c in CHIPS}, {name: library(name) for name in (*ENGINES, "any")})
    chip_fields = ("memory_efficiency", "math_efficiency", "core_load_bytes_per_s", "fill_s")
    products = [c for c in cases if c.bar == "matmul bf16"]
    knobs = [(c, f) for c in CHIPS for f in chip_fields] + [("*", "launch_s"), ("*", "split_s")]
    world = fit(world, knobs, products, most=400)
    wires = [c for c in cases if c.bar == "collective"]
    knobs = [(c, f) for c in CHIPS for f in ("link_efficiency", "hop_s")]
    world = fit(world, [*knobs, ("*", "start_fills"), ("*", "ramp_s"), ("*", "switch_gain")], wires)
    for engine in (*ENGINES, "any"):
        neutral = engine == "any"
        for word, names in STAGES.items():
            of = [c for c in cases if decides(word, c) and (neutral or c.engine == engine)]
            if of:
                world = fit(world, [(engine, f) for f in names], of, neutral=neutral)
    return untaught(world, cases)


def untaught(world: World, cases: Sequence[Case]) -> World:
    """Fields of an engine that none of its tables moves take the value fitted over all engines."""
    libraries = dict(world[1])
    for engine in ENGINES:
        of = [c for c in cases if c.engine == engine and (c.chip, c.engine, c.what) not in ODD]
        rows = [c.rows(held_out=False, most=100) for c in of]
        before = residuals(world, of, rows, False)
        for f in fields(Library):
            if f.name == "name":
                continue
            moved = put(world, [(engine, f.name)], np.log([1.1 * getattr(libraries[engine], f.name)]))
            if np.allclose(residuals(moved, of, rows, False), before, rtol=0, atol=1e-12):
                libraries[engine] = replace(libraries[engine], **{f.name: getattr(world[1]["any"], f.name)})
    return world[0], libraries


def decides(word: str, case: Case) -> bool:
    """Whether a table is of this kind and its kernel is fit to learn from."""
    kind, wanted = case.what.replace(",", "").split(), word.split()
    kernel = kind[0] == wanted[0] and (len(wanted) == 1 or kind[1] in wanted[1:])
    return kernel and (case.chip, case.engine, case.what) not in ODD


STAGES: dict[str, tuple[str, ...]] = {
    "matmul fp8": ("fp8_launches", "fp8_pass_bytes", "fp8_efficiency"),
    "matmul fp8_block": ("block_launches", "block_pass_bytes", "block_efficiency"),
    "prefill": (
        "prefill_launches",
        "prefill_efficiency",
        "prefill_fp8_efficiency",
        "prefill_tile_s",
        "prefill_passes",
    ),
    "decode": (
        "decode_launches",
        "decode_block_s",
        "decode_fp8_block_s",
        "decode_tile_s",
        "decode_stream",
        "decode_plain_stream",
        "decode_join",
    ),
    "latent prefill": ("latent_prefill_efficiency",),
    "latent decode": ("latent_decode_efficiency", "latent_stream"),
    "experts bf16": ("moe_launches", "moe_efficiency", "moe_stream", "moe_passes"),
    "experts fp8 fp8_block": ("moe_fp8_launches", "moe_fp8_efficiency", "moe_fp8_passes"),
    "experts int4_wo w4a16_mxfp4": ("moe_unpack_efficiency",),
}
"""First words of the tables that decide these fields of a library, in this order."""


# ------------------------------------------------------------------ report


def report(cases: Sequence[Case], world: World, most: int) -> None:
    head = f"{'operator':32} {'chip':5} {'engine':7} {'rows':>6} {'median':>7} {'mean':>6} {'p90':>6}"
    print(f"{head} {'worst':>6} {'<10%':>5} {'<20%':>5} {'any':>6} {'bias':>6}  not judged")
    pooled: dict[tuple[str, str, bool], list[Array]] = {}
    for case in cases:
        i = case.rows(held_out=True, most=most)
        if not len(i):
            continue
        chip, lib = world[0][case.chip], world[1].get(case.engine, world[1]["any"])
        predicted = case.price(chip, lib, i)
        ratio = predicted / case.measured_s[i]
        error = np.abs(ratio - 1) * 100
        plain = np.abs(case.price(chip, world[1]["any"], i) / case.measured_s[i] - 1) * 100
        notes = (case.dropped, ODD.get((case.chip, case.engine, case.what), ""))
        note = "; ".join(n for n in notes if n) or "-"
        pooled.setdefault((case.bar, case.chip, False), []).append(error)
        if (case.chip, case.engine, case.what) not in ODD:
            pooled.setdefault((case.bar, case.chip, True), []).append(error)
        print(
            f"{case.what:32} {case.chip:5} {case.engine:7} {len(i):6d} {np.median(error):6.1f}% "
            f"{error.mean():5.1f}% {np.quantile(error, 0.9):5.1f}% {error.max():5.0f}% "
            f"{np.mean(error < 10):5.0%} {np.mean(error < 20):5.0%} {np.median(plain):5.1f}% "
            f"{np.median(ratio) - 1:+6.1%}  {note}"
        )
    print("\nall held-out rows of a bar: median, mean, p90, worst; without the odd kernels named above")
    for (bar, chip, _), errors in sorted((k, v) for k, v in pooled.items() if not k[2]):
        e, plain = np.concatenate(errors), np.concatenate(pooled[bar, chip, True])
        verdict = "met" if np.median(e) <= BARS[bar] else "NOT met"
        both = "   ".join(
            f"{np.median(x):5.1f}% {x.mean():5.1f}% {np.quantile(x, 0.9):5.1f}% {x.max():5.0f}%"
            for x in (e, plain)
        )
        print(f"  {bar:12} {chip}  {both}   bar {BARS[bar]}%: {verdict}")


def bounds(cases: Sequence[Case], world: World) -> int:
    """Print how near every row, fitted to or held out, is priced to its roofline; the prices below it."""
    print("\nevery row beside its roofline at the datasheet's peaks: prices below it, least price over it;")
    print("the same of the measured times")
    broken = 0
    groups = sorted({(case.bar, case.chip) for case in cases}, key=lambda k: (list(BARS).index(k[0]), k[1]))
    for bar, chip in groups:
        ratios, seen = [], []
        for case in (case for case in cases if (case.bar, case.chip) == (bar, chip)):
            lib = world[1].get(case.engine, world[1]["any"])
            rows = np.arange(len(case.measured_s))
            ratios.append(case.price(world[0][chip], lib, rows) / case.least_s)
            seen.append(case.measured_s / case.least_s)
        ratio, measured = np.concatenate(ratios), np.concatenate(seen)
        below = int((ratio < 1 - 1e-9).sum())
        broken += below
        print(
            f"  {bar:12} {chip} {len(ratio):7,d} rows  {below:4d} below  least {ratio.min():6.3f}  "
            f"measured {int((measured < 1).sum()):5d} below, least {measured.min():6.3f}"
        )
    print(f"predictions below the roofline: {broken}")
    return broken


def write(world: World, path: Path) -> None:
    """The fitted world as TOML, everything that was not fitted as it stood."""
    old = tables()
    lines = [HEADER.rstrip()]
    for name, chip in old["chip"].items():
        lines += ["", f"[chip.{name}]"]
        of = world[0].get(name)
        for key, value in chip.items():
            now = getattr(of, key) if of is not None and key in FITTED else value
            lines.append(f"{key} = {toml(now)}")
    for name, sibling in old["sibling"].items():
        lines += ["", f"[sibling.{name}]", *(f"{key} = {toml(value)}" for key, value in sibling.items())]
    for name, of_library in world[1].items():
        lines += ["", f"[library.{name}]"]
        lines += [
            f"{f.name} = {toml(getattr(of_library, f.name))}" for f in fields(Library) if f.name != "name"
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value + '"'
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + " }"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


HEADER = """\
# Chips and kernel libraries for the kernel models of tongyun.chip. SI units.
# Of a chip six numbers are fitted: memory_efficiency, math_efficiency, core_load_bytes_per_s,
# fill_s, link_efficiency, hop_s. Those of a100 and h100 are derived: fitted on the A100 and H100
# tables of aiconfigurator-core 0.12.0 by `benchmarks/silicon.py --fit`, three shape families of ten
# held out. The numbers of a library are fitted there over both chips together and hold on any chip.
# Peaks, bandwidths, cores, links: vendor. Clock: derived, peak / cores / FLOPs a core does in a cycle
# (2048 on A100, 4096 on H100). A sibling shares the cores of a fitted chip; nothing of it is fitted.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="the package's systems/data folder")
    parser.add_argument("--fit", action="store_true", help="fit and rewrite silicon.toml first")
    parser.add_argument("--rows", type=int, default=4000, help="most held-out rows judged of one table")
    asked = parser.parse_args()
    data = asked.data or installed()
    if data is None or find_spec("pyarrow") is None:
        print("skipped: needs aiconfigurator-core (or its systems/data folder, --data) and pyarrow")
        return
    cases = gather(data)
    world: World = ({c: silicon(c) for c in CHIPS}, {name: library(name) for name in (*ENGINES, "any")})
    if asked.fit:
        world = fit_all(cases)
        write(world, Path(__file__).parents[1] / "src" / "tongyun" / "chip" / "silicon.toml")
    report(cases, world, asked.rows)
    if bounds(cases, world):
        raise SystemExit("a price below its roofline is an error of the model")


if __name__ == "__main__":
    main()
