"""The price door: what a step, a replica or a token costs, with the source of the figure.

Whoever needs seconds, joules or dollars asks here. It knows models, cuts and chips; it
knows no scheduler and no objective.
"""

from __future__ import annotations

from collections.abc import Iterable

from tongyun.chip.calibrated import measured, shared
from tongyun.chip.collective import Group
from tongyun.chip.roofline import PRODUCTS, rate_dtype, steps_s
from tongyun.model.config import ModelConfig
from tongyun.model.graph import COLLECTIVES, Operator, Precision, StepShape
from tongyun.model.shard import Shard
from tongyun.model.steps import PLAIN, WHOLE, step
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


def host_s(chip: Chip, shape: StepShape, operators: Iterable[Operator]) -> Number:
    """Seconds that sequences, their further tokens and waking threads add; zero where not measured."""
    samples = measured(chip)
    if samples is None:
        return 0.0
    each, further, woken = (samples.overhead.get(what, 0.0) for what in ("sequence", "token", "shared_step"))
    return each * shape.sequences + further * (shape.tokens - shape.sequences) + woken * shared(operators)


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
    return frozenset({Source.ANALYTIC}) | chip.sources_of(*sorted(keys))


def usd_per_mtoken(tokens_per_s: Number, chips: int, usd_per_chip_hour: float) -> Number:
    """Dollars per million tokens: chips · $/h / (tokens/s · 3600) · 1e6."""
    return chips * usd_per_chip_hour / (tokens_per_s * HOUR_S) * 1e6
