"""How long a plan takes, whole process, beside aiconfigurator asked the same in turn.

Two questions: Qwen3-32B on 8 H200 and Qwen3-235B-A22B on 64. Each program is started
anew for each turn, ours and the peer's one after the other, so that a busy moment of the
machine meets both; the median of the turns is printed with the fastest and the slowest.
A first start of ours, which may have to compile a checkout, is not counted.
The programs do not search the same space: the rates say how many configurations we price.

    python benchmarks/plan_speed.py [--peer ENV/bin/aiconfigurator] [--turns 3]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

# An installed program has its bytecode; the environment may forbid a checkout to keep it.
INSTALLED = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
LIMITS = {"--isl": "4000", "--osl": "500"}
TTFT_MS, TPOT_MS = "2000", "30"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question, as both programs name it."""

    model: str
    chips: int

    @property
    def ours(self) -> list[str]:
        sizes = [word for pair in LIMITS.items() for word in pair]
        limits = ["--ttft-ms", TTFT_MS, "--tpot-ms", TPOT_MS, "--json"]
        asked = ["--model", self.model, "--chip", "h200", "--chips", str(self.chips)]
        return [sys.executable, "-m", "tongyun", "plan", *asked, *sizes, *limits]

    def peers(self, program: str) -> list[str]:
        sizes = [word for pair in LIMITS.items() for word in pair]
        asked = ["--model-path", self.model, "--system", "h200_sxm", "--total-gpus", str(self.chips)]
        return [program, "cli", "default", *asked, *sizes, "--ttft", TTFT_MS, "--tpot", TPOT_MS]


QUESTIONS = (
    Asked(model="Qwen/Qwen3-32B", chips=8),
    Asked(model="Qwen/Qwen3-235B-A22B", chips=64),
)


def timed(command: list[str]) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Seconds from start to exit of a process, and what it said."""
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=INSTALLED)
    return time.perf_counter() - begin, done


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):7.2f} ({min(seconds):.2f}–{max(seconds):.2f}) s"


def judge(asked: Asked, program: str | None, turns: int) -> None:
    """Take turns, and print how long each took."""
    ours: list[float] = []
    theirs: list[float] = []
    searches: list[float] = []
    count = 0
    timed(asked.ours)
    for _ in range(turns):
        seconds, done = timed(asked.ours)
        if done.returncode:
            raise SystemExit(f"{' '.join(asked.ours)}: exit code {done.returncode}\n{done.stderr}")
        answer = json.loads(done.stdout)
        count = answer["evaluated"]
        searches.append(answer["seconds"])
        ours.append(seconds)
        if program is not None:
            seconds, done = timed(asked.peers(program))
            if done.returncode:
                print(f"the peer failed: {done.stderr.strip().splitlines()[-1:]}")
                program = None
            else:
                theirs.append(seconds)
    rate = count / statistics.median(searches)
    print(f"{asked.model} on {asked.chips} h200")
    print(f"  tongyun         {spread(ours)}   {count:,} configurations, {rate:,.0f} a second inside")
    if theirs:
        times = statistics.median(theirs) / statistics.median(ours)
        print(f"  aiconfigurator  {spread(theirs)}   {times:.1f} times as long")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--peer", default=shutil.which("aiconfigurator"), help="aiconfigurator's program")
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    if given.peer is None:
        print("aiconfigurator is not installed: ours alone (--peer names its program)")
    for asked in QUESTIONS:
        judge(asked, given.peer, given.turns)


if __name__ == "__main__":
    main()
