"""What a simulated run did over time, drawn: arrivals, waits, and each pool's requests, tokens and steps.

Means of neighbouring parts of what `Recorder` took down; computes nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.record import Recording, Series
from tongyun.codesign.drawing import Line, curves
from tongyun.codesign.sheet import figure
from tongyun.report import quantity
from tongyun.units import MS

Array = NDArray[np.float64]
POINTS = 240
"""Of a curve: two for each pixel would not be seen."""
WINDOWS = 60
"""Of a run, for percentiles over time: each should hold a few requests."""
TITLES = {"mixed": "Engines", "prefill": "Engines that prefill", "decode": "Engines that decode"}


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The run's time as it is drawn: borders of parts, and the unit they are told in."""

    borders_s: Array
    scale: float
    unit: str

    @classmethod
    def over(cls, borders_s: Array) -> Axis:
        end_s = float(borders_s[-1])
        scale, unit = (1.0, "s") if end_s <= 600 else (60.0, "min") if end_s <= 4 * 3600 else (3600.0, "h")
        return cls(borders_s=borders_s, scale=scale, unit=unit)

    @property
    def middles(self) -> Array:
        return (self.borders_s[1:] + self.borders_s[:-1]) / (2 * self.scale)

    def line(self, name: str, values: Array, style: str, *, filled: bool = False) -> Line:
        """A value for each part."""
        return Line(name=name, x=self.middles.tolist(), y=values.tolist(), style=style, filled=filled)

    def panel(self, title: str, y: str, *lines: Line) -> str:
        """A drawing of the lines; of several, those that are zero throughout are left out."""
        some = [line for line in lines if max(line.y) > 0] or list(lines[:1])
        keys = [(one.style, one.name) for one in some] if len(lines) > 1 else []
        span = (0.0, float(self.borders_s[-1]) / self.scale)
        return figure(title, keys, curves(some, x=self.unit, y=y, span=span))


def over_time(taken: Recording) -> str:
    """What happened in equal parts of the run, pool by pool."""
    pools = [series.coarse(POINTS) for series in taken.series]
    axis = Axis.over(pools[0].borders_s)
    sections = [
        f'<h3>{escape(TITLES[series.role])}</h3><div class="panels">{"".join(_panels(series, axis))}</div>'
        for series in pools
    ]
    part_s = quantity(pools[0].width_s, "s")
    return (
        f"<h2>Over time</h2><p>Exact means over parts of {part_s} of simulated time; nothing is sampled.</p>"
        f'<div class="panels">{_arrivals(taken.records, axis)}</div>{"".join(sections)}'
    )


def _arrivals(records: Iterable[RequestRecord], axis: Axis) -> str:
    came = np.array([(one.arrival_s, one.prompt_tokens) for one in records])
    borders_s = axis.borders_s
    counts, _ = np.histogram(came[:, 0], bins=borders_s)
    tokens, _ = np.histogram(came[:, 0], bins=borders_s, weights=came[:, 1])
    spans_s = np.diff(borders_s)
    requests = axis.line("requests", counts / spans_s, "c0", filled=True)
    prompts = axis.line("prompt tokens", tokens / spans_s, "c1", filled=True)
    return axis.panel("Requests that arrive", "per second", requests) + axis.panel(
        "Prompt tokens that arrive", "per second", prompts
    )


def _panels(series: Series, axis: Axis) -> list[str]:
    line = axis.line

    def per_step(values: Array) -> Array:
        steps = series.steps_per_s
        return np.asarray(np.divide(values, steps, out=np.zeros_like(values), where=steps > 0))

    engines = series.engines.max()
    decoding = line("requests", per_step(series.decode_tokens_per_s), "c3")
    chunk = line("tokens", per_step(series.prompt_tokens_per_s), "c1")
    step_ms = per_step(series.busy * engines / MS)
    up = [] if np.ptp(series.engines) == 0 else [line("up", series.engines, "c4")]
    return [
        axis.panel(
            "Requests",
            "",
            line("running", series.running, "c0", filled=True),
            line("waiting", series.waiting, "c4"),
        ),
        axis.panel("KV blocks held", "% of all", line("held", 100 * series.kv, "c2", filled=True)),
        axis.panel(
            "Tokens computed",
            "per second",
            line("prompts", series.prompt_tokens_per_s, "c1"),
            line("decode", series.decode_tokens_per_s, "c0"),
        ),
        axis.panel("Prompt tokens in a step", "mean", chunk)
        if series.role == "prefill"
        else axis.panel("Requests that decode in a step", "mean", decoding),
        axis.panel("A step", "ms, mean", axis.line("step", step_ms, "c2")),
        axis.panel("Engines", "", line("in a step", series.busy * engines, "c0", filled=True), *up),
    ]


def waits(taken: Recording) -> str:
    """TTFT by when requests arrived: half and nine tenths of each part were faster."""
    good = [(one.arrival_s, one.ttft_s) for one in taken.records if one.ok]
    if not good:
        return ""
    axis = Axis.over(np.linspace(0.0, taken.series[0].until_s, WINDOWS + 1))
    came = np.array(good)
    place = np.clip(np.searchsorted(axis.borders_s, came[:, 0], side="right") - 1, 0, WINDOWS - 1)
    groups = {part: came[place == part, 1] / MS for part in np.unique(place).tolist()}
    middles = axis.middles[list(groups)].tolist()
    lines = [
        Line(
            name=f"p{share}",
            x=middles,
            y=[float(np.percentile(one, share)) for one in groups.values()],
            style=style,
        )
        for share, style in ((50, "c0"), (90, "c4"))
    ]
    return axis.panel("TTFT by moment of arrival", "ms", *lines)
