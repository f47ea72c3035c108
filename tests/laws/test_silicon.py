"""What must hold for every shape.

Never below the roofline, more of a chip never slower, more work never faster.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tongyun.chip import attention, exchange, grouped
from tongyun.chip.kernels import Kernels
from tongyun.chip.matmul import matmul_s, overlapped, waves
from tongyun.chip.rates import PRODUCTS, rate_dtype
from tongyun.chip.silicon import FITTED, Silicon, library, silicon, tables
from tongyun.errors import Infeasible
from tongyun.model.config import ModelConfig
from tongyun.model.graph import COLLECTIVES, Precision, Sequences, StepShape
from tongyun.model.shard import Shard
from tongyun.model.steps import step
from tongyun.specs import find_chip, find_model
from tongyun.units import DType

NAMES = ("a100", "h100", "h200", "h20")
LIBRARIES = ("any", "sglang", "vllm", "trtllm")
CLOSE = 1 + 1e-9

chips = st.sampled_from(NAMES).map(silicon)
libraries = st.sampled_from(LIBRARIES).map(library)
rows = st.integers(1, 40_000)
widths = st.integers(1, 70_000)
batches = st.integers(1, 2048)
lengths = st.integers(1, 140_000)
heads = st.sampled_from([(32, 8), (64, 4), (8, 1), (16, 16), (96, 2), (1, 1)])
ranks = st.sampled_from([1, 2, 4, 8])
payloads = st.integers(1, 2**30)
types = st.sampled_from([DType.BF16, DType.FP8])


def better(chip: Silicon) -> list[Silicon]:
    """The chip with more of one thing each."""
    more = ("memory_bytes_per_s", "core_load_bytes_per_s", "link_bytes_per_s")
    made = [replace(chip, **{name: getattr(chip, name) * 1.5}) for name in more]
    faster = {dtype: 1.5 * peak for dtype, peak in chip.peak_flops_per_s.items()}
    made.append(replace(chip, peak_flops_per_s=faster))
    # More cores of the same kind: the peak grows with them.
    made.append(replace(chip, peak_flops_per_s=faster, cores=chip.cores * 3 // 2))
    made.append(replace(chip, fill_s=chip.fill_s / 2, hop_s=chip.hop_s / 2))
    return made


CONFIGS = {
    name: ModelConfig.from_hf(find_model(name)[0], name=name)
    for name in ("Qwen/Qwen3-8B", "Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V3", "openai/gpt-oss-120b")
}
SPECS = {name: find_chip(name).at() for name in ("a100", "h100", "h20", "zhenwu-810e", "mi300x", "tpu-v5p")}
FLAWLESS = replace(SPECS["h100"], name="flawless", achieved_memory=1.0, achieved_matmul={DType.BF16: 1.0})
"""A chip of a user's own that claims to reach its peaks."""


@pytest.mark.parametrize("spec", [*SPECS.values(), FLAWLESS], ids=lambda spec: spec.name)
@pytest.mark.parametrize("engine", LIBRARIES)
def test_every_operator_of_a_step_is_priced_above_its_roofline(spec, engine):
    """By the form of each model: no bound is put on the prices afterwards."""
    priced = Kernels(replace(spec, library=engine))
    many = np.unique(np.round(np.geomspace(1, 8192, 24)))
    group = {"decode": Sequences(new=1, context=2000.0, count=many), "sampled": many}
    chunk = {"prefill": Sequences(new=many, context=100.0, count=1.0), "sampled": 1.0}
    for config in CONFIGS.values():
        for precision in ("bf16", "fp8", "int4"):
            for cut in (Shard(), Shard(tp=8), Shard(tp=8, ep=8 if config.experts else 1)):
                for shape in (StepShape(**group), StepShape(**chunk)):
                    above_roofline(priced, step(config, shape, cut, Precision.of(precision)))


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("engine", LIBRARIES)
def test_the_operators_of_an_expert_layer_cost_what_the_layer_does(engine, precision):
    """So that a plan pays what `benchmarks/silicon.py` judges."""
    config, types = CONFIGS["Qwen/Qwen3-30B-A3B"], Precision.of(precision)
    priced = Kernels(replace(SPECS["h100"], library=engine))
    many = np.array([1.0, 7.0, 300.0, 5000.0])
    shape = StepShape(decode=Sequences(new=1, context=2000.0, count=many), sampled=many)
    layer = [op for op in step(config, shape, Shard(), types) if op.routed is not None]
    apart_s = sum(np.asarray(work_s) + start_s for work_s, start_s in map(priced.parts_s, layer))
    of = layer[0].routed
    whole_s = grouped.experts_s(
        grouped.random_rows(many, of.per_token, of.count),
        of.hidden,
        of.inner,
        priced.silicon,
        tokens=many,
        experts=of.local,
        weight=types.experts,
        compute=rate_dtype(priced.chip, types.expert_compute),
        library=priced.library,
    )
    assert apart_s == pytest.approx(whole_s, rel=1e-9)


