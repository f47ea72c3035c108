"""How parallel axes cut a model: what is legal, and what one rank then holds.

The cut is applied from outside: `slice_of` gives the widths of one rank and `steps`
builds its operators from them, so that the model needs no notion of parallelism. It
knows no chip and no topology; whether the ranks fit a machine is the planner's matter.

Axes of one replica of `tp · dp · pp` ranks:

    tp   cuts heads, feed-forward and vocabulary; key/value heads are replicated once
         tp exceeds them, and MLA's shared latent always
    dp   attention data-parallelism: each of dp groups holds its own sequences; only
         with experts, which all tp·dp ranks share
    ep   the experts are spread over ep ranks, and each expert is cut over tp·dp/ep
    pp   consecutive layers on consecutive stages

Norms, router and output biases are replicated on every rank that uses them; so is the
shared expert where dp > 1, for there each rank has its own tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from tongyun.errors import Infeasible, InputError
from tongyun.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True, order=True)
class Shard:
    """Ranks along each axis of one replica."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    dp: int = 1
    expert_picks: tuple[float, ...] = ()
    """For each expert of the busiest of the ep ranks, the chance that a token is computed there. Empty:
    every expert is as likely as the next, and no rank has copies of another's."""

    def __post_init__(self) -> None:
        for axis in ("tp", "pp", "ep", "dp"):
            if getattr(self, axis) < 1:
                raise InputError(f"{axis} must be at least 1, got {getattr(self, axis)}")

    @property
    def stage_ranks(self) -> int:
        """Ranks that hold one pipeline stage, and share its experts."""
        return self.tp * self.dp

    @property
    def ranks(self) -> int:
        """Ranks of one replica."""
        return self.stage_ranks * self.pp

    @property
    def expert_tp(self) -> int:
        """Ranks that share each expert."""
        return self.stage_ranks // self.ep

    def __str__(self) -> str:
        return f"tp{self.tp} pp{self.pp} ep{self.ep} dp{self.dp}"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One condition of a legal cut."""

    name: str
    holds: Callable[[ModelConfig, Shard], bool]
    says: str


def _experts_fit(config: ModelConfig, shard: Shard) -> bool:
    if config.experts is None:
        return shard.ep == 1
    whole = shard.stage_ranks % shard.ep == 0 and config.experts.count % shard.ep == 0
    return whole and config.experts.intermediate % shard.expert_tp == 0


def _dense_fits(config: ModelConfig, shard: Shard) -> bool:
    experts = config.experts
    if experts is None:
        return config.intermediate % shard.tp == 0
    if experts.first_layer and config.intermediate % shard.tp:
        return False
    return experts.shared_intermediate % shard.tp == 0


def _kv_fits(config: ModelConfig, shard: Shard) -> bool:
    if config.latent is not None:
        return True
    return config.kv_heads % shard.tp == 0 or shard.tp % config.kv_heads == 0


RULES = (
    Rule(
        name="heads",
        holds=lambda config, shard: config.heads % shard.tp == 0,
        says="tp must divide the query heads",
    ),
    Rule(
        name="kv_heads",
        holds=_kv_fits,
        says="tp must divide the key/value heads, or be a multiple of them (replication)",
    ),
    Rule(
        name="feed_forward",
        holds=_dense_fits,
        says="tp must divide the width of the dense and shared feed-forward",
    ),
    Rule(
        name="vocabulary",
        holds=lambda config, shard: config.vocab % shard.tp == 0,
        says="tp must divide the vocabulary",
    ),
    Rule(
        name="experts",
        holds=_experts_fit,
        says="ep must divide the experts and tp·dp, and tp·dp/ep the expert width; 1 without experts",
    ),
    Rule(
        name="attention_dp",
        holds=lambda config, shard: shard.dp == 1 or shard.ep == shard.stage_ranks,
        says="dp needs experts spread over all tp·dp ranks (replicas serve a dense model)",
    ),
    Rule(
        name="layers",
        holds=lambda config, shard: shard.pp <= config.layers,
        says="every pipeline stage needs a layer",
    ),
)


def broken_rule(config: ModelConfig, shard: Shard) -> Rule | None:
    """The first rule that forbids this cut of this model, or None when it is legal."""
    return next((rule for rule in RULES if not rule.holds(config, shard)), None)


def stage_layers(config: ModelConfig, shard: Shard) -> tuple[range, ...]:
    """Layers of each pipeline stage: equal but for one, the longer stages first."""
    base, extra = divmod(config.layers, shard.pp)
    sizes = [base + (stage < extra) for stage in range(shard.pp)]
    starts = [sum(sizes[:stage]) for stage in range(shard.pp)]
    return tuple(range(start, start + size) for start, size in zip(starts, sizes, strict=True))


@dataclass(frozen=True, kw_only=True)
class Slice:
    """What one rank of a sharded model holds: widths and layer counts.

    Layers are counted twice, by attention (`full` or `windowed`) and by feed-forward
    (`dense` or `sparse`); both pairs add up to the layers of the stage.
    """

    shard: Shard
    heads: int
    kv_heads: int
    dense_width: int
    shared_width: int
    experts: int
    expert_width: int
    vocab: int
    full_layers: int
    window_layers: int
    dense_layers: int
    sparse_layers: int
    first: bool
    last: bool

    @property
    def layers(self) -> int:
        return self.full_layers + self.window_layers


def _shared_width(config: ModelConfig, shard: Shard) -> int:
    """Cut over tp, or whole on every rank where dp spreads tokens over ranks instead."""
    shared = config.experts.shared_intermediate if config.experts else 0
    return shared if shard.dp > 1 else shared // shard.tp


@lru_cache(maxsize=4096)
def slice_of(config: ModelConfig, shard: Shard, stage: int = 0) -> Slice:
    """The part of the model on one rank of `stage`; an illegal cut is `Infeasible`."""
    rule = broken_rule(config, shard)
    if rule is not None:
        raise Infeasible(f"{config.name} on {shard}: {rule.says}")
    layers = stage_layers(config, shard)[stage]
    windowed = sum(layer in layers for layer in config.window_layers)
    experts = config.experts
    first_sparse = config.layers if experts is None else experts.first_layer
    dense = sum(layer < first_sparse for layer in layers)
    return Slice(
        shard=shard,
        heads=config.heads // shard.tp,
        kv_heads=max(1, config.kv_heads // shard.tp),
        dense_width=config.intermediate // shard.tp if dense else 0,
        shared_width=_shared_width(config, shard),
        experts=(len(shard.expert_picks) or experts.count // shard.ep) if experts else 0,
        expert_width=experts.intermediate // shard.expert_tp if experts else 0,
        vocab=config.vocab // shard.tp,
        full_layers=len(layers) - windowed,
        window_layers=windowed,
        dense_layers=dense,
        sparse_layers=len(layers) - dense,
        first=stage == 0,
        last=stage == shard.pp - 1,
    )
