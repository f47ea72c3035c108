"""Run batches on the simulated chip: its functional simulator computes the tokens.

The model is compiled for the chip, one program for each size of step; a batch is filled up to the next
size. What a step would take on the chip is simulated with the batch's own rows, positions and
blocks. Nothing here is measured but how long the simulators took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.nn import functional

from tongyun.chip.ppu.backend import Backend, Compiled
from tongyun.chip.ppu.energy import energy
from tongyun.chip.ppu.timing import simulate_repeated
from tongyun.cloud.engine.protocol import StepResult
from tongyun.cloud.engine.torch_executor import choose_tokens
from tongyun.cloud.sched.request import Batch, Piece
from tongyun.errors import InputError
from tongyun.model.config import ModelConfig
from tongyun.model.kernels.attention import Layout, lay_out
from tongyun.model.kernels.whole import WholeOps
from tongyun.model.paged import PagedAttend, PagedCache, block_bytes
from tongyun.model.qwen3 import Qwen3
from tongyun.model.weights import load_model, random_model
from tongyun.specs import PpuSpec, find_ppu

LEAST = 16
"""Tokens of the smallest program, and a multiple in others: fewer take the tensor unit as long."""


@dataclass(frozen=True, kw_only=True)
class PpuOptions:
    """How a model is put on a simulated chip."""

    chip: str = "zhenwu-810e"
    sequences: int = 64
    step_tokens: int = 512
    context_tokens: int | None = None
    """Most tokens of one sequence; None is what the model was made for."""
    kv_bytes: int | None = None
    """Memory of the KV cache; None is room for every sequence at its longest."""
    block_tokens: int = 16


def open_ppu_executor(directory: Path, options: PpuOptions) -> PpuExecutor:
    """Load the model of a directory, in bf16, for a simulated chip."""
    return PpuExecutor(load_for_chip(directory), find_ppu(options.chip), options)


def load_for_chip(directory: Path) -> Qwen3:
    """A model as the compiler takes it: whole operators, bf16."""
    return load_model(directory, ops=WholeOps(), activation_dtype=torch.bfloat16)


def random_for_chip(config: ModelConfig) -> Qwen3:
    """The same with random weights."""
    model = random_model(config, ops=WholeOps())
    model.activation_dtype = torch.bfloat16
    return model


class PpuExecutor:
    """One model and its cache, one step at a time, on a chip that is software."""

    def __init__(self, model: Qwen3, spec: PpuSpec, options: PpuOptions) -> None:
        for parameter in model.parameters():
            # The chip multiplies what is stored; another type would be converted in every step.
            parameter.data = parameter.data.to(model.activation_dtype)
        self.model, self.spec, self.options = model, spec, options
        config = model.config
        longest = min(options.context_tokens or config.max_positions, config.max_positions)
        self.table = -(-longest // options.block_tokens)
        each = block_bytes(config, options.block_tokens, model.activation_dtype)
        asked = None if options.kv_bytes is None else options.kv_bytes // each
        self.blocks = self.table * options.sequences if asked is None else asked
        if self.blocks < 1:
            raise InputError(f"no room for a KV cache: one block takes {each} bytes")
        # Rows that fill a program up write their keys and values to a block that is nobody's.
        self.cache = PagedCache(
            config, blocks=self.blocks + 1, block_tokens=options.block_tokens, dtype=model.activation_dtype
        )
        self.backend = Backend(ppu=spec.at(), cores=1)
        self._programs: dict[int, Callable[..., torch.Tensor]] = {}
        self._compiled: dict[int, Compiled] = {}

    def execute(self, batch: Batch) -> StepResult:
        """Run one step. `duration_s` is the simulators' own time, `chip_s` and `joules` are simulated."""
        begun = time.perf_counter()
        pieces = batch.pieces
        if not pieces:
            return StepResult(tokens={}, duration_s=0.0)
        with torch.no_grad():
            layout, tokens_T, last_N = self._filled(pieces)
            size = len(tokens_T)
            logits_NV = self._program(size)(tokens_T, last_N, layout)
        program = self._compiled.setdefault(size, self.backend.compiled[-1])
        chip_s, joules = self._price(program, layout)
        rows = [row for row, piece in enumerate(pieces) if piece.samples]
        tokens, scores = ({}, None) if not rows else choose_tokens(
            logits_NV[rows], [pieces[row] for row in rows], self.model.ops.argmax
        )  # fmt: skip
        return StepResult(
            tokens=tokens, scores=scores, duration_s=time.perf_counter() - begun, chip_s=chip_s, joules=joules
        )

    @property
    def flops(self) -> int:
        """FLOPs of products that the chip's instructions did, rows that only fill a program up included."""
        runs = (counts for program in self.backend.compiled for counts in program.runs)
        return sum(sum(counts.flops.values()) for counts in runs)

    def _filled(self, pieces: Sequence[Piece]) -> tuple[Layout, torch.Tensor, torch.Tensor]:
        """The step's index tensors, tokens and last rows, filled up to the size of a program."""
        plain = lay_out([(p.start, p.length, p.blocks) for p in pieces], self.options.block_tokens)
        fed = [token for piece in pieces for token in piece.tokens]
        count = self._size(len(fed))
        rows, wanted = count - len(fed), min(count, self.options.sequences) - len(pieces)
        spare = self.blocks * self.options.block_tokens + torch.arange(rows) % self.options.block_tokens
        layout = Layout(
            positions_T=functional.pad(plain.positions_T, (0, rows)),
            slots_T=torch.cat([plain.slots_T, spare]),
            rows_P1=functional.pad(plain.rows_P1, (0, wanted), value=len(fed)),
            starts_P=functional.pad(plain.starts_P, (0, wanted)),
            blocks_PB=functional.pad(
                plain.blocks_PB, (0, self.table - plain.blocks_PB.shape[1], 0, wanted)
            ),
            lengths=plain.lengths, starts=plain.starts, block_tokens=plain.block_tokens,
        )  # fmt: skip
        # Filled up with the last token: it asks for no expert that the step does not need anyway.
        tokens_T = torch.tensor(fed + [fed[-1]] * rows)
        last_N = functional.pad(plain.rows_P1[1:].long() - 1, (0, wanted))
        return layout, tokens_T, last_N

    def _size(self, tokens: int) -> int:
        """Tokens of the program that takes so many: 16, 64, 256 … up to the longest step."""
        size, most = LEAST, -(-self.options.step_tokens // LEAST) * LEAST
        while size < tokens:
            size *= 4
        return max(min(size, most), tokens)

    def _program(self, size: int) -> Callable[..., torch.Tensor]:
        """The step of this size; traced and compiled when it is first called."""
        if size not in self._programs:
            model, cache = self.model, self.cache

            def step(tokens_T: torch.Tensor, last_N: torch.Tensor, layout: Layout) -> torch.Tensor:
                hidden_TD = model(tokens_T, layout.positions_T, PagedAttend(cache, layout, model.ops))
                return model.logits(hidden_TD[last_N])

            # PyTorch limits how often one function is compiled anew, and counts by its code.
            code = step.__code__.replace(co_name=f"step_of_{size}")
            own = FunctionType(code, step.__globals__, code.co_name, None, step.__closure__)
            call = torch.compile(own, backend=self.backend, fullgraph=True, dynamic=False)
            self._programs[size] = call
        return self._programs[size]

    def _price(self, program: Compiled, layout: Layout) -> tuple[float, float]:
        """Seconds and joules of the step on the chip, both simulated; experts' rows counted as balanced."""
        symbols: dict[str, ArrayLike] = {
            "slot": layout.slots_T.numpy(),
            "piece_row": layout.rows_P1.numpy(),
            "piece_start": layout.starts_P.numpy(),
            "block": layout.blocks_PB.numpy().ravel(),
        }
        symbols |= _balanced(self.model.config, len(layout.slots_T))
        timing = simulate_repeated(program.lowered.program, self.spec.at(), symbols)
        spent = energy(timing, self.spec)
        return spent.seconds, spent.total[1]


def _balanced(config: ModelConfig, tokens: int) -> dict[str, ArrayLike]:
    """Where each expert's rows begin if all have as many."""
    if config.experts is None:
        return {}
    pairs, count = tokens * config.experts.per_token, config.experts.count
    return {"expert_offset": np.arange(count + 1) * pairs // count}


def check_ppu(kernels: str | None, kv_dtype: str | None) -> None:
    """InputError for wishes that the chip has no answer to."""
    if kernels is not None:
        raise InputError(f"--kernels {kernels}: the PPU runs its own program; leave the flag out")
    if kv_dtype not in (None, "bf16"):
        raise InputError(f"--kv-dtype {kv_dtype}: on the PPU keys and values are bf16")
