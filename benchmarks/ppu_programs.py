"""Programs of the PPU drawn from a seed: every kernel the compiler emits and small models, on many chips."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tongyun.chip.ppu.capture import compile_step
from tongyun.chip.ppu.emit import attention, experts, paged, rows
from tongyun.chip.ppu.emit.builder import Builder
from tongyun.chip.ppu.emit.matmul import matmul
from tongyun.chip.ppu.isa import Type, Vec
from tongyun.chip.ppu.program import Program, Tensor
from tongyun.specs import Ppu, find_ppu

Random = np.random.Generator
Symbols = Mapping[str, ArrayLike]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One program with the chip it is for and the numbers it reads from memory."""

    kind: str
    what: str
    ppu: Ppu
    program: Program
    symbols: Symbols


def draw(seed: int, count: int) -> Iterator[Drawn]:
    """`count` programs, of all kinds in turn; every tenth is a whole model."""
    rng = np.random.default_rng(seed)
    kinds = list(KINDS)
    for number in range(count):
        kind = "model" if number % 10 == 9 else kinds[number % len(kinds)]
        ppu = _chip(rng)
        if kind == "model":
            what, program, symbols = _model(rng, ppu)
        else:
            b = Builder(ppu)
            what, symbols = KINDS[kind](rng, b)
            program = b.program()
        yield Drawn(kind=kind, what=what, ppu=ppu, program=program, symbols=symbols)


def _chip(rng: Random) -> Ppu:
    """A chip of the catalogue at a corner, or one that a user might write."""
    name = str(rng.choice(["zhenwu-810e", "a100", "h100", "own"]))
    ppu = find_ppu("zhenwu-810e" if name == "own" else name).at(str(rng.choice(["slow", "nominal", "fast"])))
    if name != "own":
        return ppu
    return dataclasses.replace(
        ppu,
        name="own",
        cores=int(rng.integers(8, 200)),
        clock_hz=float(rng.uniform(0.8e9, 2.5e9)),
        tensor_flops={t: f * float(rng.choice([1, 2, 4])) for t, f in ppu.tensor_flops.items()},
        port_bytes=float(rng.choice([32, 64, 128])),
        l2_rate=float(rng.uniform(1000, 8000)),
        l2_bytes=int(rng.uniform(8, 128)) << 20,
        l2_latency_s=float(rng.uniform(50e-9, 400e-9)),
        hbm_bytes_per_s=float(rng.uniform(0.5e12, 6e12)),
        hbm_latency_s=float(rng.uniform(200e-9, 900e-9)),
        barrier_s=float(rng.uniform(0.2e-6, 4e-6)),
    )


