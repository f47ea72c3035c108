"""The compiled timing simulator against a plain one that interprets instructions, tick for tick.

And what the L2 holds: a tile that one core fetches is there for another no earlier than it arrives.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
import pytest

from tongyun.chip.ppu import asm
from tongyun.chip.ppu.capture import compile_step
from tongyun.chip.ppu.emit import attention
from tongyun.chip.ppu.emit.builder import Builder
from tongyun.chip.ppu.emit.mapper import Tiling
from tongyun.chip.ppu.emit.matmul import matmul
from tongyun.chip.ppu.functional import _alu
from tongyun.chip.ppu.isa import At, Engine, Form, Instruction, Type
from tongyun.chip.ppu.program import Program
from tongyun.chip.ppu.rates import TICKS, cycle_ticks
from tongyun.chip.ppu.timing import simulate
from tongyun.specs import Ppu, find_model, find_ppu

PPU = dataclasses.replace(find_ppu("zhenwu-810e").at(), cores=5)
LINE = 64
MOVES = {"LOAD", "GATHER", "STORE", "SCATTER"}


class Core:
    """One core's control, queues, tokens and registers."""

    def __init__(self, number: int, cores: int) -> None:
        self.number, self.at, self.now = number, 0, 0
        self.registers = [0, number, cores] + [0] * 61
        self.free: dict[Engine, int] = defaultdict(int)
        self.done: dict[Engine, int] = defaultdict(int)
        self.tokens: dict[int, deque[int]] = defaultdict(deque)
        self.loops: list[list[int]] = []
        self.ask: int | None = None

    def level(self, when: int) -> None:
        self.at, self.now = self.at + 1, when
        self.free, self.done = defaultdict(lambda: when), defaultdict(lambda: when)

    @property
    def latest(self) -> int:
        return max([self.now, *self.done.values()])