def above_roofline(priced, operators):
    spec = priced.chip
    for op in operators:
        if op.kind in COLLECTIVES:
            continue
        try:
            peak = spec.peak_flops_per_s[rate_dtype(spec, op.compute)]
        except Infeasible:
            continue
        work_s, _ = priced.parts_s(op)
        computing_s = op.flops / peak if op.kind in PRODUCTS else 0.0
        least_s = np.maximum(op.moved_bytes / spec.memory_bytes_per_s, computing_s)
        assert (np.asarray(work_s) * CLOSE >= least_s).all(), op.kind


@settings(deadline=None, max_examples=60)
@given(m=rows, n=widths, k=widths, chip=chips, lib=libraries, dtype=types)
def test_a_product_is_never_below_its_roofline(m, n, k, chip, lib, dtype):
    taken = dtype if dtype in chip.peak_flops_per_s else DType.BF16
    least_s = max(
        2.0 * m * n * k / chip.peak_flops_per_s[taken],
        ((m * k + n * k) * dtype.bytes + m * n * 2.0) / chip.memory_bytes_per_s,
    )
    assert matmul_s(m, n, k, chip, dtype=dtype, library=lib) * CLOSE >= least_s


@settings(deadline=None, max_examples=60)
@given(m=rows, n=widths, k=widths, chip=chips, lib=libraries, dtype=types, block=st.booleans())
def test_more_of_a_chip_never_slows_a_product(m, n, k, chip, lib, dtype, block):
    kind = {"dtype": dtype, "block_scales": block, "library": lib}
    before = matmul_s(m, n, k, chip, **kind)
    for improved in better(chip):
        assert matmul_s(m, n, k, improved, **kind) <= before * CLOSE


@settings(deadline=None, max_examples=60)
@given(
    m=rows,
    n=widths,
    k=widths,
    more=st.integers(1, 5000),
    chip=chips,
    lib=libraries,
    dtype=types,
    block=st.booleans(),
)
def test_a_larger_product_is_never_faster(m, n, k, more, chip, lib, dtype, block):
    shapes = np.array([[m, n, k], [m + more, n, k], [m, n + more, k], [m, n, k + more]], dtype=float)
    s = matmul_s(*shapes.T, chip, dtype=dtype, block_scales=block, library=lib)
    assert (s[1:] * CLOSE >= s[0]).all()


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 64),
    new=st.integers(1, 16_000),
    cached=st.integers(0, 16_000),
    of=st.one_of(
        heads.map(lambda shape: attention.Heads.grouped(*shape, 128)),
        st.sampled_from([8, 16, 128]).map(attention.Heads.latent_expanded),
    ),
    chip=chips,
    lib=libraries,
    compute=types,
)
def test_a_prompt_is_never_below_its_roofline_and_more_of_a_chip_never_slows_it(
    batch, new, cached, of, chip, lib, compute
):
    pairs = new * cached + new * (new + 1) / 2
    peak = chip.peak_flops_per_s.get(compute, chip.peak_flops_per_s[DType.BF16])
    least_s = 2.0 * batch * of.query * (of.width + of.value_width) * pairs / peak
    s = attention.prefill_s(batch, new, cached, of, chip, compute=compute, library=lib)
    assert s * CLOSE >= least_s
    for improved in better(chip):
        after = attention.prefill_s(batch, new, cached, of, improved, compute=compute, library=lib)
        assert after <= s * CLOSE


@settings(deadline=None, max_examples=60)
@given(batch=batches, cached=lengths, shape=heads, chip=chips, lib=libraries, cache=types)
def test_decoding_is_never_faster_than_its_cache_streams(batch, cached, shape, chip, lib, cache):
    of = attention.Heads.grouped(*shape, 128)
    s = attention.decode_s(batch, cached, of, chip, cache=cache, library=lib)
    assert s * CLOSE >= batch * shape[1] * 256 * (cached + 1) * cache.bytes / chip.memory_bytes_per_s
    longer = attention.decode_s(batch, cached + 777, of, chip, cache=cache, library=lib)
    wider = attention.decode_s(batch + 3, cached, of, chip, cache=cache, library=lib)
    assert longer * CLOSE >= s
    assert wider * CLOSE >= s
    for improved in better(chip):
        assert attention.decode_s(batch, cached, of, improved, cache=cache, library=lib) <= s * CLOSE