def _size(rng: Random, low: float, high: float, step: int = 1) -> int:
    """Log-uniform between two numbers, a multiple of `step`; half of them powers of two."""
    drawn = np.exp(rng.uniform(np.log(low), np.log(high)))
    if rng.random() < 0.5:
        drawn = 2.0 ** round(np.log2(drawn))
    return max(step, int(drawn) // step * step)


def _place(b: Builder, name: str, *shape: int, type: Type = Type.BF16, role: str = "input") -> Tensor:
    return b.layout.place(name, shape, type, role)


def _product(rng: Random, b: Builder) -> tuple[str, Symbols]:
    while (m := _size(rng, 1, 8192)) * (n := _size(rng, 32, 16384)) * (k := _size(rng, 32, 12288, 16)) > 1e11:
        pass
    a, w = _place(b, "a", m, k), _place(b, "w", n, k, role="weight")
    out = _place(b, "out", m, n, role="output")
    kind = str(rng.choice(["plain", "plain", "norm", "gate", "residual", "bias"]))
    with b.kernel("matmul", "product"):
        matmul(
            b, a, w, out, up=_place(b, "up", n, k) if kind == "gate" else None,
            gain=_place(b, "gain", k) if kind == "norm" else None, eps=1e-6,
            residual=_place(b, "residual", m, n) if kind == "residual" else None,
            bias=_place(b, "bias", n) if kind == "bias" else None,
        )  # fmt: skip
    return f"{kind} {m}×{n}×{k}", {}


def _rowwise(rng: Random, b: Builder) -> tuple[str, Symbols]:
    count, width = _size(rng, 1, 16384), _size(rng, 64, 8192, 8)
    kind = str(rng.choice(["rmsnorm", "add", "silu", "softmax", "swiglu", "rotate"]))
    x, y = _place(b, "x", count, width), _place(b, "y", count, width)
    out = _place(b, "out", count, width, role="output")
    heads = max(1, width // 128)
    with b.kernel(kind, kind):
        if kind == "rmsnorm":
            rows.rmsnorm(b, rows.Rows.of(x), _place(b, "gain", width), rows.Rows.of(out), 1e-6)
        elif kind == "add":
            rows.elementwise(b, Vec.ADD, x, out, other=y)
        elif kind == "silu":
            rows.elementwise(b, Vec.SILU, x, out)
        elif kind == "softmax":
            rows.softmax(b, x, out)
        elif kind == "swiglu":
            rows.swiglu(b, rows.Rows.of(x), rows.Rows.of(y), out)
        else:
            wide = heads * 128
            cos, sin = _place(b, "cos", count, 128), _place(b, "sin", count, 128)
            x, out = _place(b, "q", count, wide), _place(b, "turned", count, wide, role="output")
            norm = rows.HeadNorm(gain=_place(b, "gain", 128), eps=1e-6)
            given = rows.Rows.of(x), cos, sin, rows.Rows.of(out)
            rows.rotate(b, *given, heads=heads, norm=norm if rng.random() < 0.5 else None)
    return f"{kind} {count}×{width}", {}


def _heads(rng: Random) -> tuple[int, int]:
    kv = int(rng.choice([1, 2, 4, 8]))
    return kv * int(rng.choice([1, 2, 4, 8])), kv


def _attend(rng: Random, b: Builder, sequences: int, tokens: int, context: int) -> tuple[str, Symbols]:
    (heads, kv), width = _heads(rng), int(rng.choice([64, 128]))
    room = max(64, tokens + context)
    shape = attention.Attention(
        sequences=sequences, tokens=tokens, heads=heads, kv_heads=kv, width=width, room=room, scale=0.1,
        query_stride=heads * width * 2,
    )  # fmt: skip
    q, out = (_place(b, name, sequences * tokens, heads * width) for name in ("q", "out"))
    keys, values = (_place(b, name, sequences, kv, room, width, role="state") for name in ("k", "v"))
    with b.kernel("attention", "attention"):
        attention.attention(b, shape, q, keys, values, out, _place(b, "position", 1, type=Type.I32))
    return f"{sequences}×{tokens} behind {context}, {heads}/{kv} heads of {width}", {"position": [context]}


def _prefill(rng: Random, b: Builder) -> tuple[str, Symbols]:
    tokens = _size(rng, 16, 4096)
    return _attend(rng, b, _size(rng, 1, max(1, 8192 // tokens)), tokens, int(rng.choice([0, 0, 100, 2000])))


def _decode(rng: Random, b: Builder) -> tuple[str, Symbols]:
    context = _size(rng, 16, 16384)
    return _attend(rng, b, _size(rng, 1, max(2, 200_000 // context)), 1, context)


def _pages(rng: Random, b: Builder) -> tuple[str, Symbols]:
    (heads, kv), pieces, page = _heads(rng), _size(rng, 1, 64), 16
    new = np.where(rng.random(pieces) < 0.7, 1, rng.integers(1, 300, pieces))
    starts = rng.integers(0, 2000, pieces)
    tokens, held = int(new.sum()), -(-(starts + new) // page)
    most = int(held.max())
    blocks = int(held.sum())
    cache = [_place(b, name, blocks, kv, page, 128, role="state") for name in ("k", "v")]
    table = np.zeros((pieces, most), dtype=np.int64)
    order, at = rng.permutation(blocks), 0
    for piece, count in enumerate(held):
        table[piece, :count], at = order[at : at + count], at + count
    q, out = (_place(b, name, tokens, heads * 128) for name in ("q", "out"))
    given = paged.Pages(
        slots=_place(b, "slots", tokens, type=Type.I64), rows=_place(b, "rows", pieces + 1, type=Type.I32),
        starts=_place(b, "starts", pieces, type=Type.I32),
        blocks=_place(b, "blocks", pieces, most, type=Type.I32),
    )  # fmt: skip
    with b.kernel("paged", "paged"):
        paged.attention(b, q, (cache[0], cache[1]), out, given, 0.1)
    ends = np.cumsum([0, *new])
    symbols = {"piece_row": ends, "piece_start": starts, "block": table.ravel()}
    return f"{pieces} pieces of {tokens} rows, {heads}/{kv} heads", symbols


def _offsets(rng: Random, pairs: int, count: int) -> tuple[str, ArrayLike]:
    """Where each expert's rows begin: balanced, by a power law, or on a few experts."""
    law = str(rng.choice(["balanced", "power law", "few"]))
    weight = np.ones(count)
    if law == "power law":
        weight = rng.permutation(np.arange(1, count + 1.0) ** -1.2)
    elif law == "few":
        weight[rng.permutation(count)[max(1, count // 8) :]] = 0
    share = rng.multinomial(pairs, weight / weight.sum()) if law != "balanced" else None
    ends = np.arange(count + 1) * pairs // count if share is None else np.cumsum([0, *share])
    return law, ends


def _experts(rng: Random, b: Builder) -> tuple[str, Symbols]:
    count, top = int(rng.choice([8, 32, 64, 128])), int(rng.choice([1, 2, 4, 8]))
    tokens, hidden, inner = _size(rng, 1, 2048), _size(rng, 256, 2048, 64), _size(rng, 128, 1024, 64)
    pairs = tokens * top
    x, logits = _place(b, "x", tokens, hidden), _place(b, "logits", tokens, count)
    share, chosen = _place(b, "share", tokens, top), _place(b, "expert", tokens, top, type=Type.I32)
    token, place = (_place(b, name, pairs, type=Type.I32, role="scratch") for name in ("token", "place"))
    table, offset = _place(b, "table", pairs, type=Type.I32), _place(b, "offset", count + 1, type=Type.I32)
    up = _place(b, "up", count, 2 * inner, hidden, role="weight")
    down = _place(b, "down", count, hidden, inner, role="weight")
    act, made = _place(b, "act", pairs, inner), _place(b, "made", pairs, hidden)
    with b.kernel("choose", "choose"):
        experts.choose(b, logits, share, chosen, top=top, renormalise=True)
    if (count + 1) * 4 + pairs * 16 + 4096 < b.ppu.sram_bytes:
        with b.kernel("dispatch", "dispatch"):
            experts.dispatch(b, chosen, table, token, place, offset, experts=count)
    with b.kernel("experts_up", "up"):
        experts.grouped(b, x, up, act, offset, token=token, gate=True)
    with b.kernel("experts_down", "down"):
        experts.grouped(b, act, down, made, offset)
    with b.kernel("combine", "combine"):
        experts.combine(b, made, share, place, _place(b, "out", tokens, hidden), top=top)
    law, ends = _offsets(rng, pairs, count)
    return f"{tokens} tokens, {top} of {count} experts {hidden}×{inner}, {law}", {"expert_offset": ends}


def _chain(rng: Random, b: Builder) -> tuple[str, Symbols]:
    """A feed-forward layer kernel by kernel: what one leaves in the L2 the next may find."""
    tokens, hidden, inner = _size(rng, 1, 2048), _size(rng, 256, 4096, 32), _size(rng, 256, 4096, 32)
    x, normed = _place(b, "x", tokens, hidden), _place(b, "normed", tokens, hidden)
    both = [_place(b, name, tokens, inner) for name in ("gate", "up", "act")]
    weights = [_place(b, name, inner, hidden, role="weight") for name in ("wg", "wu")]
    down, out = _place(b, "wd", hidden, inner, role="weight"), _place(b, "out", tokens, hidden)
    with b.kernel("rmsnorm", "norm"):
        rows.rmsnorm(b, rows.Rows.of(x), _place(b, "gain", hidden), rows.Rows.of(normed), 1e-6)
    for weight, product in zip(weights, both, strict=False):
        with b.kernel("matmul", weight.name):
            matmul(b, normed, weight, product)
    with b.kernel("swiglu", "swiglu"):
        rows.swiglu(b, rows.Rows.of(both[0]), rows.Rows.of(both[1]), both[2])
    with b.kernel("matmul", "down"):
        matmul(b, both[2], down, out, residual=x)
    return f"feed-forward {tokens}, {hidden}×{inner}", {}


KINDS: Mapping[str, Callable[[Random, Builder], tuple[str, Symbols]]] = {
    "product": _product,
    "rows": _rowwise,
    "prefill": _prefill,
    "decode": _decode,
    "paged": _pages,
    "experts": _experts,
    "chain": _chain,
}


def _model(rng: Random, ppu: Ppu) -> tuple[str, Program, Symbols]:
    """A small dense or MoE Qwen3 of one to three layers, alone or cut over chips."""
    moe = bool(rng.random() < 0.4)
    kv = int(rng.choice([2, 4]))
    chips = int(rng.choice([1, 1, 2]))
    config = {
        "model_type": "qwen3_moe" if moe else "qwen3", "hidden_size": _size(rng, 256, 2048, 128),
        "intermediate_size": _size(rng, 256, 4096, 128), "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": kv * int(rng.choice([2, 4])), "num_key_value_heads": kv, "head_dim": 128,
        "vocab_size": _size(rng, 1024, 32768, 256), "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "max_position_embeddings": 8192, "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    tokens, context = (1, _size(rng, 16, 2048)) if rng.random() < 0.5 else (_size(rng, 8, 512), 0)
    symbols: dict[str, ArrayLike] = {"position": [context]}
    if moe:
        count, top = int(rng.choice([16, 32])), int(rng.choice([2, 4]))
        config |= {"num_experts": count, "num_experts_per_tok": top, "norm_topk_prob": True}
        config |= {"moe_intermediate_size": _size(rng, 128, 512, 64), "decoder_sparse_step": 1}
        config |= {"mlp_only_layers": []}
        symbols["expert_offset"] = _offsets(rng, tokens * top, count)[1]
    program = compile_step(config, ppu, tokens=tokens, context=context, chips=chips).program
    kind = "MoE" if moe else "dense"
    layers = config["num_hidden_layers"]
    return f"{kind}, {layers} layers, {tokens} behind {context}, {chips} chips", program, symbols
