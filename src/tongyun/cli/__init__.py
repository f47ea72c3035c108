"""The command line, and the only place that chooses implementations.

Each command is a module of this package with a function of its name; a module is
cheap to import and brings in what it needs when it runs, so that `tongyun plan`
starts without PyTorch. `main` turns an error of our tree into one line and the exit
code it carries: 0 ok, 1 the answer is no, 2 bad input.
"""

from __future__ import annotations

import sys

import typer

from tongyun.cli.bench import bench
from tongyun.cli.calibrate import calibrate
from tongyun.cli.chip import app as chip
from tongyun.cli.plan import plan
from tongyun.cli.serve import serve
from tongyun.cli.simulate import simulate
from tongyun.cli.specs import app as specs
from tongyun.cli.train import train
from tongyun.cli.up import up
from tongyun.cli.validate import validate
from tongyun.errors import TongyunError

INTERRUPTED = 130


def build() -> typer.Typer:
    """The application with every command registered."""
    app = typer.Typer(
        name="tongyun",
        help="Design the chip, plan and run the cloud, serve the model, and say what a million tokens costs.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    app.command()(up)
    app.command()(calibrate)
    app.command()(plan)
    app.command()(simulate)
    app.command()(serve)
    app.add_typer(bench, name="bench")
    app.command()(train)
    app.command()(validate)
    app.add_typer(chip, name="chip")
    app.add_typer(specs, name="specs")
    return app


def main() -> None:
    """Entry point of the `tongyun` console script."""
    try:
        build()()
    except TongyunError as error:
        # An answer for programs needs neither of them.
        from rich.console import Console
        from rich.markup import escape

        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[red]error:[/] {escape(str(error))}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
