"""What the order of service of the chip compiled for costs on other chips, and that better is no slower.

    python benchmarks/ppu_order.py [--programs 500] [--every 2] [--seed 0]

Each program is run on chips with one figure changed: in its own order, and with requests served as they
come. Percentages are the time of the first beside the second; `slower` counts programs that take longer than
on the chip they were compiled for, which must be none where the figure is better. All times are simulated.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ppu_programs import draw
from tongyun.chip.ppu.timing import simulate
from tongyun.specs import Ppu

FIELDS = ("hbm_bytes_per_s", "l2_rate", "port_bytes", "clock_hz", "vector_lanes", "tensor_flops")
FACTORS = (0.5, 0.9, 1.1, 1.5, 2.0, 4.0)


def changed(ppu: Ppu, field: str, factor: float) -> Ppu:
    value = getattr(ppu, field)
    if isinstance(value, Mapping):
        return replace(ppu, **{field: {key: each * factor for key, each in value.items()}})
    return replace(ppu, **{field: value * factor})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", type=int, default=500)
    parser.add_argument("--every", type=int, default=2, help="take every so many of them")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    drawn = list(draw(given.seed, given.programs))[:: given.every]
    own = [simulate(each.program, each.ppu, each.symbols).seconds for each in drawn]
    print(f"{'figure':>15} {'times':>5} {'mean %':>7} {'p95 %':>7} {'max %':>7} {'min %':>7} {'slower':>7}")
    for field in FIELDS:
        for factor in FACTORS:
            loss, slower = [], 0
            for each, before in zip(drawn, own, strict=True):
                other = changed(each.ppu, field, factor)
                kept = simulate(each.program, other, each.symbols).seconds
                come = simulate(replace(each.program, order=()), other, each.symbols).seconds
                loss.append(100 * (kept / come - 1))
                slower += kept > before
            cells = [np.mean(loss), np.percentile(loss, 95), max(loss), min(loss)]
            print(
                f"{field:>15} {factor:>5} " + " ".join(f"{cell:>7.2f}" for cell in cells) + f" {slower:>7}",
                flush=True,
            )


if __name__ == "__main__":
    main()
