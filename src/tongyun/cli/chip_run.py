"""`tongyun chip run MODEL`: a prompt on the functional simulator, its tokens beside torch's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tongyun.errors import InputError

if TYPE_CHECKING:
    from tongyun.cloud.engine.on_chip import ChipRun
    from tongyun.model.qwen3 import Qwen3
    from tongyun.model.tokenizer import Tokenizer

MOST_BYTES = 8e9
"""Of random weights: what a machine that runs a functional simulator can be expected to hold."""


def run(
    model: Annotated[str, typer.Argument(help="A model with weights, or one of the catalogue.")],
    prompt: Annotated[str, typer.Option(help="What the model goes on from.")] = "def add(a, b):",
    tokens: Annotated[int, typer.Option(help="Tokens to produce, greedily.", min=1)] = 8,
    chip: Annotated[str, typer.Option(help="A PPU of the catalogue, or a TOML file.")] = "zhenwu-810e",
    random: Annotated[
        bool, typer.Option("--random", help="Random weights in the shape of a model of the catalogue.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compile a model, run a prompt on the simulated chip, and compare its tokens with torch's.

    Exit code 1 where a token differs from torch's and rounding does not explain it.
    """
    from tongyun.cloud.engine.on_chip import run_prompt
    from tongyun.specs import find_ppu

    spec = find_ppu(chip)
    network, tokenizer = _random(model) if random else _stored(model)
    # Random weights know no text: its bytes are as good as any tokens.
    ids = (
        tuple(byte % network.config.vocab for byte in prompt.encode())
        if tokenizer is None
        else tuple(tokenizer.encode(prompt))
    )
    result = run_prompt(network, spec, ids, tokens)
    text = None if tokenizer is None else tokenizer.decode(list(result.tokens))
    (_print_json if json else _print)(result, spec.name, text)
    if result.wrong:
        raise typer.Exit(1)


def _stored(model: str) -> tuple[Qwen3, Tokenizer]:
    from tongyun.cloud.engine.ppu_executor import load_for_chip
    from tongyun.model.find import find_model
    from tongyun.model.tokenizer import Tokenizer

    directory = find_model(model)
    return load_for_chip(directory), Tokenizer(directory)


def _random(model: str) -> tuple[Qwen3, None]:
    from tongyun.cloud.engine.ppu_executor import random_for_chip
    from tongyun.model.config import ModelConfig
    from tongyun.model.steps import parameters
    from tongyun.specs import find_model

    raw, _ = find_model(model)
    config = ModelConfig.from_hf(raw, name=model)
    if (size := 2 * parameters(config)) > MOST_BYTES:
        raise InputError(
            f"{model}: random weights of {size:,} bytes are too many to simulate "
            f"number by number (at most {MOST_BYTES:,.0f}); `tongyun chip profile` needs none"
        )
    return random_for_chip(config), None


def _print_json(result: ChipRun, chip: str, text: str | None) -> None:
    from dataclasses import asdict
    from json import dumps

    sources = {"chip_s": "simulated", "joules": "simulated", "wall_s": "measured"}
    answer = {"chip": chip, "text": text, **asdict(result), "wrong": result.wrong, "sources": sources}
    typer.echo(dumps(answer, indent=2))


def _print(result: ChipRun, chip: str, text: str | None) -> None:
    count = len(result.tokens)
    typer.echo(f"tokens     {' '.join(map(str, result.tokens))}")
    if text is not None:
        typer.echo(f"text       {text!r}")
    others = f"; {result.near_ties} near-ties, {result.wrong} wrong" if result.same < count else ""
    typer.echo(f"agreement  {result.same} of {count} are what torch chooses in f32{others}")
    simulated = f"{result.chip_s * 1e3:.3f} ms and {result.joules:.3g} J in {result.steps} steps"
    typer.echo(f"chip       {simulated} on {chip} (simulated)")
    typer.echo(
        f"simulator  {result.wall_s:.1f} s (measured); {result.flops:,} FLOPs, all by the chip's instructions"
    )


__all__ = ["run"]
