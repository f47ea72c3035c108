"""Predict a served load on one calibrated machine, request by request.

The production scheduler runs on a virtual clock over the very arrivals that the load
generator will send; a step takes what the price door says for this machine. Queueing,
batching and chunking are therefore in the prediction, not in a formula. What the server
and its client add around the engine comes from the calibration too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tongyun.chip.calibrated import engine_precision
from tongyun.cloud.engine.protocol import StepResult
from tongyun.cloud.engine.simulated import LeapingExecutor
from tongyun.cloud.engine.step_table import StepTable
from tongyun.cloud.latency import LatencyReport, RequestRecord, Slo, summarise
from tongyun.cloud.sched.request import Batch
from tongyun.cloud.sched.scheduler import SchedulerConfig
from tongyun.cloud.simulate import simulate
from tongyun.cloud.workload import Arrival, requests
from tongyun.errors import InputError
from tongyun.model.config import ModelConfig
from tongyun.specs import Chip
from tongyun.specs.samples import ServedSample

CAPACITY_ROUNDS = 8
"""Requests for each place in the batch, when capacity is looked for."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What server and client add around the engine, measured on this machine."""

    samples: tuple[ServedSample, ...] = ()
    """By the tokens that are being streamed; straight in between."""
    prompt_token_s: float = 0.0
    """What each prompt token adds to a request's way."""
    coming_s: float = 0.0
    """What each request that comes in adds to a step."""

    def way_s(self, prompt_tokens: int, streams: int = 0) -> float:
        """From the due moment at the client to the engine's queue, and back with the first token.

        `streams` are the tokens of the step that gives it: they leave one after the other.
        """
        return self._at(streams, [s.way_s for s in self.samples]) + self.prompt_token_s * prompt_tokens

    def step_s(self, streams: int) -> float:
        """How much longer than its price a step takes while the tokens of so many sequences are sent; in
        proportion beyond what was measured."""
        beyond = max(1.0, streams / self.samples[-1].streams) if self.samples else 1.0
        return beyond * self._at(streams, [s.step_s for s in self.samples])

    def _at(self, streams: int, seconds: Sequence[float]) -> float:
        known = [s.streams for s in self.samples]
        return float(np.interp(streams, known, seconds)) if known else 0.0

    @classmethod
    def of(cls, chip: Chip) -> Serving:
        """Figures of the calibration; zero where it has none (a server was never measured)."""
        if chip.calibration is None:
            return cls()
        found = {s.what: s.seconds / s.count for s in chip.calibration.overhead}
        return cls(
            samples=tuple(sorted(chip.calibration.served, key=lambda s: s.streams)),
            prompt_token_s=found.get("prompt_token", 0.0),
            coming_s=found.get("coming_request", 0.0),
        )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What each request is expected to feel, and what steps the engine is expected to run."""

    records: tuple[RequestRecord, ...]
    report: LatencyReport
    steps: int
    busy_s: float


class _Served:
    """A simulated executor whose steps share the cores with the gateway and its client.

    They send the tokens of the step before, and take in the requests that begin.
    """

    def __init__(self, inner: LeapingExecutor, serving: Serving) -> None:
        self._inner, self._serving = inner, serving
        self._sent = 0
        self.streams: dict[str, int] = {}
        """By request, the tokens of the step that gave its first."""

    def execute(self, batch: Batch) -> StepResult:
        result = self._inner.execute(batch)
        for piece in batch.pieces:
            if piece.samples:
                self.streams.setdefault(piece.request.id, len(result.tokens))
        coming = sum(piece.start == piece.cached_tokens for piece in batch.pieces)
        waited_s = self._waited_s(self._sent, coming)
        self._sent = len(result.tokens)
        return replace(result, duration_s=result.duration_s + waited_s)

    def _waited_s(self, sent: int, coming: int) -> float:
        return self._serving.step_s(sent) + self._serving.coming_s * coming


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """One model served on one calibrated machine, under the limits its engine will have."""

    config: ModelConfig
    chip: Chip
    limits: SchedulerConfig

    def predict(
        self, arrivals: Sequence[Arrival], *, seed: int = 0, slo: Slo | None = None, users: int | None = None
    ) -> Prediction:
        """Play `arrivals`, with the tokens the load generator makes of them, on virtual time.

        With `users` the moments do not count: so many requests are always in flight.
        """
        if not arrivals:
            raise InputError("the load is empty: nothing to predict")
        serving, config = Serving.of(self.chip), self.config
        executor = _Served(LeapingExecutor(self._price(), vocabulary=config.vocab), serving)
        load = requests(arrivals, vocabulary=config.vocab, seed=seed)
        queued = [replace(r, arrival_s=r.arrival_s + serving.way_s(len(r.prompt))) for r in load]
        # A longer prompt may take longer to come in than the gap to a shorter one behind it.
        queued.sort(key=lambda request: request.arrival_s)
        played = simulate(queued, self.limits, executor, users=users)
        records = tuple(_felt(r, serving, executor.streams.get(r.id, 0)) for r in played.records)
        return Prediction(
            records=records,
            report=summarise(records, slo),
            steps=played.stats.steps,
            busy_s=played.stats.busy_s,
        )

    def capacity_per_s(self, isl: int, osl: int) -> float:
        """Requests of `isl` and `osl` tokens a second that the engine ends when it is never idle.

        Counted between the first and the last quarter of the ends, so that neither filling
        nor draining is in it.
        """
        users = self.limits.max_sequences
        played = self.predict([Arrival(0.0, isl, osl)] * (CAPACITY_ROUNDS * users), users=users)
        ends = sorted(record.ended_s for record in played.records if record.ok)
        if len(ends) < CAPACITY_ROUNDS:
            raise InputError(f"requests of {isl} + {osl} tokens do not fit this deployment")
        first, last = len(ends) // 4, 3 * len(ends) // 4
        return (last - first) / (ends[last] - ends[first])

    def _price(self) -> StepTable:
        calibration = self.chip.calibration
        if calibration is None:
            raise InputError(f"{self.chip.name}: not calibrated; a served load is predicted on `local` only")
        return StepTable(self.config, self.chip, engine_precision(calibration))


def _felt(record: RequestRecord, serving: Serving, streams: int) -> RequestRecord:
    """A record at the engine as its sender counts: from the moment it was due.

    Its first token left with those of other streams, and its last about as late as that.
    """
    return replace(record, arrival_s=record.arrival_s - serving.way_s(record.prompt_tokens, streams))
