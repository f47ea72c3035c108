"""Choose the instance for a request where instances are shared by several models."""

from __future__ import annotations

from collections.abc import Sequence

from tongyun.cloud.sched.freeness import Load
from tongyun.cloud.sched.request import Request

CROWD = 32
"""Requests of a model that go to one instance before another takes some, if less is asked of that."""


class ByModel:
    """Where the model has requests, for they share its steps, or where its weights lie and nobody's work.

    Else where the models that have requests ask for the least time; of equals, one that holds its
    weights, then the least loaded. For one model this is `LeastLoad`.
    """

    def __init__(self, crowd: int = CROWD) -> None:
        self._crowd = crowd

    def choose(self, request: Request, loads: Sequence[Load]) -> int:
        model = request.model or ""
        known = [{name: count for name, count, _ in load.models} for load in loads]
        at_work = [sum(share for _, _, share in load.models) for load in loads]

        def rank(index: int) -> tuple[float, bool, tuple[int, int], int]:
            return at_work[index], model not in known[index], loads[index][:2], index

        at_it = [
            index
            for index, models in enumerate(known)
            if models.get(model) or (model in models and not at_work[index])
        ]
        least = min(range(len(loads)), key=rank)
        if not at_it:
            return least
        chosen = min(at_it, key=lambda index: (known[index][model], rank(index)))
        crowded = known[chosen][model] >= self._crowd and at_work[least] < at_work[chosen]
        return least if crowded else chosen
