"""The engine on one device: how exact its logits are, how fast its steps, and what they were priced at.

    python benchmarks/device.py [--model NAME_OR_DIRECTORY] [--device cuda] [--chip h100]

Exact: one text through transformers in float32, through transformers in bfloat16, and through
the engine as it serves, every token given; the root mean square of both differences from
float32, and how often each would have chosen another token. Fast: decoding steps of some
batches and prompts alone, through the executor, without a server; beside them the time to
read the weights and the keys and values once at the chip's bandwidth, the calibration's
price where this machine is calibrated, and the catalogue chip's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from tongyun.chip.calibrated import engine_precision
from tongyun.chip.roofline import streamed_bytes
from tongyun.cli.up import find
from tongyun.cloud.engine.calibrate.measure import setting
from tongyun.cloud.engine.calibrate.spec import kept, stale
from tongyun.cloud.engine.torch_executor import ExecutorOptions, TorchExecutor, open_executor
from tongyun.cloud.sched.request import Batch, Piece, Request
from tongyun.cost import step_cost
from tongyun.model.config import ModelConfig
from tongyun.model.graph import StepShape
from tongyun.model.kernels.attention import lay_out
from tongyun.model.paged import PagedAttend
from tongyun.model.steps import PLAIN, step
from tongyun.report import column, quantity, table, to_json
from tongyun.specs import find_chip, names

TEXT, CHUNK = 192, 64
"""Tokens of the text whose logits are compared, and of the pieces in which the engine is given it."""
DECODES, CONTEXT = (1, 8, 64), 160
PROMPTS = (128, 512)
WARM, STEPS = 5, 40


@dataclass(frozen=True, kw_only=True)
class Error:
    """Logits in bfloat16 against those in float32."""

    whose: str
    rms: float
    """Root mean square of the difference, over that of the float32 logits."""
    others: int
    """Of `TEXT` tokens, those chosen otherwise."""
    widest: float
    """Of those, the widest float32 gap to the chosen token, over the root mean square of the difference."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Steps of one composition."""

    step: str
    tokens: int
    seconds: float
    bound_s: float
    calibrated_s: float | None
    catalogue_s: float


