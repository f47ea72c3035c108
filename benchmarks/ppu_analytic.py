"""The analytic price of lowered programs beside the timing simulator's, over programs drawn from a seed.

    python benchmarks/ppu_analytic.py [--programs 500] [--seed 0] [--worst 5]

Bars: mean of the absolute error 3 %, 95th percentile 8 %, largest 15 %, rank correlation 0.98. Both sides are
modelled; seconds of this machine are wall time, after the program has been laid out, best of two.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ppu_programs import draw
from tongyun.chip.ppu.analytic import analyse
from tongyun.chip.ppu.timing import Timing, simulate


def timed(call: Callable[[], Timing]) -> tuple[Timing, float]:
    least = np.inf
    for _ in range(2):
        begun = time.perf_counter()
        answer = call()
        least = min(least, time.perf_counter() - begun)
    return answer, least


def rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Spearman's, of numbers without ties."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


def line(name: str, price: NDArray[np.float64], simulated: NDArray[np.float64], speed: float) -> str:
    error = 100 * (price / simulated - 1)
    away = np.abs(error)
    spread = [away.mean(), np.median(away), np.percentile(away, 95), away.max(), np.median(error)]
    cells = " ".join(f"{value:>8.2f}" for value in spread)
    return f"{name:>9} {len(price):>8} {cells} {rank_correlation(price, simulated):>8.4f} {speed:>7.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worst", type=int, default=5, help="how many of the worst to name")
    given = parser.parse_args()
    names, kinds, table = [], [], []
    for drawn in draw(given.seed, given.programs):
        simulated, sim_s = timed(lambda drawn=drawn: simulate(drawn.program, drawn.ppu, drawn.symbols))  # type: ignore[misc]
        price, price_s = timed(lambda drawn=drawn: analyse(drawn.program, drawn.ppu, drawn.symbols))  # type: ignore[misc]
        names.append(f"{len(names)} {drawn.kind}: {drawn.what}, {drawn.ppu.name} {drawn.ppu.corner}")
        kinds.append(drawn.kind)
        table.append((price.seconds, simulated.seconds, price_s, sim_s))
    prices, times, price_s, sim_s = np.array(table).T
    kind = np.array(kinds)
    print(
        f"{'kind':>9} {'programs':>8} {'mean %':>8} {'median %':>8} {'p95 %':>8} {'max %':>8} {'bias %':>8} "
        f"{'rank':>8} {'faster':>7}"
    )
    for name in sorted(set(kinds)):
        of = kind == name
        print(line(name, prices[of], times[of], sim_s[of].sum() / price_s[of].sum()))
    print(line("all", prices, times, sim_s.sum() / price_s.sum()))
    error = 100 * (prices / times - 1)
    for place in np.abs(error).argsort()[::-1][: given.worst]:
        print(f"  {error[place]:>6.1f} %  {times[place] * 1e6:>9.1f} µs  {names[place]}")


if __name__ == "__main__":
    main()
