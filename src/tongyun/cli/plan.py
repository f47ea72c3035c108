"""`tongyun plan`: which deployment of a model on these chips, and what it gives.

Declares the flags and describes them; `planning` carries out what they ask for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan(
    model: Annotated[str, typer.Option(help="Hugging Face id in the catalogue, or a directory.")],
    isl: Annotated[int | None, typer.Option(help="Input tokens of a request.")] = None,
    osl: Annotated[int | None, typer.Option(help="Output tokens of a request.")] = None,
    chip: Annotated[
        str | None, typer.Option(help="Catalogue name, `local` (calibrated), or a TOML file.")
    ] = None,
    chips: Annotated[int, typer.Option(help="Chips there are.")] = 1,
    ttft_ms: Annotated[float | None, typer.Option(help="Most time to first token.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="Most mean time between tokens.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Weights and arithmetic; default as released: bf16, fp8, mxfp4.")
    ] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Keys and values; default bf16.")] = None,
    usd_per_chip_hour: Annotated[
        float | None, typer.Option(help="Your price, in place of the catalogue's.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs: SI units, all of the Pareto.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Where each microsecond and byte of a step goes.")
    ] = False,
    compare: Annotated[
        str | None, typer.Option(help="Other chips in one table: h200,h20:16 (name, or name:count).")
    ] = None,
    launch: Annotated[Path | None, typer.Option(help="Folder for files that start the best plan.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="Which of them: vllm, sglang, kubernetes, ray; default all.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Weights for --launch that are stored in --dtype already.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="A report as one HTML file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    rate: Annotated[
        float | None, typer.Option(help="Requests a second to serve: p50 and p99, on as few chips as can.")
    ] = None,
    workload: Annotated[
        str | None, typer.Option(help="Arrivals and lengths: a catalogue name or a TOML file.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Azure CSV or Mooncake JSONL.")] = None,
    pools: Annotated[
        str | None,
        typer.Option(
            help="Replicas that do both (mixed), prefill and decode apart (split), or both kinds; "
            "default both."
        ),
    ] = None,
    prefix_hit: Annotated[
        float | None, typer.Option(help="Share of input tokens found in the prefix cache, 0 to 1.")
    ] = None,
    draft_tokens: Annotated[
        int | None, typer.Option(help="Tokens drafted for each step (MTP, EAGLE); default none.")
    ] = None,
    acceptance: Annotated[
        float | None, typer.Option(help="Probability that a drafted token is right, with --draft-tokens.")
    ] = None,
    kernels: Annotated[
        str,
        typer.Option(
            help="Price operators by kernel models (modelled), or by the programs that the chip's compiler "
            "makes of them (lowered)."
        ),
    ] = "modelled",
    draft_weights: Annotated[
        str | None, typer.Option(help="Draft module for --launch, where the model has none of its own.")
    ] = None,
) -> None:
    """Plan a deployment: best and Pareto under limits on TTFT and TPOT."""
    given = dict(locals())
    from tongyun.cli.planning import carry_out

    carry_out(given)