def errors(directory: Path, run: TorchExecutor, device: str) -> list[Error]:
    """Both in bfloat16 against float32, on the same device."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(0)
    text = torch.randint(run.model.config.vocab, (TEXT,), generator=generator)
    with torch.inference_mode():
        exact, theirs = (
            AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
            .to(device)(text.unsqueeze(0).to(device))
            .logits[0]
            .float()
            for dtype in (torch.float32, torch.bfloat16)
        )
        ours = torch.cat([_chunk(run, text, start) for start in range(0, TEXT, CHUNK)])
    return [_error("transformers", theirs, exact), _error("tongyun", ours, exact)]


def _chunk(run: TorchExecutor, text: Tensor, start: int) -> Tensor:
    """Logits of all but the last of a piece's tokens as a prompt, and of the last as a decode."""
    rows, blocks = [], range(-(-TEXT // run.cache.block_tokens))
    for first, stop in ((start, start + CHUNK - 1), (start + CHUNK - 1, start + CHUNK)):
        layout = lay_out([(first, stop - first, blocks)], run.cache.block_tokens, run.device)
        attend = PagedAttend(run.cache, layout, run.model.ops)
        rows.append(run.model.logits(run.model(text[first:stop].to(run.device), layout.positions_T, attend)))
    return torch.cat(rows)


def _error(whose: str, logits: Tensor, exact: Tensor) -> Error:
    rms = float((logits - exact).square().mean().sqrt())
    chosen = logits.argmax(-1)
    gap = exact.amax(-1) - exact.gather(1, chosen.unsqueeze(1)).squeeze(1)
    return Error(
        whose=whose,
        rms=rms / float(exact.square().mean().sqrt()),
        others=int((gap > 0).sum()),
        widest=float(gap.max()) / rms,
    )


def timed(run: TorchExecutor, config: ModelConfig, chip: str, local: bool) -> list[Timed]:
    """Medians of steps as the executor reports them."""
    rows = []
    for batch in DECODES:
        shape = StepShape.decoding(batch, CONTEXT + STEPS / 2)
        rows.append(_timed(f"{batch} decoding", batch, _decodes(run, batch), config, shape, chip, local))
    for tokens in PROMPTS:
        shape = StepShape.prefilling(tokens)
        rows.append(_timed(f"prompt of {tokens}", tokens, _prompts(run, tokens), config, shape, chip, local))
    return rows


def _timed(
    name: str, tokens: int, seconds: float, config: ModelConfig, shape: StepShape, chip: str, local: bool
) -> Timed:
    known, here = find_chip(chip).at(), kept() if local else None
    priced = None
    if here is not None and here.calibration is not None:
        priced = float(
            step_cost(config, shape, here.at(), precision=engine_precision(here.calibration)).seconds
        )
    return Timed(
        step=name,
        tokens=tokens,
        seconds=seconds,
        bound_s=float(streamed_bytes(step(config, shape, precision=PLAIN))) / known.memory_bytes_per_s,
        calibrated_s=priced,
        catalogue_s=float(step_cost(config, shape, known, precision=PLAIN).seconds),
    )


def _decodes(run: TorchExecutor, batch: int) -> float:
    each = -(-(CONTEXT + WARM + STEPS + 1) // run.cache.block_tokens)
    seconds = []
    for number in range(WARM + STEPS):
        pieces = [_piece(f"r{i}", CONTEXT + number, 1, range(i * each, (i + 1) * each)) for i in range(batch)]
        seconds.append(run.execute(Batch(pieces=tuple(pieces))).duration_s)
    return statistics.median(seconds[WARM:])


def _prompts(run: TorchExecutor, tokens: int) -> float:
    piece = _piece("r", 0, tokens, range(-(-tokens // run.cache.block_tokens)))
    return statistics.median(run.execute(Batch(pieces=(piece,))).duration_s for _ in range(WARM + STEPS))


def _piece(name: str, start: int, length: int, blocks: Sequence[int]) -> Piece:
    known = tuple(i % 97 for i in range(start + length))
    asked = Request(id=name, prompt=known, output_tokens=1)
    return Piece(request=asked, start=start, length=length, samples=True, history=known, blocks=tuple(blocks))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="directory, or catalogue name")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--chip", default="h100", help="of the catalogue, to compare with")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    directory, config = find(args.model, random=args.model in names("models"))
    run = open_executor(
        directory, ExecutorOptions(device=args.device, threads=args.threads, kv_bytes=2 * 10**9)
    )
    here = setting(device=args.device, threads=args.threads, kernels=None, quick=False)
    found, steps = (
        errors(directory, run, args.device),
        timed(run, config, args.chip, not stale(here.machine())),
    )
    if args.json:
        print(to_json({"errors": found, "steps": steps}))
        return
    console = Console(width=140)
    columns = [
        column(name, left=not i) for i, name in enumerate(("logits of", "rms error", "other tokens", "gap"))
    ]
    lines = [[e.whose, f"{e.rms:.3%}", f"{e.others} of {TEXT}", f"{e.widest:.2f} × rms"] for e in found]
    console.print(table(f"{config.name}: bfloat16 against float32", columns, lines))
    heads = ("step", "measured", "tokens/s", "bytes bound", "calibrated", args.chip)
    rows = [
        [
            s.step,
            quantity(s.seconds, "s"),
            f"{s.tokens / s.seconds:.0f}",
            quantity(s.bound_s, "s"),
            ""
            if s.calibrated_s is None
            else f"{quantity(s.calibrated_s, 's')} {s.calibrated_s / s.seconds - 1:+.1%}",
            f"{quantity(s.catalogue_s, 's')} {s.catalogue_s / s.seconds - 1:+.1%}",
        ]
        for s in steps
    ]
    console.print(table(f"{config.name}: steps", [column(h, left=not i) for i, h in enumerate(heads)], rows))


if __name__ == "__main__":
    main()
