"""The loads under which serving is measured: a few streams to many, and how often requests begin."""

from __future__ import annotations

from dataclasses import dataclass

from tongyun.cloud.engine.calibrate.bench import Bench
from tongyun.cloud.workload import Arrival, Arrivals, Lengths, Process, Workload, sample


@dataclass(frozen=True, kw_only=True)
class Cell:
    """An open-loop load: about so many requests stream at a time, each to so many tokens."""

    streams: int
    output: int
    prompt: int
    """Prompt tokens; a length that no other load has tells its requests from others."""


PROMPT = 128
CELLS = (
    Cell(streams=2, output=64, prompt=PROMPT),
    Cell(streams=5, output=64, prompt=129),
    Cell(streams=12, output=64, prompt=130),
    Cell(streams=28, output=64, prompt=131),
    Cell(streams=2, output=16, prompt=132),
)
CELLS_QUEUED = (
    Cell(streams=2, output=64, prompt=PROMPT),
    Cell(streams=5, output=64, prompt=129),
    Cell(streams=12, output=192, prompt=130),
    Cell(streams=28, output=192, prompt=131),
    Cell(streams=44, output=192, prompt=133),
    Cell(streams=2, output=16, prompt=132),
)
"""On a GPU a step with a prompt takes several times one that decodes: long answers make many streams."""
CELL_S = 3.0
AROUND, AROUND_QUEUED = (3e-4, 9e-5), (1e-4, 1e-5)
"""What serving about adds to a step, and to it for each token: a rate without it would flood small models.
On a GPU the engine leaves the processor's cores to the others."""


def cells(bench: Bench) -> tuple[Cell, ...]:
    """The loads for this device."""
    usual = CELLS_QUEUED if bench.queued else CELLS
    return usual[-1:] if bench.quick else usual


def arrivals(bench: Bench, cell: Cell, step_s: float, prompt_s: float) -> list[Arrival]:
    """Poisson arrivals at the rate that keeps about `streams` requests at a time, by Little's law.

    A request takes its own steps and waits for the prompts of the others.
    """
    base_s, token_s = AROUND_QUEUED if bench.queued else AROUND
    served_s = step_s + base_s + token_s * cell.streams
    rate = cell.streams / (cell.output * served_s + cell.streams * prompt_s)
    return sample(
        Workload(
            arrivals=Arrivals(process=Process.POISSON, rate_per_s=rate),
            prompt=Lengths.fixed(cell.prompt),
            output=Lengths.fixed(cell.output),
            requests=max(8, round(rate * (0.2 if bench.quick else CELL_S))),
            seed=cell.prompt,
        )
    )
