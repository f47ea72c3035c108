"""The measured tables that `silicon.py` judges by, as cases: rows, their roofline and their price.

The tables are those of the package aiconfigurator-core (Apache-2.0), read where they lie.
Left out, and counted: rows that time the host instead of the chip, decoding faster than
the memory allows, and expert layers cut over ranks, whose row counts the engines' tables
define in different ways.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from silicon_rows import CACHE_BYTES, CHIPS, ENGINES, NCCL, VERSIONS, Array, Case, Columns, families, read
from tongyun.chip import attention, exchange, grouped, matmul
from tongyun.chip.silicon import Library, Silicon, silicon
from tongyun.units import DType

BARS = {"matmul bf16": 12, "matmul fp8": 15, "attention": 15, "experts": 20, "collective": 15}

# ------------------------------------------------------------------ matmul


def matmul_cases(data: Path, chip: str, engine: str) -> list[Case]:
    t = read(data / CHIPS[chip] / "gemm" / engine / VERSIONS[chip, engine] / "gemm_perf.parquet")
    found = []
    for name, dtype, block in (
        ("bfloat16", DType.BF16, False),
        ("fp8", DType.FP8, False),
        ("fp8_block", DType.FP8, True),
    ):
        q = t.keep(t["gemm_dtype"] == name)
        if not len(q["m"]):
            continue
        q, dropped = without_host_bound(q) if (engine, name) == ("vllm", "fp8_block") else (q, "")
        m, n, k = q.number("m"), q.number("n"), q.number("k")

        def price(
            s: Silicon,
            lib: Library,
            i: Array,
            m: Array = m,
            n: Array = n,
            k: Array = k,
            dtype: DType = dtype,
            block: bool = block,
        ) -> Array:
            return matmul.matmul_s(m[i], n[i], k[i], s, dtype=dtype, block_scales=block, library=lib)

        s = silicon(chip)
        bytes_ = (m * k + n * k) * dtype.bytes + m * n * 2
        found.append(
            Case(
                bar="matmul bf16" if dtype is DType.BF16 else "matmul fp8",
                what=f"matmul {short(name)}",
                chip=chip,
                engine=engine,
                family=families(n, k),
                measured_s=q.number("latency") * 1e-3,
                least_s=np.maximum(2 * m * n * k / s.peak_flops_per_s[dtype], bytes_ / s.memory_bytes_per_s),
                price=price,
                dropped=dropped,
            )
        )
    return found


def without_host_bound(q: Columns) -> tuple[Columns, str]:
    """Rows above the host's floor: these were not captured in a graph, so small ones time Python.

    The floor is the 95th percentile of products that take the chip a few microseconds.
    """
    small = (q.number("m") <= 64) & (q.number("n") * q.number("k") <= 2**22)
    keep = np.zeros(len(small), dtype=bool)
    for kernel in set(q["kernel_source"]):
        of = q["kernel_source"] == kernel
        if (of & small).any():
            keep |= of & (q.number("latency") > 1.5 * np.quantile(q.number("latency")[of & small], 0.95))
    return q.keep(keep), f"{int((~keep).sum())} of {len(keep)} host-bound"


# --------------------------------------------------------------- attention


def attention_cases(data: Path, chip: str, engine: str) -> list[Case]:
    found = []
    root = data / CHIPS[chip] / "attention" / engine / VERSIONS[chip, engine]
    for kind in ("context", "generation"):
        t = read(root / f"{kind}_attention_perf.parquet")
        window = t["window_size"] if "window_size" in t else np.zeros(len(t["isl"]))
        t = t.keep(np.nan_to_num(window.astype(np.float64)) == 0)
        pairs = zip(t["attn_dtype"], t["kv_cache_dtype"], strict=True)
        for types in sorted(set(pairs)):
            found += _attention(t, kind, types, chip, engine)
    return found


def _attention(t: Columns, kind: str, types: tuple[str, str], chip: str, engine: str) -> list[Case]:
    q = t.keep((t["attn_dtype"] == types[0]) & (t["kv_cache_dtype"] == types[1]))
    compute, cache = (DType.FP8 if name == "fp8" else DType.BF16 for name in types)
    s = silicon(chip)
    batch, width = q.number("batch_size"), q.number("head_dim")
    query, key, length = q.number("num_heads"), q.number("num_key_value_heads"), q.number("isl")
    if kind == "generation":
        length = q.number("step") + 1
    kv_s = batch * key * length * width * 2 * cache.bytes / s.memory_bytes_per_s
    measured_s = q.number("latency") * 1e-3
    if kind == "context":
        # Queries are read and results written in bf16, a number each for a query head.
        rows, pairs = batch * query * length, batch * query * length * (length + 1) / 2
        peak = s.peak_flops_per_s[compute]
        possible = np.ones(len(kv_s), dtype=bool)
    else:
        rows, pairs = batch * query, batch * query * length
        peak = s.peak_flops_per_s[DType.BF16]
        # A cache larger than the chip's own cannot be read faster than its memory: such rows
        # reuse blocks between sequences.
        possible = (kv_s * s.memory_bytes_per_s < CACHE_BYTES[chip]) | (measured_s > kv_s)
    passing_s = rows * width * 2 * 2.0 / s.memory_bytes_per_s
    least_s = np.maximum(kv_s + passing_s, 4 * pairs * width / peak)

    def price(s: Silicon, lib: Library, i: Array) -> Array:
        heads = attention.Heads.grouped(query[keep][i], key[keep][i], width[keep][i])
        b, n = batch[keep][i], length[keep][i]
        if kind == "context":
            return attention.prefill_s(b, n, 0.0, heads, s, compute=compute, cache=cache, library=lib)
        return attention.decode_s(b, n - 1, heads, s, cache=cache, library=lib)

    family = families(query, key, width)
    names = np.asarray([f"{a:.0f}x{b:.0f}x{c:.0f}" for a, b, c in zip(query, key, width, strict=True)])
    spoilt = {name for name in set(names[~possible]) if (~possible)[names == name].sum() >= 3}
    possible &= ~np.isin(names, sorted(spoilt))
    keep = np.flatnonzero(possible)
    lost = int((~possible).sum())
    return [
        Case(
            bar="attention",
            what=f"{'prefill' if kind == 'context' else 'decode'} {short(types[0])}, cache {short(types[1])}",
            chip=chip,
            engine=engine,
            family=family[keep],
            measured_s=measured_s[keep],
            least_s=least_s[keep],
            price=price,
            dropped=f"{lost} of {len(possible)} in families faster than memory" if lost else "",
        )
    ]


def short(name: str) -> str:
    return name.replace("bfloat16", "bf16")


def latent_cases(data: Path, chip: str, engine: str) -> list[Case]:
    root = data / CHIPS[chip] / "mla" / engine / VERSIONS[chip, engine]
    found = []
    for kind in ("context", "generation"):
        path = root / f"{kind}_mla_perf.parquet"
        if not path.exists():
            continue
        t = read(path)
        for name in sorted(set(t["kv_cache_dtype"])):
            found.append(_latent(t.keep(t["kv_cache_dtype"] == name), kind, name, chip, engine))
    return found


def _latent(q: Columns, kind: str, name: str, chip: str, engine: str) -> Case:
    cache = DType.FP8 if name == "fp8" else DType.BF16
    batch, query, length = q.number("batch_size"), q.number("num_heads"), q.number("isl")
    if kind == "generation":
        length = q.number("step") + 1
    s = silicon(chip)
    peak = s.peak_flops_per_s[DType.BF16]
    if kind == "context":
        least_s = batch * query * length * (length + 1) * 320 / peak
    else:
        read_s = batch * length * 576 * cache.bytes / s.memory_bytes_per_s
        least_s = np.maximum(read_s, 2 * batch * query * length * (576 + 512) / peak)

    def price(s: Silicon, lib: Library, i: Array) -> Array:
        if kind == "context":
            # SGLang's table holds the absorbed form for prompts too: 612 TFLOPS by its count.
            kind_of = attention.Heads.latent if engine == "sglang" else attention.Heads.latent_expanded
            heads = kind_of(query[i])
            return attention.prefill_s(batch[i], length[i], 0.0, heads, s, cache=cache, library=lib)
        heads = attention.Heads.latent(query[i])
        return attention.decode_s(batch[i], length[i] - 1, heads, s, cache=cache, library=lib)

    return Case(
        bar="attention",
        what=f"latent {'prefill' if kind == 'context' else 'decode'}, cache {short(name)}",
        chip=chip,
        engine=engine,
        family=families(query),
        measured_s=q.number("latency") * 1e-3,
        least_s=least_s,
        price=price,
    )


# ----------------------------------------------------------------- experts

TYPES = {
    "bfloat16": (DType.BF16, DType.BF16),
    "fp8": (DType.FP8, DType.FP8),
    "fp8_block": (DType.FP8, DType.FP8),
    "int4_wo": (DType.INT4, DType.BF16),
    "w4a16_mxfp4": (DType.FP4, DType.BF16),
}


def experts_cases(data: Path, chip: str, engine: str) -> list[Case]:
    t = read(data / CHIPS[chip] / "moe" / engine / VERSIONS[chip, engine] / "moe_perf.parquet")
    whole = t["moe_ep_size"].astype(np.int64) == 1
    lost = int((~whole).sum())
    t = t.keep(whole)
    flashinfer = np.asarray(["flashinfer" in str(k) for k in t["kernel_source"]])
    found = []
    for name in sorted(set(t["moe_dtype"])):
        for kernel in (False, True):
            of = (t["moe_dtype"] == name) & (flashinfer == kernel)
            if of.any():
                label = f"{name} (FlashInfer)" if kernel else str(name)
                found.append(_experts(t.keep(of), label, chip, engine, f"{lost} rows cut over experts"))
    return found


def _experts(q: Columns, name: str, chip: str, engine: str, dropped: str) -> Case:
    weight, compute = TYPES[name.split(maxsplit=1)[0]]
    s = silicon(chip)
    hidden, tokens = q.number("hidden_size"), q.number("num_tokens")
    inner = q.number("inter_size") / q.number("moe_tp_size")
    experts, chosen = q.number("num_experts"), q.number("topk")
    gates = np.asarray([1.0 if "nongated" in str(k) else 2.0 for k in q["kernel_source"]])
    rows = routed_rows(q)
    touched = np.minimum(rows, 1.0).mean(-1) * experts
    bytes_ = touched * hidden * inner * (gates + 1) * weight.bytes + tokens * hidden * 2 * 2.0
    flops = 2 * tokens * chosen * hidden * inner * (gates + 1)

    def price(s: Silicon, lib: Library, i: Array) -> Array:
        out = np.empty(len(i))
        for gated in (False, True):
            at = np.flatnonzero((gates[i] == 2) == gated)
            j = np.asarray(i)[at]
            out[at] = grouped.experts_s(
                rows[j],
                hidden[j],
                inner[j],
                s,
                tokens=tokens[j],
                experts=experts[j],
                weight=weight,
                compute=compute,
                gated=gated,
                library=lib,
            )
        return out

    return Case(
        bar="experts",
        what=f"experts {short(name)}",
        chip=chip,
        engine=engine,
        family=families(hidden, inner),
        measured_s=q.number("latency") * 1e-3,
        least_s=np.maximum(bytes_ / s.memory_bytes_per_s, flops / s.peak_flops_per_s[compute]),
        price=price,
        dropped=dropped,
    )


def routed_rows(q: Columns) -> Array:
    """Rows for each bin of experts, each distinct routing computed once."""
    keys = list(zip(q["num_tokens"], q["topk"], q["num_experts"], q["distribution"], strict=True))
    known: dict[tuple[object, ...], Array] = {}
    for key in set(keys):
        tokens, chosen, experts, law = int(key[0]), int(key[1]), int(key[2]), str(key[3])
        if law == "balanced":
            known[key] = grouped.balanced_rows(tokens, chosen, experts)
        else:
            known[key] = grouped.power_law_rows(tokens, chosen, experts, float(law.rsplit("_", 1)[1]))
    return np.asarray([known[key] for key in keys])


# -------------------------------------------------------------- collectives

OPERATIONS = {
    "all_reduce": exchange.all_reduce_s,
    "all_gather": exchange.all_gather_s,
    "reduce_scatter": exchange.reduce_scatter_s,
    "alltoall": exchange.all_to_all_s,
}


def collective_cases(data: Path, chip: str) -> list[Case]:
    comm = data / CHIPS[chip] / "comm"
    t = read(comm / "nccl" / NCCL[chip] / "nccl_perf.parquet")
    found = []
    for name in OPERATIONS:
        q = t.keep(t["op_name"] == name)
        width = np.where(q["nccl_dtype"] == "half", 2.0, 1.0)
        found.append(_collective(q, width, name, chip, "nccl", direct=False))
    for engine in ENGINES:
        q = read(comm / engine / VERSIONS[chip, engine] / "custom_allreduce_perf.parquet")
        eager = np.asarray(["eager" in str(k) for k in q["kernel_source"]])
        case = _collective(
            q.keep(~eager), np.full(int((~eager).sum()), 2.0), "all_reduce", chip, engine, direct=True
        )
        found.append(
            replace(
                case,
                dropped=f"{int(eager.sum())} of {len(eager)} started from Python" if eager.any() else "",
            )
        )
    return found


def _collective(q: Columns, width: Array, name: str, chip: str, engine: str, direct: bool) -> Case:
    payload, ranks = q.number("message_size") * width, q.number("num_gpus").astype(np.int64)
    s = silicon(chip)
    share = (ranks - 1) / ranks
    # A switch that adds lets a rank send its payload once.
    once = np.maximum(share, 1.0 if s.switch_reduces else 2 * share) if name == "all_reduce" else share

    def price(s: Silicon, lib: Library, i: Array) -> Array:
        out = np.empty(len(i))
        for n in sorted(set(ranks[i])):
            at = ranks[i] == n
            if name == "all_reduce":
                out[at] = exchange.all_reduce_s(payload[i][at], int(n), s, direct=direct, library=lib)
            else:
                out[at] = OPERATIONS[name](payload[i][at], int(n), s, library=lib)
        return out

    pairs = (np.log2(payload).astype(np.int64) // 2) % 3
    return Case(
        bar="collective",
        what=name,
        chip=chip,
        engine=engine,
        family=np.where(pairs == 1, 7, 0),
        measured_s=q.number("latency") * 1e-3,
        least_s=payload * once / s.link_bytes_per_s,
        price=price,
    )


ODD = {
    ("h100", "vllm", "matmul fp8_block"): "not captured in a graph, the host adds to every row",
    (
        "h100",
        "vllm",
        "experts fp8 (FlashInfer)",
    ): "2.5 times as long as the same engine's bf16, at every size",
    (
        "h100",
        "sglang",
        "experts bf16 (FlashInfer)",
    ): "3 times as long as the same engine's Triton, at every size",
    ("h100", "sglang", "experts w4a16_mxfp4"): "two kernels under one name",
    ("h100", "sglang", "prefill bf16, cache fp8"): "only head widths 256 and 512, by Triton",
    ("h100", "sglang", "latent decode, cache fp8"): "5 times as long as with a bf16 cache of twice the bytes",
    ("a100", "trtllm", "decode bf16, cache bf16"): "blocks of the cache reused, see the rows left out",
}
"""Judged but not learned from, and why."""


def gather(data: Path) -> list[Case]:
    cases = []
    for chip in CHIPS:
        for engine in ENGINES:
            cases += matmul_cases(data, chip, engine)
            cases += attention_cases(data, chip, engine)
            cases += latent_cases(data, chip, engine)
            cases += experts_cases(data, chip, engine)
        cases += collective_cases(data, chip)
    return sorted(cases, key=lambda c: (list(BARS).index(c.bar), c.chip, c.what, c.engine))


def installed() -> Path | None:
    """The tables of an installed aiconfigurator-core."""
    spec = find_spec("aiconfigurator_core")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "systems" / "data"
