"""Run batches on the real model and measure how long they take.

The executor turns a `Batch` into rows, positions and blocks, runs the model over its
paged cache and samples. It decides nothing about what runs: that is the scheduler's.
How each request samples is registered here by id, because a `Batch` does not say.
"""

from __future__ import annotations

import os
import time
from collections import Counter

import torch

from tongyun.cloud.engine.protocol import StepResult, TokenScore
from tongyun.cloud.sched.request import Batch, Piece
from tongyun.model.kernels.attention import Layout, lay_out
from tongyun.model.paged import PagedAttend, PagedCache
from tongyun.model.qwen3 import Qwen3
from tongyun.model.sampling import Draw, History, SamplingOptions, sample

GREEDY = SamplingOptions(temperature=0.0)


class TorchExecutor:
    """One model, one cache, one step at a time; `device` is where both live."""

    def __init__(self, model: Qwen3, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        self.device = cache.keys.device
        self._histories: dict[str, History] = {}

    def register(self, request_id: str, options: SamplingOptions) -> None:
        """Say how a request samples, before its first step. Unregistered requests are greedy."""
        seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(8), "little")
        self._histories[request_id] = History(options=options, seed=seed)

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a request; unknown ids are fine."""
        self._histories.pop(request_id, None)

    def execute(self, batch: Batch) -> StepResult:
        """Run one step. The duration covers everything from index tensors to chosen tokens."""
        begun = time.perf_counter()
        with torch.inference_mode():
            tokens, scores = self._step(batch.pieces)
        # Reading the tokens back waited for the device; without any, wait for it here.
        if not tokens and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return StepResult(tokens=tokens, duration_s=time.perf_counter() - begun, scores=scores)

    def _step(self, pieces: tuple[Piece, ...]) -> tuple[dict[str, int], dict[str, TokenScore] | None]:
        if not pieces:
            return {}, None
        spans = [(piece.start, len(piece.tokens), piece.blocks) for piece in pieces]
        layout = lay_out(spans, self.cache.block_tokens, self.device)
        tokens_T = torch.tensor([t for piece in pieces for t in piece.tokens], device=self.device)
        attend = PagedAttend(self.cache, layout, self.model.ops)
        hidden_TD = self.model(tokens_T, layout.positions_T, attend)
        sampling = [i for i, piece in enumerate(pieces) if piece.samples]
        if not sampling:
            return {}, None
        logits_NV = self.model.logits(self._last_rows(hidden_TD, layout, sampling))
        return self._sample(logits_NV, [pieces[i] for i in sampling])

    @staticmethod
    def _last_rows(hidden_TD: torch.Tensor, layout: Layout, sampling: list[int]) -> torch.Tensor:
        """Hidden states of the last token of the pieces that sample."""
        if len(sampling) == len(hidden_TD):
            return hidden_TD
        return hidden_TD[layout.rows_P1[1:][sampling].long() - 1]

    def _sample(
        self, logits_NV: torch.Tensor, pieces: list[Piece]
    ) -> tuple[dict[str, int], dict[str, TokenScore] | None]:
        histories = [self._history(piece) for piece in pieces]
        draws = [
            Draw(history=history, position=piece.start + len(piece.tokens))
            for history, piece in zip(histories, pieces, strict=True)
        ]
        drawn = sample(logits_NV, draws)
        for history, token in zip(histories, drawn.tokens, strict=True):
            if history.options.penalised:
                history.produced[token] += 1
        ids = [piece.request.id for piece in pieces]
        scores = {ids[row]: TokenScore(logprob=own, top=top) for row, (own, top) in drawn.scores.items()}
        return dict(zip(ids, drawn.tokens, strict=True)), scores or None

    def _history(self, piece: Piece) -> History:
        history = self._histories.get(piece.request.id)
        if history is None:
            return History(options=GREEDY, seed=0)
        if history.options.penalised and not history.prompt:
            history.prompt = frozenset(piece.request.prompt)
            history.produced = Counter()
        return history
