"""Tokens per second of a chip as a deployment grows over nodes and domains, and the plan behind each.

Were a plan replication alone, every size would give the same tokens per chip.

    python benchmarks/plan_borders.py [--sizes 16,32,64,128] [--tpot-ms 30]
"""

from __future__ import annotations

import argparse

from tongyun.codesign.answer import Answer
from tongyun.codesign.plan import plan
from tongyun.codesign.space import Question, default_dtype
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision
from tongyun.specs import find_chip, find_model

MODELS = ("Qwen/Qwen3-235B-A22B", "deepseek-ai/DeepSeek-V3")
CHIPS = ("h100", "h200", "gb200", "zhenwu-810e")
ISL, OSL, TTFT_S = 4000, 500, 2.0


def asked(model: str, chip: str, chips: int, tpot_s: float) -> Answer:
    config, spec = ModelConfig.from_hf(find_model(model)[0], name=model), find_chip(chip)
    return plan(
        Question(
            model=config,
            chip=spec,
            chips=chips,
            isl=ISL,
            osl=OSL,
            precision=Precision.of(default_dtype(config, spec)),
            ttft_s=TTFT_S,
            tpot_s=tpot_s,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--sizes", default="16,32,64,128")
    parser.add_argument("--tpot-ms", type=float, default=30.0)
    given = parser.parse_args()
    sizes = [int(size) for size in given.sizes.split(",")]
    print(f"{ISL} tokens in, {OSL} out, TTFT at most {TTFT_S:g} s, TPOT at most {given.tpot_ms:g} ms")
    print(f"{'model':24} {'chip':12} {'chips':>5} {'tok/s/chip':>10}  best plan")
    for model in MODELS:
        for chip in CHIPS:
            for chips in sizes:
                best = asked(model, chip, chips, given.tpot_ms / 1e3).best
                rate = "–" if best is None else f"{best.figures.tok_s_per_chip:.1f}"
                idle = "" if best is None or not best.plan.idle_chips else f"; {best.plan.idle_reason}"
                text = "none" if best is None else f"{best.plan}{idle}"
                print(f"{model.split('/')[1]:24} {chip:12} {chips:5} {rate:>10}  {text}")


if __name__ == "__main__":
    main()