@settings(deadline=None, max_examples=60)
@given(batch=batches, cached=lengths, query=st.sampled_from([8, 16, 128]), chip=chips, lib=libraries)
def test_latent_decoding_reads_one_vector_a_token(batch, cached, query, chip, lib):
    of = attention.Heads.latent(query)
    s = attention.decode_s(batch, cached, of, chip, library=lib)
    products = 2.0 * batch * query * (cached + 1) * (576 + 512)
    assert s * CLOSE >= batch * (cached + 1) * 576 * 2 / chip.memory_bytes_per_s
    assert s * CLOSE >= products / chip.peak_flops_per_s[DType.BF16]
    for improved in better(chip):
        assert attention.decode_s(batch, cached, of, improved, library=lib) <= s * CLOSE


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 20_000),
    routing=st.sampled_from([(8, 128), (8, 256), (2, 8), (1, 16), (22, 512)]),
    alpha=st.sampled_from([None, 1.0, 1.01, 1.2]),
)
def test_routing_conserves_choices(tokens, routing, alpha):
    chosen, experts = routing
    if alpha is None:
        bins = grouped.balanced_rows(tokens, chosen, experts)
    else:
        bins = grouped.power_law_rows(tokens, chosen, experts, alpha)
    assert (bins >= 0).all()
    assert bins.max() <= tokens * CLOSE
    assert bins.mean() * experts == pytest.approx(tokens * chosen)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 20_000),
    more=st.integers(0, 5000),
    inner=st.sampled_from([96, 768, 1536, 2048]),
    chip=chips,
    lib=libraries,
    kind=st.sampled_from(
        [(DType.BF16, DType.BF16), (DType.FP8, DType.FP8), (DType.INT4, DType.BF16), (DType.FP4, DType.BF16)]
    ),
)
def test_experts_never_below_roofline_nor_faster_with_more_tokens(tokens, more, inner, chip, lib, kind):
    weight, compute = kind

    def seconds(count, on):
        bins = grouped.balanced_rows(count, 8, 128)
        types = {"weight": weight, "compute": compute}
        return grouped.experts_s(bins, 2048, inner, on, tokens=count, experts=128, library=lib, **types)

    s = seconds(tokens, chip)
    touched = min(128, tokens * 8)
    peak = chip.peak_flops_per_s.get(compute, chip.peak_flops_per_s[DType.BF16])
    least_s = max(
        touched * 3 * 2048 * inner * weight.bytes / chip.memory_bytes_per_s,
        2.0 * tokens * 8 * 3 * 2048 * inner / peak,
    )
    assert s * CLOSE >= least_s
    assert seconds(tokens + more, chip) * CLOSE >= s
    for improved in better(chip):
        assert seconds(tokens, improved) <= s * CLOSE


@settings(deadline=None, max_examples=60)
@given(payload=payloads, n=ranks, more=st.integers(0, 2**28), chip=chips, lib=libraries)
def test_collectives_never_beat_the_link_and_grow_with_the_payload(payload, n, more, chip, lib):
    share = (n - 1) / n
    for of, least in (
        (exchange.all_gather_s, share),
        (exchange.reduce_scatter_s, share),
        (exchange.all_to_all_s, share),
        (exchange.all_reduce_s, min(1.0, 2 * share) if chip.switch_reduces else 2 * share),
    ):
        s = of(payload, n, chip, library=lib)
        assert s * CLOSE >= payload * least / chip.link_bytes_per_s
        assert of(payload + more, n, chip, library=lib) * CLOSE >= s
        for improved in better(chip):
            assert of(payload, n, improved, library=lib) <= s * CLOSE
    assert exchange.all_reduce_s(payload, 1, chip, library=lib) == 0.0


@settings(deadline=None, max_examples=60)
@given(payload=payloads, n=ranks, chip=chips, lib=libraries)
def test_direct_kernels_only_ever_help(payload, n, chip, lib):
    both = exchange.all_reduce_s(payload, n, chip, library=lib)
    plain = exchange.all_reduce_s(payload, n, chip, direct=False, library=lib)
    assert both <= plain * CLOSE
    for improved in better(chip):
        assert exchange.all_reduce_s(payload, n, improved, direct=False, library=lib) <= plain * CLOSE


@settings(deadline=None, max_examples=60)
@given(payload=payloads, more=st.integers(0, 2**28), chip=chips, lib=libraries)
def test_a_transfer_is_never_faster_than_its_link_nor_slower_on_more_of_it(payload, more, chip, lib):
    s = exchange.send_s(payload, chip, library=lib)
    assert s * CLOSE >= payload / chip.link_bytes_per_s
    assert exchange.send_s(payload + more, chip, library=lib) * CLOSE >= s
    for improved in better(chip):
        assert exchange.send_s(payload, improved, library=lib) <= s * CLOSE


@settings(deadline=None, max_examples=60)
@given(items=st.floats(0.01, 1e6), cores=st.integers(1, 300))
def test_waves_are_at_least_the_work_and_at_least_one(items, cores):
    assert waves(items, cores) * CLOSE >= max(items / cores, 1.0)
    assert waves(items, cores) <= items / cores + 1.0


@settings(deadline=None, max_examples=60)
@given(a=st.floats(0, 1e3), b=st.floats(0, 1e3), p=st.floats(1, 8))
def test_overlap_lies_between_the_larger_and_the_sum(a, b, p):
    assert max(a, b) <= overlapped(a, b, p) * CLOSE + 1e-30
    assert overlapped(a, b, p) <= (a + b) * CLOSE + 1e-29


def test_at_most_six_numbers_of_a_chip_are_fitted():
    """What differs between a fitted chip and another that no fact explains."""
    assert len(FITTED) <= 6
    for name, chip in tables()["chip"].items():
        assert set(FITTED) <= set(chip), name
        assert all(0 < chip[f] <= 1 for f in FITTED if "efficiency" in f), name
    for sibling in tables()["sibling"].values():
        assert not set(sibling) & set(FITTED)
