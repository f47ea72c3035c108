"""Predictions beside published measurements.

Each row states the deployment that was published; the same search and prices that answer
`tongyun plan` predict it. No figure of a chip or of the price model was chosen by looking
at these rows. What a row leaves open (schedules, kernels, the type of the KV cache, how long a
run was) stays open: KV is taken as bf16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tongyun.codesign.space import Question, grid
from tongyun.codesign.steady import USABLE_MEMORY, memory_bytes, steady
from tongyun.cost import step_cost
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision, StepShape
from tongyun.model.shard import Shard
from tongyun.specs import Chip, Corner, find_chip, find_model
from tongyun.units import Source

INFERSIM = "alibaba/InferSim @f2293da README, measured with SGLang"
TRTLLM = "NVIDIA/TensorRT-LLM @03e27c7 docs/source/developer-guide/perf-overview.md"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A measured rate in tokens per second per chip, and the deployment it was measured on."""

    model: str
    chip: str
    dtype: str
    shard: Shard
    isl: int
    osl: int
    phase: str
    """`prefill` and `decode`: that phase alone, tokens of it; `serving`: most output tokens, offline."""
    batch: int | None
    """Sequences on each chip, where the source says."""
    tok_s_per_chip: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A published row with what is predicted for it, nominal and over the chip's ranges."""

    row: Published
    predicted: float
    low: float
    high: float
    sources: frozenset[Source]

    @property
    def ratio(self) -> float:
        """Predicted over published."""
        return self.predicted / self.row.tok_s_per_chip


def published() -> tuple[Published, ...]:
    """Every row, InferSim's and TensorRT-LLM's."""
    return tuple(
        Published(
            model=model,
            chip=chip,
            dtype=dtype,
            shard=shard,
            isl=isl,
            osl=osl,
            phase=phase,
            batch=batch,
            tok_s_per_chip=rate,
            source=source,
        )
        for model, chip, dtype, shard, rows, source in _TABLE
        for isl, osl, phase, batch, rate in rows
    )


Row = tuple[int, int, str, int | None, float]
_QWEN3, _R1 = "Qwen/Qwen3-235B-A22B", "deepseek-ai/DeepSeek-R1"
_LLAMA, _OSS = "meta-llama/Llama-3.3-70B-Instruct", "openai/gpt-oss-"
_ONE, _TP2, _DEP4, _DEP8 = Shard(), Shard(tp=2), Shard(ep=4, dp=4), Shard(ep=8, dp=8)
"""DEPn, as the source calls it: experts and attention groups over n chips."""


def _phases(prefill: float, decode: float, batch: int) -> tuple[Row, ...]:
    return ((4096, 2048, "prefill", None, prefill), (4096, 2048, "decode", batch, decode))


def _most(rates: dict[tuple[int, int], float]) -> tuple[Row, ...]:
    return tuple((isl, osl, "serving", None, rate) for (isl, osl), rate in rates.items())


_EVEN, _LONG_OUT, _LONG_IN = (1024, 1024), (1024, 8192), (8192, 1024)
_TABLE: tuple[tuple[str, str, str, Shard, tuple[Row, ...], str], ...] = (
    ("Qwen/Qwen3-30B-A3B", "h20", "bf16", _DEP4, _phases(16594, 2749, 100), INFERSIM),
    ("Qwen/Qwen3-8B", "h20", "fp8", _ONE, _phases(15061, 2682, 64), INFERSIM),
    (_QWEN3, "h200", "fp8", _DEP4, _most({_EVEN: 3268, _LONG_OUT: 1417, _LONG_IN: 627}), TRTLLM),
    (_QWEN3, "h100", "fp8", _DEP8, _most({_EVEN: 1935, _LONG_OUT: 873}), TRTLLM),
    (_LLAMA, "h200", "fp8", _TP2, _most({_EVEN: 2582, _LONG_OUT: 2009, _LONG_IN: 537}), TRTLLM),
    (_LLAMA, "h100", "fp8", _TP2, _most({(1000, 1000): 2209, _LONG_IN: 398}), TRTLLM),
    (_R1, "h200", "fp8", _DEP8, _most({_EVEN: 1620, _LONG_OUT: 1218}), TRTLLM),
    (f"{_OSS}120b", "h200", "mxfp4", _ONE, _most({_EVEN: 6798, _LONG_OUT: 3543, _LONG_IN: 1828}), TRTLLM),
    (f"{_OSS}120b", "h100", "mxfp4", _DEP4, _most({_EVEN: 4715, _LONG_IN: 1169}), TRTLLM),
    (f"{_OSS}20b", "h200", "mxfp4", _ONE, _most({_EVEN: 13890, _LONG_OUT: 12743, _LONG_IN: 4015}), TRTLLM),
    (f"{_OSS}20b", "h100", "mxfp4", _ONE, _most({_EVEN: 11403, _LONG_OUT: 8617, _LONG_IN: 3366}), TRTLLM),
)  # fmt: skip


def published_rows() -> list[Comparison]:
    """Every published row with its prediction."""
    return [compare(row) for row in published()]


def compare(row: Published) -> Comparison:
    """Predict one row at every corner of the chip's ranges."""
    raw, name = find_model(row.model)
    spec = find_chip(row.chip)
    question = Question(
        model=ModelConfig.from_hf(raw, name=name),
        chip=spec,
        chips=row.shard.ranks,
        isl=row.isl,
        osl=row.osl,
        precision=Precision.of(row.dtype),
    )
    predict = {"prefill": _prefill, "decode": _decode, "serving": _serving}[row.phase]
    rates = {corner: predict(row, question, question.at(corner)) for corner in Corner}
    values = [rate for rate, _ in rates.values()]
    return Comparison(
        row=row,
        predicted=rates[Corner.NOMINAL][0],
        low=min(values),
        high=max(values),
        sources=rates[Corner.NOMINAL][1],
    )


Rate = tuple[float, frozenset[Source]]


def _prefill(row: Published, question: Question, chip: Chip) -> Rate:
    """One prompt at a time in every attention group."""
    shape = StepShape.prefilling(row.isl)
    cost = step_cost(question.model, shape, chip, row.shard, question.precision)
    return row.isl / float(cost.seconds) / row.shard.tp, cost.sources


def _decode(row: Published, question: Question, chip: Chip) -> Rate:
    """The given batch half-way through its output."""
    batch = (row.batch or 1) * row.shard.tp
    shape = StepShape.decoding(batch, row.isl + row.osl / 2)
    cost = step_cost(question.model, shape, chip, row.shard, question.precision)
    return batch / float(cost.seconds) / row.shard.tp, cost.sources


def _serving(row: Published, question: Question, chip: Chip) -> Rate:
    """The best steady state within memory, whatever its latencies."""
    batch, budget = grid()
    state = steady(question, chip, row.shard, batch, budget)
    fits = memory_bytes(question, row.shard, batch, budget) <= USABLE_MEMORY * chip.memory_bytes
    rates = np.where(fits & (state.prefill_use < 1), state.tokens_per_s, 0.0)
    return float(rates.max()) / row.shard.ranks, state.sources
