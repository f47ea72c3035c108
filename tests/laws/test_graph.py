"""What holds of every step: sums over sequences, windows, chunks, and the cuts of a model."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tongyun.errors import Infeasible
from tongyun.model.config import ModelConfig
from tongyun.model.graph import COLLECTIVES, Kind, Operator, Precision, Sequences, StepShape
from tongyun.model.shard import Shard, broken_rule, slice_of, stage_layers
from tongyun.model.steps import kv_bytes, step, step_flops, weight_bytes
from tongyun.specs import find_model

MODELS = (
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-30B-A3B",
    "deepseek-ai/DeepSeek-V3",
    "openai/gpt-oss-20b",
    "meta-llama/Llama-3.1-8B",
)
CONFIGS = {name: ModelConfig.from_hf(find_model(name)[0], name=name) for name in MODELS}
pieces = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 500)), min_size=1, max_size=6)
windows = st.one_of(st.none(), st.integers(1, 400))


def seen(new: int, context: int, window: int | None) -> list[int]:
    """Keys that each new token sees, counted one by one."""
    reach = [context + i + 1 for i in range(new)]
    return reach if window is None else [min(window, keys) for keys in reach]


@given(pieces, windows)
@settings(deadline=None)
def test_pairs_of_a_ragged_batch_are_counted_one_by_one(
    batch: list[tuple[int, int]], window: int | None
) -> None:
    new, context = np.array(batch, dtype=float).T
    group = Sequences(new=new, context=context, ragged=True)
    assert group.pairs(window) == sum(sum(seen(n, c, window)) for n, c in batch)
    assert group.tokens == sum(n for n, _ in batch)
    assert group.sequences == len(batch)


@given(pieces, windows)
@settings(deadline=None)
def test_keys_are_those_some_token_sees(batch: list[tuple[int, int]], window: int | None) -> None:
    for new, context in batch:
        oldest = min(i + context + 1 - keys for i, keys in enumerate(seen(new, context, window)))
        assert Sequences(new=new, context=context).keys(window) == context + new - oldest


@pytest.mark.parametrize("name", MODELS)
@given(tokens=st.integers(2, 5000), data=st.data())
@settings(max_examples=20, deadline=None)
def test_chunks_take_the_products_of_the_whole_prompt(name: str, tokens: int, data: st.DataObject) -> None:
    config = CONFIGS[name]
    cut = data.draw(st.integers(1, tokens - 1))
    whole = step_flops(config, StepShape(prefill=Sequences(new=tokens), sampled=1))
    first = step_flops(config, StepShape(prefill=Sequences(new=cut), sampled=0))
    second = step_flops(config, StepShape(prefill=Sequences(new=tokens - cut, context=cut), sampled=1))
    again = 0.0
    if config.latent is not None:
        # The latent of the first chunk is expanded once more for the second.
        latent = config.latent
        wide = config.heads * (latent.nope_dim + latent.value_dim)
        again = config.layers * 2 * cut * latent.kv_rank * wide
    assert first + second == whole + again


@pytest.mark.parametrize("name", MODELS)
@given(pieces)
@settings(max_examples=20, deadline=None)
def test_a_ragged_batch_is_the_sum_of_its_sequences(name: str, batch: list[tuple[int, int]]) -> None:
    """FLOPs add up; weights are read once, but for experts, of which more tokens touch more."""
    config = CONFIGS[name]
    together = step(config, StepShape.ragged(batch))
    alone = [step(config, StepShape.ragged([piece])) for piece in batch]
    apart = sum(total(operators, "flops") for operators in alone)
    assert total(together, "flops") == pytest.approx(apart, rel=1e-12)
    assert total(together, "weight_bytes") <= sum(total(o, "weight_bytes") for o in alone) * (1 + 1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_a_grid_is_priced_as_its_points(name: str) -> None:
    config, batches, contexts = CONFIGS[name], np.array([1.0, 7.0, 64.0]), np.array([5.0, 130.0, 4000.0])
    grid = step(config, StepShape.decoding(batches, contexts))
    for i, (batch, context) in enumerate(zip(batches, contexts, strict=True)):
        point = step(config, StepShape.decoding(float(batch), float(context)))
        for wide, single in zip(grid, point, strict=True):
            for field in ("flops", "read_bytes", "weight_bytes", "write_bytes", "m", "groups"):
                value = np.broadcast_to(getattr(wide, field), batches.shape)[i]
                assert value == pytest.approx(float(getattr(single, field)), rel=1e-12), (wide.name, field)


def total(operators: tuple[Operator, ...], field: str) -> float:
    return float(sum(op.repeat * getattr(op, field) for op in operators))


# ── cuts ─────────────────────────────────────────────────────────────────────────────

axis = st.sampled_from([1, 2, 4, 8, 16])
shards = st.builds(Shard, tp=axis, pp=st.integers(1, 7), ep=axis, dp=axis)

ON_EVERY_TP_RANK = {"router", "qkv_down", "latent_norm", "attention_norm", "dense_norm", "sparse_norm"}
"""Replicated over tp by design: the norms, the router and MLA's down-projections."""
ON_EVERY_DP_GROUP = ON_EVERY_TP_RANK | {
    "qkv", "q_up", "kv_up", "absorb_q", "absorb_v", "rotate", "sinks", "attention_out", "embed", "head",
    "dense_up", "dense_down", "shared_up", "shared_down", "final_norm",
}  # fmt: skip
"""All weights but the experts'."""


