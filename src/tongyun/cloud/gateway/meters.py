"""What `/metrics` shows: counters and histograms of requests, gauges of the engine.

Counted per request, never per token: the engine's own counters are read when somebody
looks. One registry a gateway, so that two in one process do not add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from tongyun.cloud.engine.keeper import REASONS
from tongyun.cloud.engine.protocol import PAUSES_S, EngineStats, MoveStats, ReplicaStats
from tongyun.cloud.gateway.exchange import Exchange

_TTFT_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_TPOT_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
_E2E_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


class Meters:
    """The gateway's instruments."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "tongyun_requests", "Requests by how they ended.", ("endpoint", "outcome"), registry=self.registry
        )
        self._ttft = self._seconds("tongyun_ttft_seconds", "Arrival to first token.", _TTFT_S)
        self._tpot = self._seconds(
            "tongyun_tpot_seconds", "Mean time between tokens after the first.", _TPOT_S
        )
        self._e2e = self._seconds("tongyun_e2e_seconds", "Arrival to last token.", _E2E_S)

    def _seconds(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def watch(self, stats: Callable[[], EngineStats]) -> None:
        """Show the engine's gauges and counters from now on."""
        self.registry.register(_EngineCollector(stats))

    def refused(self, endpoint: str) -> None:
        """A request that never reached the engine."""
        self._requests.labels(endpoint, "refused").inc()

    def closed(self, exchange: Exchange) -> None:
        """A request is over; its latencies count only where it ran to its end."""
        self._requests.labels(exchange.ask.kind, _outcome(exchange)).inc()
        if exchange.open:
            return
        for choice in exchange.choices:
            self._ttft.observe(choice.first_s - exchange.arrived_s)
            if choice.tokens > 1:
                self._tpot.observe((choice.last_s - choice.first_s) / (choice.tokens - 1))
        self._e2e.observe(max(choice.last_s for choice in exchange.choices) - exchange.arrived_s)

    def page(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)


def _outcome(exchange: Exchange) -> str:
    if exchange.fault is not None:
        return "error"
    if exchange.open:
        return "disconnected"
    return "length" if any(choice.finish == "length" for choice in exchange.choices) else "stop"


class _EngineCollector:
    """Reads the engine's state when Prometheus asks for it."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        now = self._stats()
        gauges = (
            ("running", "Sequences in the running batch.", now.running),
            ("waiting", "Sequences in the queue.", now.waiting),
            ("kv_blocks", "KV blocks there are.", now.kv_blocks_total),
            ("kv_blocks_used", "KV blocks that a sequence holds.", now.kv_blocks_used),
            ("kv_blocks_cached", "Free KV blocks whose contents may be reused.", now.kv_blocks_cached),
            ("kv_usage_ratio", "Held KV blocks of all.", now.kv_blocks_used / max(1, now.kv_blocks_total)),
        )
        counters = (
            ("prompt_tokens", "Prompt tokens admitted, cached ones included.", now.prompt_tokens),
            ("prefix_hit_tokens", "Prompt tokens found in the prefix cache.", now.prefix_hit_tokens),
            ("computed_tokens", "Tokens the model ran.", now.computed_tokens),
            ("output_tokens", "Tokens produced.", now.output_tokens),
            ("preemptions", "Sequences evicted to make room.", now.preemptions),
            ("engine_steps", "Steps.", now.steps),
            ("engine_busy_seconds", "Seconds inside steps.", now.busy_s),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"tongyun_{name}", text, value=float(value))
        text = "of the steps on the simulated chip; simulated, not measured."
        simulated = (
            ("simulated_chip_seconds", f"Seconds {text}", now.chip_s),
            ("simulated_chip_joules", f"Joules {text}", now.chip_joules),
        )
        for name, text, value in (*counters, *(simulated if now.chip_s else ())):
            yield CounterMetricFamily(f"tongyun_{name}", text, value=float(value))
        if now.moves is not None:
            yield from _moves(now.moves)
        if now.replicas:
            yield from _replicas(now.replicas)


def _moves(now: MoveStats) -> Iterable[Metric]:
    """Of engines whose running requests move."""
    counted = CounterMetricFamily(
        "tongyun_moves", "Moves of requests between engines, by what became of them.", labels=("outcome",)
    )
    for outcome, count in now.outcomes.items():
        counted.add_metric((outcome,), count)
    yield counted
    yield CounterMetricFamily("tongyun_moved_bytes", "Keys and values copied by moves.", value=now.nbytes)
    bounds = [*(f"{bound:g}" for bound in PAUSES_S), "+Inf"]
    yield HistogramMetricFamily(
        "tongyun_move_downtime_seconds",
        "Pause of a request that was moved while it decoded.",
        buckets=list(zip(bounds, now.downtimes, strict=True)),
        sum_value=now.downtime_s,
    )


def _replicas(now: Sequence[ReplicaStats]) -> Iterable[Metric]:
    """Of several engines, each by its number."""
    up = GaugeMetricFamily("tongyun_replica_up", "Whether the replica takes requests.", labels=("replica",))
    restarts = CounterMetricFamily(
        "tongyun_replica_restarts",
        "Times the replica was started again, by why.",
        labels=("replica", "reason"),
    )
    for index, one in enumerate(now):
        up.add_metric((str(index),), float(one.up))
        for reason in REASONS:
            restarts.add_metric((str(index), reason), one.restarts.get(reason, 0))
    yield up
    yield restarts