class Plain:
    """Times of one program, as the documentation says them; `order` are the cores in the order of service."""

    def __init__(
        self, program: Program, ppu: Ppu, symbols: Mapping[str, Sequence[int]], order: Sequence[int] = ()
    ) -> None:
        self.order, self.served = list(order), list[int]()
        self.code, self.ppu = asm.disassemble(program.words), ppu
        self.names, self.symbols = program.symbols, symbols
        self.cycle = cycle_ticks(ppu)
        self.l2_free = self.hbm_free = self.filled = 0
        self.held: dict[int, tuple[int, int, int]] = {}
        self.first: dict[str, int] = {}
        self.cores = [Core(number, ppu.cores) for number in range(ppu.cores)]
        self.ticks: list[int] = []

    def run(self) -> list[int]:
        begun = 0
        while True:
            for core in self.cores:
                self.go(core)
            while waiting := [core for core in self.cores if core.ask is not None]:
                core = min(waiting, key=lambda core: core.ask)  # type: ignore[arg-type, return-value]
                if self.order:
                    core = self.cores[self.order[len(self.served)]]
                self.served.append(core.number)
                self.serve(core)
                self.go(core)
            latest = max(core.latest for core in self.cores)
            self.ticks.append(latest - begun)
            if self.code[self.cores[0].at].op == "HALT":
                return self.ticks[1:]
            begun, when = latest, latest + int(self.ppu.barrier_s * TICKS)
            self.first = {}
            self.l2_free, self.hbm_free = max(self.l2_free, when), max(self.hbm_free, when)
            for core in self.cores:
                core.level(when)

    def go(self, core: Core) -> None:
        core.ask = None
        while True:
            here = self.code[core.at]
            core.now += self.cycle
            ready = max([core.now, *(core.tokens[bit].popleft() for bit in bits(here.wait))])
            engine = here.opcode.engine
            if here.op in {"BARRIER", "HALT"}:
                return
            if here.op in MOVES:
                core.ask = max(ready, core.free[engine])
                return
            if engine is Engine.CONTROL:
                self.control(core, here, ready)
                continue
            start = max(ready, core.free[engine])
            ticks, latency = self.work(core, here)
            self.end(core, here, start + ticks, start + ticks + latency)

    def end(self, core: Core, here: Instruction, free: int, done: int) -> None:
        engine = here.opcode.engine
        core.free[engine], core.done[engine] = free, max(core.done[engine], done)
        for bit in bits(here.signal):
            core.tokens[bit].append(core.done[engine])
        core.at += 1

    def control(self, core: Core, here: Instruction, ready: int) -> None:
        r = core.registers
        core.at += 1
        if here.op == "ALU":
            a, b = r[here.plain("ra")], r[here.plain("rb")] + here.plain("imm")
            r[here.plain("rd")] = _alu(here.fn, a, b)
        elif here.op == "LDS":
            core.now = ready + 24 * self.cycle
            name, at = self.names[here.plain("symbol") - 1], here.operands.get("sram", At())
            assert isinstance(at, At)
            table = self.symbols[name]
            entry = (at.imm - self.first.setdefault(name, at.imm)) // 4 + r[at.reg] // 4
            r[here.plain("rd")] = int(table[min(entry, len(table) - 1)])
        elif here.op == "LOOP":
            times = number(core, here, "times")
            core.loops += [[core.at, times]] if times else []
            core.at += 0 if times else here.plain("length")
        else:
            for step in here.operands.values():
                assert isinstance(step, At)
                r[step.reg] += step.imm
            core.loops[-1][1] -= 1
            core.at = core.loops[-1][0] if core.loops[-1][1] else core.at
            core.loops = core.loops if core.loops[-1][1] else core.loops[:-1]
        r[0] = 0

    def work(self, core: Core, here: Instruction) -> tuple[int, int]:
        """Ticks and latency of a product, a pass over elements, a collective or nothing."""
        p, tensor, vector = self.ppu, self.ppu.tensor_latency_s, self.ppu.vector_latency_s
        if here.op in {"MMA", "ATTN"}:
            m, n, k = (
                number(core, here, name)
                for name in (("m", "n", "k") if here.op == "MMA" else ("m", "n", "width"))
            )
            if not m * n * k:
                return 0, 0
            if here.op == "ATTN" and p.attention_rows:
                m, n = -(-m // p.attention_rows) * p.attention_rows, here.plain("n")
            flops = 2 * p.tile_m * p.tile_n * p.tile_k
            each = ceil(flops / p.tensor_flops["bf16"] * self.cycle)  # type: ignore[index]
            tiles = -(-m // p.tile_m) * -(-n // p.tile_n) * -(-k // p.tile_k)
            if here.op == "MMA":
                return tiles * each, int(tensor * TICKS)
            tiles += -(-m // p.tile_m) * -(-k // p.tile_n) * -(-n // p.tile_k)
            softmax = int(m * n * (self.cycle / p.softmax_lanes))
            less, more = sorted([tiles * each, softmax])
            shown = int(less * (1 - p.softmax_hidden))
            return more + shown, int(tensor * TICKS + vector * TICKS)
        if here.opcode.engine is not Engine.VECTOR or here.op.startswith("SYNC"):
            return 0, 0
        rows, cols, plain, special = passes(core, here)
        ticks = int(
            rows * cols * (plain * (self.cycle / p.vector_lanes) + special * (self.cycle / p.special_lanes))
        )
        return ticks, int(vector * TICKS) if ticks else 0

    def serve(self, core: Core) -> None:
        here, p, start = self.code[core.at], self.ppu, core.ask
        assert start is not None
        rows, cols = number(core, here, "rows"), number(core, here, "cols")
        width, stride = cols * here.types[0].bytes, here.plain("hbm_stride")
        if not rows * cols:
            return self.end(core, here, start, start)
        lines = rows * -(-width // LINE)
        if stride == 0:
            lines = -(-width // LINE)
        elif stride == width and here.op != "GATHER":
            lines = -(-rows * width // LINE)
        fetched, address = lines * LINE, number(core, here, "hbm")
        at, size, arrives = self.held.get(address, (0, 0, 0))
        port = start + int(rows * width * (self.cycle / p.port_bytes))
        self.l2_free = max(self.l2_free, start) + int(fetched * (self.cycle / p.l2_rate))
        end = max(port, self.l2_free) + int(p.l2_latency_s * TICKS)
        if here.opcode.engine is Engine.LOAD and size >= fetched and self.filled - at <= p.l2_bytes:
            end = max(end, arrives)
        else:
            self.filled += fetched
            self.hbm_free = max(self.hbm_free, start) + int(fetched * (TICKS / p.hbm_bytes_per_s))
            arrives = self.hbm_free + int(p.hbm_latency_s * TICKS)
            end = max(end, arrives)
        self.held[address] = self.filled, fetched, arrives
        return self.end(core, here, port, end)


def bits(mask: int) -> list[int]:
    return [bit for bit in range(16) if mask >> bit & 1]


def number(core: Core, here: Instruction, name: str) -> int:
    value = here.operands.get(name, 0)
    if not isinstance(value, At):
        return int(value)
    if here.opcode.operands[name] is Form.COUNT:
        return min(max(core.registers[value.reg], 0), value.imm) if value.reg else value.imm
    return value.imm + core.registers[value.reg]


def passes(core: Core, here: Instruction) -> tuple[int, int, int, int]:  # noqa: PLR0911 - one answer an opcode
    """Rows, columns, passes on plain and on special lanes."""

    def of(*names: str) -> list[int]:
        return [number(core, here, name) for name in names]

    if here.op == "VEC":
        return *of("rows", "cols"), *((0, 1) if here.fn >= 8 else (1, 0))  # type: ignore[return-value]
    if here.op == "RED":
        return *of("rows", "cols"), *((3, 1) if here.fn == 3 else (1, 0))  # type: ignore[return-value]
    if here.op == "TOPK":
        return *of("rows", "cols", "top"), 0  # type: ignore[return-value]
    if here.op == "SORT":
        return 1, *of("count"), 16, 0  # type: ignore[return-value]
    if here.op == "DRAIN":
        return *of("m", "n"), 1 + here.fn.bit_count(), here.fn >> 1 & 1  # type: ignore[return-value]
    if here.op == "ROPE":
        rows, heads, width = of("rows", "heads", "width")
        return rows, heads * width, 3, 0
    names = ("rows", "cols") if here.op == "RMSNORM" else ("m", "width")
    return *of(*names), 1 if here.op in {"ATTN_END", "ATTN_INIT"} else 3, 0  # type: ignore[return-value]


def check(program: Program, ppu: Ppu, symbols: Mapping[str, Any] | None = None) -> None:
    want = Plain(program, ppu, symbols or {}).run()
    assert simulate(program, ppu, symbols).ticks.tolist() == want


@pytest.mark.parametrize(("m", "n", "k"), [(64, 128, 256), (200, 100, 60), (33, 77, 130)])
def test_a_product_takes_the_ticks_of_the_plain_simulator(m: int, n: int, k: int) -> None:
    for cores in (1, 4, 7):
        b = Builder(dataclasses.replace(PPU, cores=cores))
        a = b.layout.place("a", (m, k), Type.BF16, "input")
        w = b.layout.place("w", (n, k), Type.BF16, "weight")
        with b.kernel("matmul", "product"):
            matmul(
                b, a, w, b.layout.place("out", (m, n), Type.BF16, "output"), tiling=Tiling(m=16, n=32, k=64)
            )
        check(b.program(), b.ppu)


@pytest.mark.parametrize("model", ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-30B-A3B"])
@pytest.mark.parametrize(("tokens", "context"), [(40, 0), (1, 300)])
def test_a_step_takes_the_ticks_of_the_plain_simulator(model: str, tokens: int, context: int) -> None:
    config, _ = find_model(model)
    small = {
        "hidden_size": 256, "intermediate_size": 384, "vocab_size": 500, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64,
    }  # fmt: skip
    if "num_experts" in config:
        small |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    lowered = compile_step({**config, **small}, PPU, tokens=tokens, context=context, layers=2)
    pairs = 2 * tokens
    offsets = np.sort(np.random.default_rng(tokens).integers(0, pairs + 1, 7))
    check(lowered.program, PPU, {"position": [context], "expert_offset": [0, *offsets.tolist(), pairs]})


@pytest.mark.parametrize("field", ["hbm_bytes_per_s", "l2_rate", "clock_hz", "vector_lanes"])
def test_another_chip_serves_in_the_order_of_the_one_compiled_for(field: str) -> None:
    b = Builder(PPU)
    shapes = {"a": (200, 100), "w": (60, 100), "out": (200, 60)}
    a, w, out = (b.layout.place(name, shape, Type.BF16, "input") for name, shape in shapes.items())
    with b.kernel("matmul", "one"):
        matmul(b, a, w, out, tiling=Tiling(m=16, n=32, k=64))
    with b.kernel("matmul", "two"):
        matmul(b, a, w, out, tiling=Tiling(m=32, n=16, k=32))
    program, other = b.program(), dataclasses.replace(PPU, **{field: getattr(PPU, field) * 3})
    first = Plain(program, PPU, {})
    first.run()
    follow = Plain(program, other, {}, first.served)
    assert simulate(program, other).ticks.tolist() == follow.run()
    assert first.served == follow.served
    as_they_come = dataclasses.replace(program, order=())
    assert simulate(as_they_come, other).ticks.tolist() == Plain(program, other, {}).run()


def test_a_tile_on_its_way_is_no_earlier_for_a_second_core() -> None:
    """Two cores ask for one tile at once: HBM is read once, and both wait for it."""
    times = []
    for cores in (1, 2):
        b = Builder(dataclasses.replace(PPU, cores=cores))
        x = b.layout.place("x", (16, 1024), Type.BF16, "input")
        with b.kernel("one", "one"):
            b.load(x.type, At(x.at), b.sram(x.bytes), rows=16, cols=1024, stride=2048, sram_stride=2048)
        times.append(simulate(b.program(), b.ppu))
    assert times[0].total("hbm_bytes") == times[1].total("hbm_bytes") == 16 * 2048
    port = 16 * 2048 / PPU.port_bytes
    for each in times:
        assert each.cycles[0] >= PPU.hbm_latency_s * PPU.clock_hz + port * PPU.port_bytes / PPU.l2_rate
    assert times[1].cycles[0] >= times[0].cycles[0]


@pytest.mark.parametrize(("tokens", "context", "many"), [(40, 30, 1), (1, 900, 4), (300, 0, 3)])
def test_attention_as_a_kernel_takes_the_ticks_of_the_plain_simulator(
    tokens: int, context: int, many: int
) -> None:
    program, ppu = attended(dataclasses.replace(find_ppu("h100").at(), cores=7), tokens, context, many)
    check(program, ppu, {"position": [context]})


def attended(ppu: Ppu, tokens: int, context: int, many: int) -> tuple[Program, Ppu]:
    b, room = Builder(ppu), tokens + context
    q, out = (b.layout.place(name, (2 * tokens, 256), Type.BF16, "input") for name in ("q", "out"))
    k, v = (b.layout.place(name, (2, 2, room, 64), Type.BF16, "input") for name in ("k", "v"))
    shape = attention.Attention(
        sequences=2,
        tokens=tokens,
        heads=4,
        kv_heads=2,
        width=64,
        room=room,
        scale=0.1,
        query_stride=512,
        alone=True,
    )
    position = b.layout.place("position", (1,), Type.I32, "input")
    attention.emit(b, shape, q, (k, v), out, position, "attention", many=many)
    return b.program(), ppu


def test_few_rows_cost_a_whole_tile_and_keys_are_cut_over_idle_cores() -> None:
    h100 = find_ppu("h100").at()
    one = attention.Attention(
        sequences=1,
        tokens=1,
        heads=8,
        kv_heads=1,
        width=128,
        room=65536,
        scale=0.1,
        query_stride=2048,
        alone=True,
    )
    assert attention.parts(one, h100) > 64
    assert attention.parts(dataclasses.replace(one, room=512), h100) == 1
    assert attention.parts(dataclasses.replace(one, sequences=264), h100) == 1
    took = [simulate(*attended(h100, 1, 4000, many), {"position": [4000]}).total_cycles for many in (1, 8)]
    assert took[1] < took[0]
    rows = dataclasses.replace(h100, attention_rows=2 * h100.attention_rows)
    program, _ = attended(h100, 1, 4000, 1)
    assert simulate(program, rows, {"position": [4000]}).total_cycles > took[0]