def over_ranks(config: ModelConfig, shard: Shard, shape: StepShape, field: str) -> Counter[str]:
    """A count by operator name, over the repeats, all ranks of a stage and all stages."""
    sums: Counter[str] = Counter()
    for stage in range(shard.pp):
        for op in step(config, shape, shard, stage=stage):
            times = 1 if field == "resident_bytes" else op.repeat
            sums[op.name] += times * float(getattr(op, field)) * shard.stage_ranks
    return sums


@pytest.mark.parametrize("name", MODELS)
@given(shard=shards)
@settings(max_examples=60, deadline=None)
def test_a_cut_conserves_flops(name: str, shard: Shard) -> None:
    config = CONFIGS[name]
    if broken_rule(config, shard) is not None:
        with pytest.raises(Infeasible):
            slice_of(config, shard)
        return
    mixed = StepShape(
        decode=Sequences(new=1, context=300, count=16), prefill=Sequences(new=64, context=10), sampled=17
    )
    cut, whole = over_ranks(config, shard, mixed, "flops"), over_ranks(config, Shard(), mixed, "flops")
    for op, flops in whole.items():
        copies = shard.tp if op in ON_EVERY_TP_RANK and not (op == "router" and shard.dp > 1) else 1
        if op == "qkv":
            copies = kv_copies(config, shard)
        # Each of dp groups has the load, so that all together have it dp times.
        assert cut[op] == pytest.approx(flops * copies * shard.dp, rel=1e-9), op


@pytest.mark.parametrize("name", MODELS)
@given(shard=shards)
@settings(max_examples=60, deadline=None)
def test_a_cut_conserves_weights(name: str, shard: Shard) -> None:
    config, one = CONFIGS[name], StepShape.prefilling(1)
    if broken_rule(config, shard) is not None:
        return
    cut, whole = (
        over_ranks(config, shard, one, "resident_bytes"),
        over_ranks(config, Shard(), one, "resident_bytes"),
    )
    for op, held in whole.items():
        copies: float = shard.dp if op in ON_EVERY_DP_GROUP else 1
        if op in ON_EVERY_TP_RANK or op in ("final_norm", "rotate"):
            copies *= shard.tp
        if op.startswith("shared") and shard.dp > 1:
            copies *= shard.tp
        if op == "qkv":
            copies *= kv_copies(config, shard)
        if op == "head" and config.tied and shard.pp > 1:
            assert held == 0 < cut[op]  # a copy of the table, on the last stage
            continue
        if config.attention_bias and op in ("attention_out", "qkv_down"):
            continue  # its bias is replicated and its matrix is not
        if config.experts_bias and op == "experts_down":
            continue
        assert cut[op] == pytest.approx(held * copies, rel=1e-9), op


