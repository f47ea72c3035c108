"""`tongyun train RECIPE`: data, tokenizer, training, evaluation and saving, from one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tongyun.errors import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tongyun.cloud.training.finish import Outcome
    from tongyun.cloud.training.loop import Run


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe in TOML, such as recipes/stdlib-moe.toml.")],
    output: Annotated[
        Path | None, typer.Option(help="Checkpoint, curve and record [default: run/train/NAME].")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="The finished model [default: OUTPUT/model].")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume/--restart", help="Go on from OUTPUT's checkpoint, or discard it.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Train a model from a recipe, and say how many bits per byte it needs for held-out text.

    An interrupted run goes on with --resume from its last checkpoint and ends with the
    same weights: steps are repeatable bit for bit on one machine and number of threads.
    """
    from tongyun.cloud.training.finish import finish, write_text
    from tongyun.cloud.training.loop import Run, use_threads
    from tongyun.cloud.training.prepare import prepare
    from tongyun.cloud.training.recipe import Recipe
    from tongyun.cloud.training.results import markdown
    from tongyun.report import console, show, to_json

    plan = Recipe.load(recipe)
    directory = output or Path("run") / "train" / plan.name
    use_threads(threads)
    status = console(stderr=True)
    with status.status("reading the corpus and learning the tokenizer"):
        prepared = prepare(plan)
        run = Run(plan, prepared.tokens, directory, prepared.digest)
    if run.checkpoint.exists() and resume is None:
        raise InputError(
            f"{run.checkpoint}: a run is kept there; say --resume, --restart or another --output"
        )
    if run.checkpoint.exists() and resume:
        run.restore()
    _steps(run)
    with status.status("saving and evaluating"):
        outcome = finish(run, prepared, save or directory / "model", directory)
        write_text(directory / "results.md", markdown(outcome))
    if as_json:
        print(to_json(outcome))
    else:
        show(*_summary(outcome))


def _steps(run: Run) -> None:
    """All remaining steps behind a progress bar."""
    from tongyun.cloud.training.loop import Point
    from tongyun.report import progress

    training = run.recipe.training
    with progress() as bar:
        task = bar.add_task("training", total=training.steps, completed=run.step)

        before_s = run.curve[-1].seconds if run.curve else 0.0

        def report(point: Point) -> None:
            nonlocal before_s
            rate = training.batch_tokens / (point.seconds - before_s)
            before_s = point.seconds
            bar.update(task, advance=1, description=f"loss {point.loss:.3f}  {rate:,.0f} tokens/s")

        run.train(report)


def _summary(outcome: Outcome) -> list[RenderableType]:
    from rich.text import Text

    from tongyun.report import column, number, quantity, source_tag, table

    rows = [[name, number(bits)] for name, bits in outcome.compressors.items()]
    rows.insert(0, [outcome.name, number(outcome.bits_per_byte)])
    caption = (
        f"{quantity(outcome.held_out_bytes, 'B')} of held-out text, {source_tag(outcome.source)}; "
        f"{number(outcome.trained_tokens / 1e6)} million tokens in {number(outcome.training_s / 60)} min"
    )
    parts: list[RenderableType] = [
        table("Held-out bits per byte", [column("", left=True), column("bits/byte")], rows, caption=caption)
    ]
    for prompt, completion in outcome.completions.items():
        parts.append(Text.assemble((prompt, "bold"), completion, "\n"))
    return parts
