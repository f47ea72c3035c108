"""Which limit no candidate keeps, in words: the nearest candidate, and by how much it misses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from tongyun.codesign.space import Question
from tongyun.units import GB, MS

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Named = Callable[[int], str]


def unmet(
    question: Question,
    broken: Mapping[str, Mask],
    values: Mapping[str, Array],
    named: Named,
    room_bytes: float,
) -> str:
    """`broken` says which limit each point breaks, `values` are their TTFT, TPOT and memory."""
    if broken["memory"].all():
        needed = values["memory_bytes"]
        least = int(np.argmin(needed))
        over = needed[least] - room_bytes
        return (
            f"memory: {named(least)} needs {needed[least] / GB:.2f} GB on each chip, "
            f"{over / GB:.2f} GB ({over:.0f} bytes) more than the {room_bytes / GB:.2f} GB usable"
        )
    fits = ~broken["memory"] & ~broken["prefill"]
    if not fits.any():
        return "prefill: no candidate that fits memory keeps up with the prompts; more chips are needed"
    return _latency(question, broken, values, named, fits)


def _latency(
    question: Question,
    broken: Mapping[str, Mask],
    values: Mapping[str, Array],
    named: Named,
    fits: Mask,
) -> str:
    limits = {"ttft": question.ttft_s, "tpot": question.tpot_s}
    ratio = {}
    for name, limit in limits.items():
        found = values[f"{name}_s"]
        ratio[name] = found / limit if limit else np.zeros_like(found)
        if limit and (broken[name] | ~fits).all():
            near = _least(ratio[name], fits)
            return (
                f"{name}: nearest is {named(near)} with {name.upper()} {found[near] / MS:.4g} ms, "
                f"{(found[near] - limit) / MS:.4g} ms over the limit"
            )
    near = _least(np.maximum(ratio["ttft"], ratio["tpot"]), fits)
    return (
        "ttft and tpot: each can be kept, but not both; nearest is "
        f"{named(near)} with TTFT {values['ttft_s'][near] / MS:.4g} ms "
        f"and TPOT {values['tpot_s'][near] / MS:.4g} ms"
    )


def _least(values: Array, among: Mask) -> int:
    return int(np.argmin(np.where(among, values, np.inf)))
