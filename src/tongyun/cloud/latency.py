"""What users of an endpoint felt, from one record per request.

The simulated run and the HTTP load generator both write `RequestRecord`s, so a
prediction and a measurement are summed up by the same arithmetic. Knows neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tongyun.cloud.sched.request import Finish


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """One request as its sender saw it; moments are on one clock.

    `arrival_s` is when the request was due. A sender that falls behind its own schedule
    must not move it: the wait is part of the latency. `last_token_s` and `first_token_s`
    are None when no token came.
    """

    id: str
    arrival_s: float
    ended_s: float
    prompt_tokens: int
    output_tokens: int
    first_token_s: float | None = None
    last_token_s: float | None = None
    cached_tokens: int = 0
    finish: Finish | None = None
    error: str | None = None
    model: str | None = None
    priority_class: str | None = None

    @property
    def ok(self) -> bool:
        """Whether it came to its own end with at least one token."""
        return (
            self.error is None
            and self.first_token_s is not None
            and self.finish in {None, Finish.STOP, Finish.LENGTH}
        )

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time between tokens after the first, (last - first) / (n - 1); None for fewer than two."""
        if self.first_token_s is None or self.last_token_s is None or self.output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)

    @property
    def latency_s(self) -> float | None:
        """From arrival to the last token."""
        return None if self.last_token_s is None else self.last_token_s - self.arrival_s


@dataclass(frozen=True, kw_only=True)
class Slo:
    """A service-level objective per request; a limit that is None is not asked for."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    latency_s: float | None = None
    classes: Mapping[str, Slo] = field(default_factory=dict)
    """Limits of classes of service that have their own."""

    def met_by(self, record: RequestRecord) -> bool:
        """Whether a successful request stayed within every limit; one token has no TPOT to miss."""
        own = self.classes.get(record.priority_class or "") if self.classes else None
        if own is not None:
            return own.met_by(record)
        pairs = (
            (self.ttft_s, record.ttft_s),
            (self.tpot_s, record.tpot_s),
            (self.latency_s, record.latency_s),
        )
        return record.ok and all(limit is None or value is None or value <= limit for limit, value in pairs)


@dataclass(frozen=True, kw_only=True)
class Percentiles:
    """A distribution in six numbers, interpolated linearly between samples."""

    mean: float
    p50: float
    p90: float
    p99: float
    p99_9: float
    most: float

    @classmethod
    def of(cls, samples: Iterable[float | None]) -> Percentiles | None:
        """None when there is no sample; samples that are None are left out."""
        values = np.array([sample for sample in samples if sample is not None], dtype=np.float64)
        if not len(values):
            return None
        p50, p90, p99, p99_9, most = np.percentile(values, [50, 90, 99, 99.9, 100]).tolist()
        return cls(mean=float(values.mean()), p50=p50, p90=p90, p99=p99, p99_9=p99_9, most=most)


@dataclass(frozen=True, kw_only=True)
class LatencyReport:
    """Latencies, tokens and rates of the successful requests over the whole run.

    Rates divide by `duration_s`, from the first arrival to the end of the last request,
    failed ones included; goodput counts only what met the objective.
    """

    requests: int
    succeeded: int
    failed: int
    duration_s: float
    ttft_s: Percentiles | None
    tpot_s: Percentiles | None
    latency_s: Percentiles | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    slo: Slo
    met_slo: int
    output_tokens_within_slo: int
    errors: tuple[tuple[str, int], ...]
    """Distinct error messages, the most frequent first."""

    @property
    def requests_per_s(self) -> float:
        return self.succeeded / self.duration_s

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.duration_s

    @property
    def total_tokens_per_s(self) -> float:
        """Prompt and output tokens together."""
        return (self.prompt_tokens + self.output_tokens) / self.duration_s

    @property
    def goodput_requests_per_s(self) -> float:
        return self.met_slo / self.duration_s

    @property
    def goodput_tokens_per_s(self) -> float:
        return self.output_tokens_within_slo / self.duration_s

    @property
    def attainment(self) -> float:
        """Share of all requests, failed ones included, that met the objective."""
        return self.met_slo / self.requests


def summarise(
    records: Sequence[RequestRecord], slo: Slo | None = None, *, duration_s: float | None = None
) -> LatencyReport:
    """Sum up a run, or with the run's `duration_s` a part of it; ValueError without records or time."""
    if not records:
        raise ValueError("no requests to sum up")
    if duration_s is None:
        duration_s = max(r.ended_s for r in records) - min(r.arrival_s for r in records)
    if duration_s <= 0:
        raise ValueError("the records span no time")
    objective = slo or Slo()
    good = [record for record in records if record.ok]
    within = [record for record in good if objective.met_by(record)]
    return LatencyReport(
        requests=len(records),
        succeeded=len(good),
        failed=len(records) - len(good),
        duration_s=duration_s,
        ttft_s=Percentiles.of(record.ttft_s for record in good),
        tpot_s=Percentiles.of(record.tpot_s for record in good),
        latency_s=Percentiles.of(record.latency_s for record in good),
        prompt_tokens=sum(record.prompt_tokens for record in good),
        cached_tokens=sum(record.cached_tokens for record in good),
        output_tokens=sum(record.output_tokens for record in good),
        slo=objective,
        met_slo=len(within),
        output_tokens_within_slo=sum(record.output_tokens for record in within),
        errors=_count_errors(records),
    )


@dataclass(frozen=True, kw_only=True)
class Group:
    """The requests of one model or class, over the whole run's time, so that rates of all add up."""

    report: LatencyReport
    share: float
    """Of the tokens computed for successful requests: prompts without what was cached, and output.
    Energy and money of chips that all groups use are told by it; it adds up to one."""


def grouped(
    records: Sequence[RequestRecord],
    label: Callable[[RequestRecord], str | None],
    slo: Slo | None = None,
) -> dict[str, Group]:
    """A group for each label, with an empty name for requests without one; nothing where none has one.

    ValueError where `summarise` raises it.
    """
    parts: dict[str, list[RequestRecord]] = {}
    for record in records:
        parts.setdefault(label(record) or "", []).append(record)
    if not any(parts):
        return {}
    duration_s = summarise(records).duration_s
    reports = {name: summarise(parts[name], slo, duration_s=duration_s) for name in sorted(parts)}
    whole = sum(_computed_tokens(report) for report in reports.values()) or 1
    return {
        name: Group(report=report, share=_computed_tokens(report) / whole) for name, report in reports.items()
    }


def _computed_tokens(report: LatencyReport) -> int:
    return report.prompt_tokens - report.cached_tokens + report.output_tokens


def _count_errors(records: Sequence[RequestRecord]) -> tuple[tuple[str, int], ...]:
    counts: dict[str, int] = {}
    for record in records:
        if not record.ok:
            reason = record.error or (record.finish or "no token came")
            counts[str(reason)] = counts.get(str(reason), 0) + 1
    return tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
