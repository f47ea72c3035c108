"""Predict a served load on one calibrated machine, request by request.

The production scheduler runs on a virtual clock over the very arrivals that the load
generator will send; a step takes what the price door says for this machine. Queueing,
batching and chunking are therefore in the prediction, not in a formula. What the server
and its client add around the engine comes from the calibration too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tongyun.cloud.engine.protocol import StepResult
from tongyun.cloud.engine.simulated import SimulatedExecutor, StepLoad
from tongyun.cloud.latency import LatencyReport, RequestRecord, Slo, summarise
from tongyun.cloud.sched.request import Batch, Request
from tongyun.cloud.sched.scheduler import SchedulerConfig
from tongyun.cloud.simulate import simulate
from tongyun.cost import step_cost
from tongyun.errors import InputError
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision, Sequences, StepShape
from tongyun.specs import Chip
from tongyun.units import Cost

CONTEXT_GRAIN = 8
"""Decoding contexts are priced to the nearest so many tokens, so that a price is used often."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What server and client add around the engine, measured on this machine."""

    request_s: float = 0.0
    """From the due moment at the client to the engine's queue."""
    reply_s: float = 0.0
    """From the end of a step to the client's record of its token."""
    token_s: float = 0.0
    """The engine waits this long for the gateway for each token it streams."""

    @classmethod
    def of(cls, chip: Chip) -> Serving:
        """Figures of the calibration; zero where it has none (a server was never measured)."""
        found = {} if chip.calibration is None else {s.what: s.seconds / s.count for s in chip.calibration.overhead}
        return cls(
            request_s=found.get("request", 0.0),
            reply_s=found.get("reply", 0.0),
            token_s=found.get("streamed_token", 0.0),
        )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What each request is expected to feel, and what steps the engine is expected to run."""

    records: tuple[RequestRecord, ...]
    report: LatencyReport
    steps: int
    busy_s: float


class PricedStep:
    """Seconds of an engine's step on a chip; equal steps are priced once."""

    def __init__(self, config: ModelConfig, chip: Chip, precision: Precision) -> None:
        self.config, self.chip, self.precision = config, chip, precision
        self._known: dict[object, Cost] = {}

    def __call__(self, load: StepLoad) -> Cost:
        one = load.new_tokens == 1
        decoding = int(one.sum())
        mean = float(load.context[one].mean()) if decoding else 0.0
        context = round(mean / CONTEXT_GRAIN) * CONTEXT_GRAIN
        chunks = tuple(zip(load.new_tokens[~one].tolist(), load.context[~one].tolist(), strict=True))
        key = decoding, context, chunks, load.samples
        if key not in self._known:
            self._known[key] = self._price(decoding, context, chunks, load.samples)
        return self._known[key]

    def _price(self, decoding: int, context: int, chunks: tuple[tuple[int, int], ...], samples: int) -> Cost:
        prefill = StepShape.ragged(chunks).prefill if chunks else None
        decode = Sequences(new=1, context=context, count=decoding) if decoding else None
        shape = StepShape(decode=decode, prefill=prefill, sampled=samples)
        return step_cost(self.config, shape, self.chip, precision=self.precision)


class _Served:
    """A simulated executor whose steps also wait for the gateway to send the tokens of the one before."""

    def __init__(self, inner: SimulatedExecutor, token_s: float) -> None:
        self._inner, self._token_s = inner, token_s
        self._sent = 0

    def execute(self, batch: Batch) -> StepResult:
        result = self._inner.execute(batch)
        waited_s, self._sent = self._token_s * self._sent, len(result.tokens)
        return replace(result, duration_s=result.duration_s + waited_s)


def predict(
    requests: Sequence[Request],
    limits: SchedulerConfig,
    price: PricedStep,
    *,
    serving: Serving | None = None,
    slo: Slo | None = None,
) -> Prediction:
    """Play `requests` against the engine on virtual time and sum up what their senders felt."""
    if not requests:
        raise InputError("the load is empty: nothing to predict")
    serving = serving or Serving.of(price.chip)
    executor = _Served(SimulatedExecutor(price, vocabulary=price.config.vocab), serving.token_s)
    queued = [replace(r, arrival_s=r.arrival_s + serving.request_s) for r in requests]
    played = simulate(queued, limits, executor)
    records = tuple(_felt(record, serving) for record in played.records)
    return Prediction(
        records=records,
        report=summarise(records, slo),
        steps=played.stats.steps,
        busy_s=played.stats.busy_s,
    )


def _felt(record: RequestRecord, serving: Serving) -> RequestRecord:
    """A record at the engine as the client sees it: due earlier, told later."""

    def later(moment_s: float | None) -> float | None:
        return None if moment_s is None else moment_s + serving.reply_s

    return replace(
        record,
        arrival_s=record.arrival_s - serving.request_s,
        ended_s=record.ended_s + serving.reply_s,
        first_token_s=later(record.first_token_s),
        last_token_s=later(record.last_token_s),
    )