def kv_copies(config: ModelConfig, shard: Shard) -> float:
    """How much larger all ranks' qkv projections are than one, key and value heads being replicated."""
    kv = max(config.kv_heads, shard.tp)
    return (config.heads + 2 * kv) / (config.heads + 2 * config.kv_heads)


@pytest.mark.parametrize("name", MODELS)
@given(shard=shards)
@settings(max_examples=30, deadline=None)
def test_stages_hold_all_layers_and_all_kv(name: str, shard: Shard) -> None:
    config = CONFIGS[name]
    if broken_rule(config, shard) is not None:
        return
    assert [layer for stage in stage_layers(config, shard) for layer in stage] == list(range(config.layers))
    parts = [slice_of(config, shard, stage) for stage in range(shard.pp)]
    assert sum(part.layers for part in parts) == config.layers
    assert sum(part.dense_layers + part.sparse_layers for part in parts) == config.layers
    held = sum(float(kv_bytes(config, 1000, Precision(), part)) for part in parts) * shard.tp
    copies = shard.tp if config.latent else max(1, shard.tp // config.kv_heads)
    assert held == pytest.approx(float(kv_bytes(config, 1000, Precision())) * copies)


@pytest.mark.parametrize("name", MODELS)
def test_one_rank_needs_no_collective(name: str) -> None:
    assert not [op for op in step(CONFIGS[name], StepShape.decoding(4, 100)) if op.kind in COLLECTIVES]


def test_collectives_of_a_cut_name_their_axis() -> None:
    config, shape = CONFIGS["Qwen/Qwen3-30B-A3B"], StepShape.decoding(16, 100)
    kinds = {
        str(shard): Counter((op.kind, op.axis) for op in step(config, shape, shard) if op.kind in COLLECTIVES)
        for shard in (Shard(tp=4, ep=4), Shard(ep=4, dp=4), Shard(pp=2))
    }
    sums = Counter({(Kind.ALL_REDUCE, "tp"): 3, (Kind.ALL_GATHER, "tp"): 1})
    assert kinds["tp4 pp1 ep4 dp1"] == sums
    assert kinds["tp1 pp1 ep4 dp4"] == Counter({(Kind.ALL_TO_ALL, "ep"): 2})
    assert kinds["tp1 pp2 ep1 dp1"] == Counter({(Kind.SEND, "pp"): 1})


@given(st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128]))
@settings(deadline=None)
def test_a_token_reaches_at_most_its_experts_ranks(ranks: int) -> None:
    experts = CONFIGS["Qwen/Qwen3-30B-A3B"].experts
    assert experts is not None
    reached = experts.reached(ranks)
    assert 1 <= reached <= min(ranks, experts.per_token) + 1e-9
    if ranks == experts.count:
        assert reached == pytest.approx(experts.per_token)


def test_experts_are_read_as_far_as_tokens_touch_them() -> None:
    config = CONFIGS["Qwen/Qwen3-30B-A3B"]
    few, many = (
        next(op for op in step(config, StepShape.decoding(tokens, 10)) if op.name == "experts_up")
        for tokens in (1, 10_000)
    )
    assert few.groups == pytest.approx(8)
    assert many.groups == pytest.approx(128)


def test_lower_precision_holds_fewer_bytes() -> None:
    config = CONFIGS["Qwen/Qwen3-30B-A3B"]
    sizes = [weight_bytes(config, Shard(), Precision.of(dtype)) for dtype in ("f32", "bf16", "fp8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
