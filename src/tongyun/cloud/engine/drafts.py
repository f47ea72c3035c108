"""What of a step's accepted drafts a request gets: all up to a token that ends it. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tongyun.cloud.engine.protocol import StepResult
from tongyun.cloud.sched.request import Batch, Finish, Request


def shortened(
    result: StepResult,
    batch: Batch,
    ends: Callable[[int, Request], bool],
    stopped: dict[str, Finish],
) -> StepResult:
    """A step's result without the drafts behind a token that `ends` its request; adds to `stopped`."""
    further: dict[str, Sequence[int]] = {}
    for piece in batch.pieces:
        request, more = piece.request, result.further.get(piece.request.id, ())
        if not more or request.id in stopped:
            continue
        place = next((i for i, token in enumerate(more) if ends(token, request)), None)
        if place is not None:
            stopped[request.id] = Finish.STOP
            more = more[: place + 1]
        further[request.id] = more
    return replace(result, further=further)
