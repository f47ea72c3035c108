"""The price door as a simulated executor asks it: a batch of one replica, on one chip or cut.

Knows no scheduler; what a step costs is `tongyun.cost`'s answer and nothing is added to it.
"""

from __future__ import annotations

from tongyun.cloud.engine.simulated import StepCost, StepLoad
from tongyun.cost import step_cost
from tongyun.errors import InputError
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision, StepShape
from tongyun.model.shard import Shard
from tongyun.model.steps import PLAIN, WHOLE
from tongyun.specs import Chip
from tongyun.units import Cost


def priced(config: ModelConfig, chip: Chip, shard: Shard = WHOLE, precision: Precision = PLAIN) -> StepCost:
    """Seconds and joules of each step of `config` on `chip`, cut by `shard`.

    One batch is one attention group on one pipeline stage: InputError where `shard` has
    several of either, because their steps overlap in ways a single batch does not show.
    """
    if shard.pp > 1 or shard.dp > 1:
        raise InputError(
            f"a simulated replica runs one batch: pp and dp must be 1, not {shard.pp}, {shard.dp}"
        )

    def of(load: StepLoad) -> Cost:
        pieces = zip(load.new_tokens.tolist(), load.context.tolist(), strict=True)
        return step_cost(config, StepShape.ragged(pieces, sampled=load.samples), chip, shard, precision)

    return of
