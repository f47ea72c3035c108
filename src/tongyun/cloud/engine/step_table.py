"""Price an engine's steps on a chip, quickly enough to be asked millions of times.

Prices come from the price door and from nowhere else; this module only remembers them.
Where every operator's price depends on that operator alone, a step is looked up as the sum
of four parts: what its tokens take, its rows of the head, its decoding attention and its
prompts' attention. On a calibrated machine the whole step decides (its footprint says
which memory serves it), and steps are remembered whole. Either way a step costs what
`step_cost` says, with contexts taken to the nearest `GRAIN` or `CHUNK_GRAIN`. With drafts every
decoding request is priced with all of its positions, as an engine runs it that has captured one
shape of step, and what drafts the next ones is added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tongyun.chip.calibrated import measured
from tongyun.chip.kernels import kernels
from tongyun.chip.roofline import steps_s
from tongyun.cloud.engine.simulated import StepLoad
from tongyun.cost import ranks_cost, sources_of, step_cost
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Kind, Operator, Precision, Sequences, StepShape
from tongyun.model.layers import Layers
from tongyun.model.shard import Shard, slice_of
from tongyun.model.steps import WHOLE, drafting, step
from tongyun.specs import Chip
from tongyun.units import Cost, Number, Source

Array = NDArray[np.float64]

GRAIN = 8
"""Decoding contexts are priced to the nearest so many tokens, so that a price is used often."""
CHUNK_GRAIN = 64
"""What is cached before a chunk of a prompt, on chips whose steps are sums of parts."""
CHUNK_SIZES = 32
"""Chunks of so many sizes are priced at once."""
HEAD = ("head", "logits_gather", "sample")
"""Operators that work on sampled rows."""
Chunks = tuple[tuple[int, int], ...]
N = TypeVar("N", float, Array)


class StepTable:
    """Seconds and joules of one replica's steps; a `DecodeCosts`.

    One group of ranks without pipeline stages. `max_step_tokens` and `max_context_tokens`
    (default: the model's positions) are the engine's limits; longer steps are priced whole.
    """

    def __init__(
        self,
        config: ModelConfig,
        chip: Chip,
        precision: Precision,
        shard: Shard = WHOLE,
        *,
        max_step_tokens: int = 8192,
        max_context_tokens: int | None = None,
        draft_tokens: int = 0,
    ) -> None:
        if shard.pp > 1:
            raise ValueError("a table prices steps of one pipeline stage")
        self._config, self._chip, self._precision, self._shard = config, chip, precision, shard
        self._most = max_step_tokens
        self._drafts, self._positions = draft_tokens, 1 + draft_tokens
        self._part = slice_of(config, shard)
        # MLA multiplies other matrices when it decodes than in a prompt: not a sum of parts.
        self._apart = measured(chip) is None and config.latent is None
        self._is_modelled = kernels(chip) is not None and not chip.is_lowered
        self._longest = longest = min(config.max_positions, max_context_tokens or config.max_positions)
        self._contexts = np.arange(0, longest + GRAIN, GRAIN, dtype=np.float64)
        self._rows: dict[int, Array] = {}
        self._attention: dict[int, Array] = {}
        self._mixed: dict[object, tuple[float, float]] = {}
        self._chunks: dict[int, Array] = {}
        self._tokens: Array | None = None
        self._heads: Array | None = None
        self._cached = np.arange(0, longest + CHUNK_GRAIN, CHUNK_GRAIN, dtype=np.float64)
        alone = self._decoding(1, 1.0)
        self.sources = sources_of(self._operators(alone) + self._module(alone), chip)
        if draft_tokens and not config.mtp_layers:
            # The module is that of another model.
            self.sources |= {Source.ASSUMED}

    def crowded(self, picks: tuple[float, ...], chip: Chip) -> StepTable:
        """The same with other picks of the busiest rank's experts, and perhaps other links.

        Attention, which neither of them touches, is priced once for both.
        """
        other = StepTable(
            self._config,
            chip,
            self._precision,
            replace(self._shard, expert_picks=picks),
            max_step_tokens=self._most,
            max_context_tokens=self._longest,
            draft_tokens=self._drafts,
        )
        other._attention, other._chunks = self._attention, self._chunks
        return other

    def __call__(self, load: StepLoad) -> Cost:
        """The cost of one batch."""
        if self._drafts:
            return self._verified(load)
        one = load.new_tokens == 1
        chunks = zip(load.new_tokens[~one].tolist(), load.context[~one].tolist(), strict=True)
        context_tokens = int(load.context[one].sum())
        seconds, joules = self.mixed(int(one.sum()), context_tokens, tuple(chunks), load.samples)
        return Cost(seconds=seconds, joules=joules, sources=self.sources)

    def _verified(self, load: StepLoad) -> Cost:
        """The cost of a batch whose first pieces verify drafts; whatever else it has are prompts."""
        count = load.verifying
        rest = zip(load.new_tokens[count:].tolist(), load.context[count:].tolist(), strict=True)
        context_tokens = int(load.context[:count].sum())
        seconds, joules = self.mixed(count, context_tokens, tuple(rest), load.samples)
        return Cost(seconds=seconds, joules=joules, sources=self.sources)

    def mixed(
        self, decoding: int, context_tokens: int, chunks: Sequence[tuple[int, int]], samples: int
    ) -> tuple[float, float]:
        """Seconds and joules of a step: chunks of prompts (new tokens, cached before) beside decoding."""
        single = [] if self._drafts else [cached for new, cached in chunks if new == 1]
        if single:
            # A prompt's last token by itself is computed as a decoding one is, where that has no more.
            decoding += len(single)
            context_tokens += sum(single)
            chunks = [chunk for chunk in chunks if chunk[0] != 1]
        place = round(context_tokens / decoding / GRAIN) if decoding else 0
        if not chunks and samples == decoding:
            seconds, joules = self._row(decoding)[:, place].tolist()
            return seconds, joules
        key = decoding, place, tuple(chunks), samples + decoding * self._drafts
        if key not in self._mixed:
            self._mixed[key] = self._mix(*key)
        return self._mixed[key]

    def decode(self, sequences: int, context_tokens: NDArray[np.int64]) -> Array:
        """Seconds and joules, [2, steps], of steps in which so many decode behind these tokens in all."""
        return self._row(sequences).take(self._place(sequences, context_tokens), axis=1)

    @property
    def shortest_s(self) -> float:
        """Seconds of a step in which one request decodes its first token."""
        return float(self.decode(1, np.array([1]))[0, 0])

    def _place(self, sequences: int, context_tokens: NDArray[np.int64]) -> NDArray[np.intp]:
        return np.rint(context_tokens / sequences / GRAIN).astype(np.intp)

    def _row(self, sequences: int) -> Array:
        """Seconds and joules of decoding steps behind each of the contexts, [2, contexts]."""
        if sequences not in self._rows:
            tokens = sequences * self._positions
            if self._apart:
                rest = self._of_tokens()[:, tokens] + self._of_heads()[:, tokens]
                row = self._costs(rest[:, None] + self._attending(sequences))
            else:
                row = self._whole(self._decoding(sequences, self._contexts))
            if self._drafts:
                row = row + self._of_drafts(self._decoding(sequences, self._contexts))
            self._rows[sequences] = row
        return self._rows[sequences]

    def _mix(self, decoding: int, place: int, chunks: Chunks, samples: int) -> tuple[float, float]:
        seconds, joules = self._mix_alone(decoding, place, chunks, samples)
        if self._drafts:
            shape = self._shape(decoding, place, chunks, samples)
            drafting_s, drafting_j = self._of_drafts(shape).tolist()
            return seconds + drafting_s, joules + drafting_j
        return seconds, joules

    def _shape(self, decoding: int, place: int, chunks: Chunks, samples: int) -> StepShape:
        decode = self._decoding(decoding, self._contexts[place]).decode if decoding else None
        prefill = _prompts(chunks) if chunks else None
        return StepShape(decode=decode, prefill=prefill, sampled=samples)

    def _mix_alone(self, decoding: int, place: int, chunks: Chunks, samples: int) -> tuple[float, float]:
        """What a step takes without what drafts the next tokens."""
        tokens = decoding * self._positions + sum(new for new, _ in chunks)
        if not self._apart or tokens > self._most:
            cost = self._whole(self._shape(decoding, place, chunks, samples))
            return float(cost[0]), float(cost[1])
        seconds, busy_s = self._of_chunks(chunks)
        tables = [(self._of_tokens(), tokens), (self._of_heads(), samples)]
        if decoding:
            tables.append((self._attending(decoding), place))
        for table, at in tables:
            seconds += table.item(0, at)
            busy_s += table.item(1, at)
        return self._cost(seconds, busy_s)

    def _attending(self, sequences: int) -> Array:
        """Timings of decoding attention behind each of the contexts, [2, contexts]."""
        if sequences not in self._attention:
            self._attention[sequences] = self._attention_of(self._decoding(sequences, self._contexts))
        return self._attention[sequences]

    def _of_tokens(self) -> Array:
        """Timings of all but attention and head, by the step's tokens, [2, tokens]."""
        if self._tokens is None:
            tokens = np.maximum(np.arange(self._most + 1, dtype=np.float64), 1.0)
            operators = self._operators(StepShape.prefilling(tokens))
            self._tokens = self._timed(
                op for op in operators if op.kind is not Kind.ATTENTION and op.name not in HEAD
            )
        return self._tokens

    def _of_heads(self) -> Array:
        """Timings of head and sampling, by sampled rows, [2, rows]."""
        if self._heads is None:
            rows = np.arange(self._most + 1, dtype=np.float64)
            operators = self._operators(StepShape.decoding(rows, 1.0))
            self._heads = self._timed(op for op in operators if op.name in HEAD)
        return self._heads

    def _of_chunks(self, chunks: Chunks) -> tuple[float, float]:
        """Timing of the prompts' attention; several share a call, which only they together tell."""
        if len(chunks) == 1:
            return self._of_chunk(*chunks[0])
        if not chunks:
            return 0.0, 0.0
        # Kernel models even them out in any case: here it takes no arrays.
        prompts = _evened(chunks) if self._is_modelled else _prompts(chunks)
        shape = StepShape(prefill=prompts, sampled=len(chunks))
        timing = steps_s(self._attending_to(shape), self._chip)
        return float(timing.seconds), float(timing.busy_s)

    def _of_chunk(self, new: int, cached: int) -> tuple[float, float]:
        """Timing of one chunk's attention, from a table for chunks of about this size."""
        row, size = divmod(new, CHUNK_SIZES)
        if row not in self._chunks:
            sizes = np.arange(CHUNK_SIZES, dtype=np.float64) + row * CHUNK_SIZES
            # No chunk has no tokens.
            shape = StepShape.prefilling(np.maximum(sizes, 1.0)[:, None], self._cached)
            self._chunks[row] = self._attention_of(shape)
        table, place = self._chunks[row], round(cached / CHUNK_GRAIN)
        return table.item(0, size, place), table.item(1, size, place)

    def _attention_of(self, shape: StepShape) -> Array:
        return self._timed(self._attending_to(shape))

    def _attending_to(self, shape: StepShape) -> list[Operator]:
        layers = Layers(config=self._config, part=self._part, shape=shape, precision=self._precision)
        return [op for op in layers.attending() if op.kind is Kind.ATTENTION]

    def _decoding(self, sequences: int, context: Number) -> StepShape:
        """So many that decode, each with all the positions that a step has for it."""
        group = Sequences(new=self._positions, context=context, count=sequences)
        return StepShape(decode=group, sampled=sequences * self._positions)

    def _of_drafts(self, shape: StepShape) -> Array:
        """Seconds and joules that drafting adds to a step, [2] or [2, contexts]."""
        cost = ranks_cost(self._module(shape), self._chip, self._shard.stage_ranks)
        return np.stack(np.broadcast_arrays(cost.seconds, cost.joules)).astype(np.float64)

    def _module(self, shape: StepShape) -> tuple[Operator, ...]:
        return drafting(self._config, shape, self._shard, self._precision, self._drafts)

    def _operators(self, shape: StepShape) -> tuple[Operator, ...]:
        return step(self._config, shape, self._shard, self._precision)

    def _timed(self, operators: Iterable[Operator]) -> Array:
        """Seconds and busy seconds of operators, [2] or [2, …] where shapes are arrays."""
        timing = steps_s(operators, self._chip)
        return np.stack(np.broadcast_arrays(timing.seconds, timing.busy_s)).astype(np.float64)

    def _costs(self, timings: Array) -> Array:
        """Seconds and joules of whole steps; see `step_cost`."""
        return np.stack(self._cost(timings[0], timings[1]))

    def _cost(self, timed_s: N, busy_s: N) -> tuple[N, N]:
        chip = self._chip
        seconds = timed_s + chip.step_host_s
        watts_busy = chip.tdp_w - chip.idle_w
        return seconds, self._shard.stage_ranks * (chip.idle_w * seconds + watts_busy * busy_s)

    def _whole(self, shape: StepShape) -> Array:
        cost = step_cost(self._config, shape, self._chip, self._shard, self._precision)
        return np.stack(np.broadcast_arrays(cost.seconds, cost.joules)).astype(np.float64)


def _prompts(chunks: Chunks) -> Sequences:
    """Chunks of prompts, those of one token too, which only here are none that decode."""
    new, cached = np.array(chunks, dtype=np.float64).T
    return Sequences(new=new, context=cached, ragged=True)


def _evened(chunks: Chunks) -> Sequences:
    """The same as so many equal chunks; see `tongyun.chip.kernels.even`."""
    tokens = float(sum(new for new, _ in chunks))
    length = sum(new * new for new, _ in chunks) / tokens
    context = sum(new * cached for new, cached in chunks) / tokens
    return Sequences(new=length, context=context, count=tokens / length)
