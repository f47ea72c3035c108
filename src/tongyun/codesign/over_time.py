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
    """Parts of the run that a curve has a point for, and the unit they are drawn in."""

    width_s: float
    end_s: float
    scale: float
    unit: str

    @classmethod
    def of(cls, taken: Recording) -> Axis:
        end_s = max(one.ended_s for one in taken.records)
        series = taken.series[0]
        scale, unit = (1.0, "s") if end_s <= 600 else (60.0, "min") if end_s <= 4 * 3600 else (3600.0, "h")
        each = -(-len(series.running) // POINTS)
        return cls(width_s=each * series.width_s, end_s=end_s, scale=scale, unit=unit)

    @property
    def borders_s(self) -> Array:
        parts = max(1, int(np.ceil(self.end_s / self.width_s)))
        return np.asarray(np.minimum(np.arange(parts + 1) * self.width_s, self.end_s))

    def line(self, name: str, values: Array, style: str, *, filled: bool = False) -> Line:
        borders_s = self.borders_s
        middles = (borders_s[1:] + borders_s[:-1]) / 2 / self.scale
        return Line(name=name, x=middles.tolist(), y=values.tolist(), style=style, filled=filled)

    def means(self, values: Array, series: Series) -> Array:
        """Of the recorded parts, several at a time; the last of them may be cut short."""
        spans_s = np.full(len(values), series.width_s)
        spans_s[-1] = max(self.end_s - (len(values) - 1) * series.width_s, 1e-12)
        starts = np.arange(0, len(values), round(self.width_s / series.width_s))
        return np.asarray(np.add.reduceat(values * spans_s, starts) / np.add.reduceat(spans_s, starts))

    def panel(self, title: str, y: str, *lines: Line) -> str:
        """A drawing of the lines; of several, those that are zero throughout are left out."""
        some = [line for line in lines if max(line.y) > 0] or list(lines[:1])
        keys = [(one.style, one.name) for one in some] if len(lines) > 1 else []
        return figure(title, keys, curves(some, x=self.unit, y=y, span=(0.0, self.end_s / self.scale)))


def over_time(taken: Recording) -> str:
    axis = Axis.of(taken)
    sections = [
        f'<h3>{escape(TITLES[series.role])}</h3><div class="panels">{"".join(_panels(series, axis))}</div>'
        for series in taken.series
    ]
    return (
        f"<h2>Over time</h2><p>Exact means over parts of {quantity(axis.width_s, 's')} of simulated time; "
        f'nothing is sampled.</p><div class="panels">'
        f"{_arrivals(taken.records, axis)}</div>{''.join(sections)}"
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
    def line(name: str, values: Array, style: str, *, filled: bool = False) -> Line:
        return axis.line(name, axis.means(values, series), style, filled=filled)

    def over(values: Array, counts: Array, scale: float = 1.0) -> Array:
        """The ratio of two means, where there is any."""
        top, bottom = axis.means(values, series), axis.means(counts, series)
        return np.asarray(scale * np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0))

    engines = series.engines.max()
    decoding = axis.line("requests", over(series.decode_tokens_per_s, series.steps_per_s), "c3")
    chunk = axis.line("tokens", over(series.prompt_tokens_per_s, series.steps_per_s), "c1")
    step_ms = over(series.busy * engines / MS, series.steps_per_s)
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
        axis.panel("A step", "ms, mean", axis.line("step", step_ms, "c5")),
        axis.panel("Engines", "", line("in a step", series.busy * engines, "c0", filled=True), *up),
    ]


def waits(taken: Recording) -> str:
    """TTFT by when requests arrived: half and nine tenths of each part were faster."""
    good = [(one.arrival_s, one.ttft_s) for one in taken.records if one.ok]
    if not good:
        return ""
    axis = Axis.of(taken)
    borders_s = np.linspace(0.0, axis.end_s, WINDOWS + 1)
    came = np.array(good)
    place = np.clip(np.searchsorted(borders_s, came[:, 0], side="right") - 1, 0, WINDOWS - 1)
    groups = {part: came[place == part, 1] / MS for part in np.unique(place).tolist()}
    middles = [(part + 0.5) * axis.end_s / WINDOWS / axis.scale for part in groups]
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
