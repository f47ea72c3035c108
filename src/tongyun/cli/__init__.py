"""The command line, and the only place that chooses implementations.

Each command is a module of this package with a function of its name; a module is
cheap to import and brings in what it needs when it runs, so that `tongyun plan`
starts without PyTorch, and asked plainly without Typer. `main` turns an error of our
tree into one line and the exit code it carries: 0 ok, 1 the answer is no, 2 bad input.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from tongyun.errors import TongyunError

if TYPE_CHECKING:
    import typer

INTERRUPTED = 130
COMMANDS = ("up", "calibrate", "plan", "simulate", "serve", "bench", "train", "validate", "chip", "specs")
"""In the order of the help; each a module of this package."""


def build(wanted: str | None = None) -> typer.Typer:
    """The application: with the wanted command alone, or with all of them where it is not one.

    Reading ten modules and describing their options takes longer than most answers.
    """
    import typer

    app = typer.Typer(
        name="tongyun",
        help="Design the chip, plan and run the cloud, serve the model, and say what a million tokens costs.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    # With a callback an application of one command still takes the command's name.
    app.callback()(_nothing)
    for name in (wanted,) if wanted in COMMANDS else COMMANDS:
        module = import_module(f"tongyun.cli.{name}")
        group = getattr(module, "app", None) or getattr(module, name)
        if isinstance(group, typer.Typer):
            app.add_typer(group, name=name)
        else:
            app.command(name)(group)
    return app


def _nothing() -> None:
    """No option stands before a command."""


def main() -> None:
    """Entry point of the `tongyun` console script."""
    try:
        _run(sys.argv[1:])
    except TongyunError as error:
        # An answer for programs needs neither of them.
        from rich.console import Console
        from rich.markup import escape

        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[red]error:[/] {escape(str(error))}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # Nobody reads on; what is left must not be tried again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _run(words: list[str]) -> None:
    """The command that the words name, read in the quickest way."""
    from tongyun.cli.straight import PLAN, read

    given = read(words[1:], PLAN) if words[:1] == ["plan"] else None
    if given is None:
        build(words[0] if words else None)()
    else:
        from tongyun.cli.planning import carry_out

        carry_out(given)
        sys.stdout.flush()
