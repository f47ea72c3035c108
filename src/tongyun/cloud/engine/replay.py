"""Decoding steps captured once and replayed: the host launches one thing instead of hundreds.

A step in which every sequence has one token looks the same each time but for numbers:
tokens, positions, slots and blocks, which go to the device in one copy. Steps are captured
for some counts of sequences; one of fewer is filled up with sequences whose keys and values
go to a spare block and whose results nobody reads. What a captured step writes is kept until
the next one of its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tongyun.cloud.sched.request import Piece
from tongyun.model.kernels.attention import Layout
from tongyun.model.kernels.device import DeviceOps
from tongyun.model.kernels.fused import Places, covers
from tongyun.model.paged import PagedAttend, PagedCache
from tongyun.model.qwen3 import Qwen3

USUAL = 64
"""Steps of up to so many sequences are captured when the engine starts, larger ones when they come."""
WARM = 2
"""Runs before a capture: what is compiled or chosen at the first is not to be in it."""
FIELDS = 4
"""Numbers of a sequence beside its blocks: token, position, slot, and the context before it."""


def captured_size(sequences: int) -> int:
    """Sequences in the captured step that serves so many: powers of two, from 8 on multiples of 8."""
    return 1 << (sequences - 1).bit_length() if sequences <= 8 else -(-sequences // 8) * 8


def replays(model: Qwen3, cache: PagedCache) -> bool:
    """Whether decoding steps of this model on this cache can be captured."""
    config = model.config
    query = torch.empty((1, 1, config.head_dim), dtype=model.activation_dtype)
    return (
        cache.spare > 0 and isinstance(model.ops, DeviceOps) and model.ops.fused and covers(query, cache.keys)
    )


@dataclass(frozen=True, kw_only=True)
class _Captured:
    """One captured step, and the logits that it writes."""

    graph: torch.cuda.CUDAGraph
    logits_NV: Tensor


class Replays:
    """The captured steps of one model and one cache."""

    def __init__(self, model: Qwen3, cache: PagedCache) -> None:
        self._model, self._cache = model, cache
        self._captured: dict[int, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        longest = -(-model.config.max_positions // cache.block_tokens)
        self._room(USUAL, min(longest, cache.blocks))

    def prepare(self) -> None:
        """Capture steps of all sizes up to the usual, the largest first: the others fit its memory."""
        for size in sorted({captured_size(n) for n in range(1, USUAL + 1)}, reverse=True):
            self._capture(size)

    def logits(self, pieces: Sequence[Piece]) -> Tensor:
        """Scores of the token after each piece, which has one, (N, V) float32: until the next step."""
        size = captured_size(len(pieces))
        self._tell(pieces, size)
        if size not in self._captured:
            self._capture(size)
        step = self._captured[size]
        step.graph.replay()
        return step.logits_NV[: len(pieces)]

    def _room(self, size: int, blocks: int) -> None:
        """Make room for the numbers of so many sequences; steps captured on smaller ones are let go."""
        self._sequences, self._blocks = size, blocks
        self._captured.clear()
        held = 4 + FIELDS * size + size * blocks
        self._numbers = torch.zeros(held, dtype=torch.int32, device=self._cache.keys.device)
        self._told = torch.zeros(held, dtype=torch.int32, pin_memory=True)
        self._told_numpy = self._told.numpy()

    def _tell(self, pieces: Sequence[Piece], size: int) -> None:
        """Put the numbers of a step on the device."""
        block_tokens = self._cache.block_tokens
        width = max(piece.start for piece in pieces) // block_tokens + 1
        if size > self._sequences:
            self._room(size, self._blocks)
        told, most = self._told_numpy, self._sequences
        fields = told[4 : 4 + FIELDS * most].reshape(FIELDS, most)
        blocks = told[4 + FIELDS * most :][: size * width].reshape(size, width)
        fields[:, :size], blocks[:] = 0, 0
        fields[2, :size] = self._cache.blocks * block_tokens
        told[0] = width
        for row, piece in enumerate(pieces):
            needed = piece.start // block_tokens + 1
            blocks[row, :needed] = piece.blocks[:needed]
            slot = piece.blocks[needed - 1] * block_tokens + piece.start % block_tokens
            fields[:, row] = piece.tokens[0], piece.start, slot, piece.start
        used = 4 + FIELDS * most + size * width
        self._numbers[:used].copy_(self._told[:used], non_blocking=True)

    def _capture(self, size: int) -> None:
        """Capture a step of `size` sequences, of whatever the numbers say now."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode():
            with torch.cuda.stream(stream):
                for _ in range(WARM):
                    self._step(size)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            # Whatever else this process has on the device may go on meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits_NV = self._step(size)
        self._captured[size] = _Captured(graph=graph, logits_NV=logits_NV)

    def _step(self, size: int) -> Tensor:
        """The model on the numbers where they are, all of its `size` rows."""
        most, ops = self._sequences, self._model.ops
        assert isinstance(ops, DeviceOps)
        fields = self._numbers[4 : 4 + FIELDS * most].view(FIELDS, most)[:, :size]
        rows_P1 = self._rows(size)
        layout = Layout(
            positions_T=fields[1],
            slots_T=fields[2],
            rows_P1=rows_P1,
            starts_P=fields[3],
            blocks_PB=self._numbers[4 + FIELDS * most :].view(most, -1),
            lengths=(1,) * size,
            starts=(0,) * size,
            block_tokens=self._cache.block_tokens,
        )
        places = Places(
            slots_T=fields[2],
            rows_P1=rows_P1,
            starts_P=fields[3],
            blocks=layout.blocks_PB,
            width=self._numbers,
            tile_piece=rows_P1[:size],
            tile_row=rows_P1[:size],
        )
        ops.fix(layout, places)
        attend = PagedAttend(self._cache, layout, ops)
        return self._model.logits(self._model(fields[0].long(), layout.positions_T, attend))

    def _rows(self, size: int) -> Tensor:
        return torch.arange(size + 1, dtype=torch.int32, device=self._numbers.device)
