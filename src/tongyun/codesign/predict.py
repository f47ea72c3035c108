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
from numpy.typing import NDArray

from tongyun.chip.calibrated import engine_precision
from tongyun.cloud.engine.protocol import StepResult
from tongyun.cloud.engine.simulated import LeapingExecutor
from tongyun.cloud.engine.step_table import StepTable
from tongyun.cloud.latency import LatencyReport, RequestRecord, Slo, summarise
from tongyun.cloud.sched.request import Batch, Request
from tongyun.cloud.sched.scheduler import SchedulerConfig
from tongyun.cloud.simulate import simulate
from tongyun.cloud.workload import Arrival, requests
from tongyun.errors import InputError
from tongyun.model.config import ModelConfig
from tongyun.specs import Chip

CAPACITY_ROUNDS = 8
"""Requests for each place in the batch, when capacity is looked for."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What server and client add around the engine, measured on this machine."""

    request_s: float = 0.0
    """From the due moment at the client to the engine's queue, and back with the first token."""
    prompt_token_s: float = 0.0
    """What each prompt token adds to that."""
    step_s: float = 0.0
    """A step that is served takes so much longer than one that is not."""
    token_s: float = 0.0
    """And so much for each token that is being streamed meanwhile."""
    coming_s: float = 0.0
    """And so much for each request that comes in."""

    def way_s(self, prompt_tokens: int) -> float:
        """All that a request's first token spends outside the engine."""
        return self.request_s + self.prompt_token_s * prompt_tokens

    @classmethod
    def of(cls, chip: Chip) -> Serving:
        """Figures of the calibration; zero where it has none (a server was never measured)."""
        samples = () if chip.calibration is None else chip.calibration.overhead
        found = {s.what: s.seconds / s.count for s in samples}
        return cls(
            request_s=found.get("request", 0.0),
            prompt_token_s=found.get("prompt_token", 0.0),
            step_s=found.get("served_step", 0.0),
            token_s=found.get("streamed_token", 0.0),
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
        self._sent = self._decoding = 0

    def execute(self, batch: Batch) -> StepResult:
        result = self._inner.execute(batch)
        coming = sum(piece.start == piece.cached_tokens for piece in batch.pieces)
        waited_s = self._waited_s(self._sent, coming)
        self._sent = len(result.tokens)
        return replace(result, duration_s=result.duration_s + waited_s)

    def coming_s(self, sequences: int, context_tokens: int, steps: int) -> NDArray[np.float64]:
        self._decoding = sequences
        waited_s = np.full(steps, self._waited_s(sequences, 0))
        waited_s[0] = self._waited_s(self._sent, 0)
        return np.asarray(self._inner.coming_s(sequences, context_tokens, steps) + waited_s)

    def went(self, steps: int) -> None:
        self._sent = self._decoding

    def new_tokens(self, request: Request, known: int, count: int) -> Sequence[int]:
        return self._inner.new_tokens(request, known, count)

    def _waited_s(self, sent: int, coming: int) -> float:
        serving = self._serving
        return serving.step_s + serving.token_s * sent + serving.coming_s * coming


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
        records = tuple(_felt(record, serving) for record in played.records)
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


def _felt(record: RequestRecord, serving: Serving) -> RequestRecord:
    """A record at the engine as its sender counts: from the moment it was due."""
    return replace(record, arrival_s=record.arrival_s - serving.way_s(record.prompt_tokens))
