"""The price door: what a step, a replica or a token costs, with the source of the figure.

Whoever needs seconds, joules or dollars asks here. It knows models, cuts and chips; it
knows no scheduler and no objective.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from tongyun.chip.calibrated import measured, shared
from tongyun.chip.collective import Group
from tongyun.chip.kernels import kernels
from tongyun.chip.rates import PRODUCTS, rate_dtype
from tongyun.chip.roofline import Timing, steps_s
from tongyun.model.config import ModelConfig
from tongyun.model.graph import COLLECTIVES, Operator, Precision, StepShape
from tongyun.model.shard import Shard, slice_of
from tongyun.model.steps import PLAIN, WHOLE, hand_overs, layer_counts, layer_operators, step
from tongyun.specs import Chip
from tongyun.units import HOUR_S, Cost, Number, Source


def step_cost(
    config: ModelConfig,
    shape: StepShape,
    chip: Chip,
    shard: Shard = WHOLE,
    precision: Precision = PLAIN,
    *,
    stage: int = 0,
) -> Cost:
    """Seconds of one step on one pipeline stage, and joules of all ranks of that stage.

    `shape` is the load of one attention group, which for a single chip is the whole batch:
    `StepShape.decoding(batch, context)`, `StepShape.prefilling(tokens)`, or for an engine's
    batch `StepShape.ragged([(new, cached), …])`. Its numbers may be arrays of one shape,
    and then so are seconds and joules. `chip` is a `ChipSpec.at(corner)`.

    seconds = Σ operators max(compute, memory) + launches + collectives, and the host's
    time for a step and its sequences; joules = ranks · (idle · seconds + (TDP − idle) ·
    busy), where busy are the seconds in which compute or memory is at work.
    """
    operators = step(config, shape, shard, precision, stage=stage)
    timing = steps_s(operators, chip)
    seconds = timing.seconds + chip.step_host_s + host_s(chip, shape, operators)
    watts_busy = chip.tdp_w - chip.idle_w
    joules = shard.stage_ranks * (chip.idle_w * seconds + watts_busy * timing.busy_s)
    return Cost(seconds=seconds, joules=joules, sources=sources_of(operators, chip))


def ranks_cost(operators: tuple[Operator, ...], chip: Chip, ranks: int) -> Cost:
    """Seconds of operators that one rank runs within a step, and joules of so many ranks at it."""
    timing = steps_s(operators, chip)
    joules = ranks * (chip.idle_w * timing.seconds + (chip.tdp_w - chip.idle_w) * timing.busy_s)
    return Cost(seconds=timing.seconds, joules=joules, sources=sources_of(operators, chip))


class StepPrices:
    """What one load costs on many cuts of a model: layers are priced once for all pipeline depths.

    Gives what `step_cost` gives. A calibrated machine's layers depend on the whole step
    (its footprint decides which memory serves it) and are priced step by step.
    """

    def __init__(self, config: ModelConfig, shape: StepShape, chip: Chip, precision: Precision) -> None:
        self._config, self._shape, self._chip, self._precision = config, shape, chip, precision
        self._known: dict[Shard, tuple[dict[str, Timing], frozenset[Source]]] = {}
        self._handed: dict[int, tuple[Timing, frozenset[Source]]] = {}

    def at(self, shard: Shard, stage: int) -> Cost:
        """The cost of one step on one stage; see `step_cost`."""
        chip = self._chip
        if kernels(chip) is None:
            return step_cost(self._config, self._shape, chip, shard, self._precision, stage=stage)
        each, sources = self._layers(shard)
        counts = layer_counts(slice_of(self._config, shard, stage))
        seconds: Number = chip.step_host_s
        busy: Number = 0.0
        for kind, timing in each.items():
            if counts[kind]:
                seconds = seconds + counts[kind] * timing.seconds
                busy = busy + counts[kind] * timing.busy_s
        joules = shard.stage_ranks * (chip.idle_w * seconds + (chip.tdp_w - chip.idle_w) * busy)
        return Cost(seconds=seconds, joules=joules, sources=sources)

    def _layers(self, shard: Shard) -> tuple[dict[str, Timing], frozenset[Source]]:
        """Timings of a layer of each kind. Depth matters to the hand-over alone."""
        if shard not in self._known:
            self._known[shard] = self._deeper(shard) if shard.pp > 1 else self._priced(shard)
        return self._known[shard]

    def _priced(self, shard: Shard) -> tuple[dict[str, Timing], frozenset[Source]]:
        found = layer_operators(self._config, self._shape, shard, self._precision)
        timings = {kind: steps_s(ops, self._chip) for kind, ops in found.items()}
        return timings, sources_of(tuple(op for ops in found.values() for op in ops), self._chip)

    def _deeper(self, shard: Shard) -> tuple[dict[str, Timing], frozenset[Source]]:
        each, sources = self._layers(replace(shard, pp=1))
        # A group's activations are whole on each of its ranks; how far they go the replica's size decides.
        if shard.ranks not in self._handed:
            hand_over = hand_overs(self._config, self._shape, shard, self._precision)
            self._handed[shard.ranks] = steps_s(hand_over, self._chip), sources_of(hand_over, self._chip)
        timing, further = self._handed[shard.ranks]
        return {**each, "hand_over": timing}, sources | further


def step_host_s(chip: Chip, operators: Iterable[Operator]) -> float:
    """The host's seconds for a step as such: the chip's own figure is that of one which the host queues."""
    samples = measured(chip)
    if samples is None or not samples.replayed(operators):
        return chip.step_host_s
    return samples.overhead.get("replayed_step", 0.0)


def host_s(chip: Chip, shape: StepShape, operators: Iterable[Operator]) -> Number:
    """Seconds that sequences, their further tokens and waking threads add, and a captured step more (or
    less) than the chip's own figure; zero where not measured."""
    samples = measured(chip)
    if samples is None:
        return 0.0
    each, further, woken = (samples.overhead.get(what, 0.0) for what in ("sequence", "token", "shared_step"))
    operators = tuple(operators)
    return (
        (step_host_s(chip, operators) - chip.step_host_s)
        + each * shape.sequences
        + further * (shape.tokens - shape.sequences)
        + woken * shared(operators)
    )


def sources_of(operators: tuple[Operator, ...], chip: Chip) -> frozenset[Source]:
    """Analytic, and the sources of the chip's figures that these operators rest on."""
    keys = {"memory.bandwidth", "memory.achieved", "overhead", "power"}
    for op in operators:
        if op.kind in PRODUCTS:
            dtype = rate_dtype(chip, op.compute)
            keys |= {f"matmul.peak.{dtype}", f"matmul.achieved.{dtype}"}
        elif op.kind in COLLECTIVES:
            group = Group.of(op.ranks, chip)
            keys |= {"scale_up"} if group.inside > 1 else set()
            keys |= {"scale_out"} if group.nodes > 1 else set()
    modelled = kernels(chip)
    fitted = frozenset() if modelled is None else modelled.sources
    return frozenset({Source.ANALYTIC}) | fitted | _sources(chip, frozenset(keys))


@lru_cache(maxsize=1024)
def _sources(chip: Chip, keys: frozenset[str]) -> frozenset[Source]:
    return chip.sources_of(*sorted(keys))


def usd_per_mtoken(tokens_per_s: Number, chips: float, usd_per_chip_hour: float) -> Number:
    """Dollars per million tokens: chips · $/h / (tokens/s · 3600) · 1e6."""
    return chips * usd_per_chip_hour / (tokens_per_s * HOUR_S) * 1e6
