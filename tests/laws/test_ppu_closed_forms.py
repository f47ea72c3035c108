"""At full depth: FLOPs, bytes and parameters counted in the instructions are the model's closed forms.

Counted are the kernels that run, each times how often it stands for a layer; the forms know the model's
sizes, how many chips share it and how large a tile is, and read no instruction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tongyun.chip.ppu.capture import compile_step
from tongyun.chip.ppu.emit.builder import Builder
from tongyun.chip.ppu.emit.experts import _tile
from tongyun.chip.ppu.fields import OPS, fields
from tongyun.chip.ppu.isa import Type
from tongyun.chip.ppu.program import Program
from tongyun.chip.ppu.timing import COUNTERS, simulate_repeated
from tongyun.chip.ppu.traffic import fetched, pieces
from tongyun.specs import find_model, find_ppu

PPU = find_ppu("zhenwu-810e").at()
TOKENS = 300
QUICK = [("Qwen/Qwen3-0.6B", 1), ("Qwen/Qwen3-30B-A3B", 1)]
MORE = [("Qwen/Qwen3-1.7B", 1), ("Qwen/Qwen3-8B", 1), ("Qwen/Qwen3-32B", 1), ("Qwen/Qwen3-235B-A22B", 8)]


@dataclass(frozen=True)
class Form:
    """One chip's share of a Qwen3 for a prompt of `TOKENS`."""

    config: Mapping[str, Any]
    chips: int

    def __getattr__(self, name: str) -> int:
        return int(self.config[name])

    @property
    def heads(self) -> int:
        return self.num_attention_heads // self.chips

    @property
    def kv(self) -> int:
        return max(1, self.num_key_value_heads // self.chips)

    @property
    def experts(self) -> int:
        return int(self.config.get("num_experts", 0))

    @property
    def pairs(self) -> int:
        return TOKENS * self.num_experts_per_tok

    @property
    def offsets(self) -> np.ndarray[Any, Any]:
        """Skewed and uneven: the first experts have most rows, some have none."""
        edges = np.linspace(0, 1, self.experts + 1) ** 0.4
        return np.floor(edges * self.pairs).astype(np.int64)

    @property
    def flops(self) -> int:
        hidden, width = self.hidden_size, self.head_dim
        layer = hidden * width * (2 * self.heads + 2 * self.kv)
        if self.experts:
            inner = self.moe_intermediate_size // self.chips
            layer += self.num_experts_per_tok * 3 * hidden * inner + hidden * self.experts
        else:
            layer += 3 * hidden * self.intermediate_size // self.chips
        seen = TOKENS * (TOKENS + 1) // 2
        once = 2 * TOKENS * hidden * self.vocab_size // self.chips
        return self.num_hidden_layers * (2 * TOKENS * layer + 4 * self.heads * width * seen) + once

    @property
    def parameters(self) -> int:
        hidden, width = self.hidden_size, self.head_dim
        layer = hidden * width * (2 * self.heads + 2 * self.kv) + 2 * hidden + 2 * width
        if self.experts:
            layer += self.experts * (3 * hidden * self.moe_intermediate_size // self.chips + hidden)
        else:
            layer += 3 * hidden * self.intermediate_size // self.chips
        head = hidden * self.vocab_size // self.chips
        tied = self.config["tie_word_embeddings"] and self.chips == 1
        return self.num_hidden_layers * layer + hidden * self.vocab_size + (0 if tied else head) + hidden

    # Bytes of the kernels whose traffic numbers in memory decide.

    def embed(self) -> int:
        """A line for each 64-bit id, a row in and a row out."""
        return TOKENS * (64 + 4 * self.hidden_size)

    def attention(self) -> int:
        """Queries and results once; for each tile of queries the keys and values up to its last one."""
        tile = min(TOKENS, 128 * self.kv // self.heads)
        while self.kv * -(-TOKENS // tile) < PPU.cores and tile > 1:
            tile = -(-tile // 2)
        keys = int(np.minimum(np.arange(tile, TOKENS + tile, tile), TOKENS).sum())
        near = 2 * TOKENS * self.heads + 2 * keys * self.kv
        return near * self.head_dim * 2 + PPU.cores * 64

    def grouped(self, n: int, k: int, *, up: bool) -> int:
        """For each expert, tile of its rows and tile of columns: rows in, weights in, results out."""
        products = 2 if up else 1
        t_m, t_n, t_k = _tile(Builder(PPU), -(-self.pairs // self.experts), n, k, self.experts, products)
        total = PPU.cores * fetched(1, 4 * (self.experts + 1), 0)
        steps = [2 * step for step in pieces(k, t_k)]
        for rows in np.diff(self.offsets):
            for m in pieces(int(rows), t_m):
                for cols in pieces(n, t_n):
                    total += fetched(1, 4 * m, 0) * up + fetched(m, 2 * cols, 2 * n)
                    for wide in steps:
                        total += m * fetched(1, wide, 0) if up else fetched(m, wide, 2 * k)
                        total += products * fetched(cols, wide, 2 * k)
        return total

    def dispatch(self) -> int:
        """Experts in, each pair's token by a line, and offsets, places and tokens out."""
        return 3 * fetched(1, 4 * self.pairs, 0) + 64 * self.pairs + fetched(1, 4 * (self.experts + 1), 0)

    def combine(self, moved: int) -> int:
        """Places, shares and results of each token's experts; the sum out, and a residual in where fused."""
        top, wide = self.num_experts_per_tok, 2 * self.hidden_size
        each = 2 * top * wide + 8 * wide + 8 * top * 8
        size = max(1, min((PPU.sram_bytes - 8192) // each, -(-TOKENS // PPU.cores), 64))
        total = 0
        for count in pieces(TOKENS, size):
            total += fetched(1, 4 * count * top, 0) + fetched(1, 2 * count * top, 0)
            total += count * (top + 1 + moved) * wide
        return total

    def by_kind(self) -> dict[str, int]:
        found = {"embed": self.embed(), "attention": self.attention(), "all_reduce": 0}
        if self.experts:
            inner = self.moe_intermediate_size // self.chips
            found["experts_up"] = self.grouped(inner, self.hidden_size, up=True)
            found["experts_down"] = self.grouped(self.hidden_size, inner, up=False)
            found["dispatch"] = self.dispatch()
            found["combine"] = self.combine(self.chips == 1)
        return found


def parameters(program: Program) -> int:
    """Elements of the weights that some LOAD or GATHER points into."""
    head, imm, _ = fields(program.words, PPU)
    inward = np.isin(head[:, 0], [OPS.index("LOAD"), OPS.index("GATHER")])
    weights = sorted((item for item in program.tensors if item.role == "input"), key=lambda item: item.at)
    starts, ends = (np.array(each) for each in zip(*((t.at, t.at + t.bytes) for t in weights), strict=True))
    at = np.unique(imm[inward, 0])
    place = np.searchsorted(starts, at, side="right") - 1
    touched = np.unique(place[(place >= 0) & (at < ends[place])])
    return sum(weights[i].bytes // 2 for i in touched if weights[i].type is Type.BF16)


@pytest.mark.parametrize(
    ("model", "chips"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE)]
)
def test_counts_at_full_depth_are_the_closed_forms(model: str, chips: int) -> None:
    config, _ = find_model(model)
    form = Form(config, chips)
    program = compile_step(config, PPU, tokens=TOKENS, chips=chips).program
    symbols = {"position": [0], "expert_offset": form.offsets if form.experts else [0]}
    run = simulate_repeated(program, PPU, symbols)
    assert run.times.sum() == len(program.kernels)
    assert run.total("flops") == form.flops
    frequencies = form.head_dim // 2
    assert parameters(program) - form.parameters in {0, frequencies}
    counted: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    for kind, bytes_ in zip(run.kinds, run.counters[:, COUNTERS.index("l2_bytes")] * run.times, strict=True):
        counted[kind] += int(bytes_)
    known = form.by_kind()
    for kernel in program.kernels:
        wanted[kernel.kind] += sum(kernel.moves.values()) if kernel.moves else known[kernel.kind]
    assert counted == wanted
    ring = 2 * (chips - 1) * TOKENS * form.hidden_size * 2 // chips
    assert run.total("icn_bytes") == 2 * form.num_hidden_layers * ring
