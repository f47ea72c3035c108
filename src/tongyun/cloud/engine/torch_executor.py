"""Run batches on the real model and measure how long they take.

The executor turns a `Batch` into rows, positions and blocks, runs the model over its
paged cache and samples. It decides nothing about what runs: that is the scheduler's.
Whatever a request needs comes with its piece.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tongyun.cloud.engine.protocol import StepResult, TokenScore
from tongyun.cloud.sched.request import Batch, Piece, Request
from tongyun.errors import InputError, unknown
from tongyun.model.kernels import TorchOps, choose_ops
from tongyun.model.kernels.attention import Layout, lay_out
from tongyun.model.kernels.device import DeviceOps
from tongyun.model.options import SamplingOptions
from tongyun.model.paged import PagedAttend, PagedCache, block_bytes
from tongyun.model.qwen3 import Qwen3
from tongyun.model.sampling import Draw, sample
from tongyun.model.weights import load_model

if TYPE_CHECKING:
    from tongyun.cloud.engine.replay import Replays

GREEDY = SamplingOptions(temperature=0.0)
WARM_PROMPTS = ((0, 8), (0, 16), (0, 32), (0, 64), (0, 128), (0, 256), (0, 512), (64, 448))
"""What an engine on a GPU runs before it is asked for anything, as sequences that decode and tokens of a
prompt beside them: each takes one kernel or another for the first time."""
KV_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ExecutorOptions:
    """How a model is put on a device."""

    device: str = "cpu"
    kernels: str | None = None
    """`torch`, `native` or `auto`; None takes TONGYUN_KERNELS, else auto."""
    threads: int | None = None
    """CPU threads of one operation; None is the physical cores."""
    block_tokens: int = 16
    kv_dtype: str | None = None
    """`f32` or `bf16`; None is f32 on a CPU, so that tokens equal the reference's, and bf16 on a GPU."""
    kv_bytes: int | None = None
    """Memory for the cache; None takes 40 % of what is free, at most 256 full contexts."""
    kv_blocks: int | None = None
    """Blocks of the cache, whatever is free."""
    sharers: int = 1
    """Engines that share what is free, and the threads where none are named."""


def open_executor(directory: Path, options: ExecutorOptions) -> TorchExecutor:
    """Load the model of a directory and give it a cache; `executor.cache` says how many blocks."""
    ops = choose_engine_ops(options)
    return give_cache(load_model(directory, ops=ops, device=options.device), options)


def choose_engine_ops(options: ExecutorOptions) -> TorchOps:
    """Operations on the threads asked for, which are all that the process then uses."""
    threads = options.threads or max(1, default_threads() // options.sharers)
    ops = choose_ops(options.kernels, options.device, threads)
    if options.device == "cpu":
        # PyTorch's idle threads spin for a while after each operation, on the cores that
        # native kernels use next; what is left to PyTorch is too small to share out.
        torch.set_num_threads(1 if ops.name == "native" else threads)
    else:
        # cuDNN plans attention anew for every shape, and contexts have a new one every few steps.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return ops


def give_cache(model: Qwen3, options: ExecutorOptions) -> TorchExecutor:
    """An executor for a model already in memory."""
    name = options.kv_dtype or ("f32" if options.device == "cpu" else "bf16")
    if name not in KV_DTYPES:
        raise InputError(unknown("kv dtype", name, KV_DTYPES))
    dtype, each = KV_DTYPES[name], block_bytes(model.config, options.block_tokens, KV_DTYPES[name])
    most = 256 * -(-model.config.max_positions // options.block_tokens)
    room = options.kv_bytes or int(0.4 * _free_bytes(options.device) / options.sharers)
    blocks = options.kv_blocks or room // each
    if blocks < 1:
        raise InputError(f"no room for a KV cache: one block takes {each} bytes")
    cache = PagedCache(
        model.config,
        blocks=blocks if options.kv_blocks or options.kv_bytes else min(blocks, most),
        block_tokens=options.block_tokens,
        dtype=dtype,
        device=options.device,
        spare=spare_blocks(options.device),
    )
    executor = TorchExecutor(model, cache)
    executor.prepare()
    return executor


def spare_blocks(device: str) -> int:
    """Blocks of a cache on a device that no request has: one where steps are captured."""
    return 0 if torch.device(device).type == "cpu" else 1


def _free_bytes(device: str) -> int:
    if device == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info(device)[0])


def default_threads() -> int:
    """Cores this process may run on, hyper-threads counted once."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or allowed, allowed)


class TorchExecutor:
    """One model and one cache, one step at a time. Of a request it keeps nothing but its KV blocks."""

    def __init__(self, model: Qwen3, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        self.device = cache.keys.device
        self.layers = 0
        """Begun since the start: a step of a long prompt takes seconds, and this shows that it goes on."""
        self._replays = _replays(model, cache)

    def prepare(self) -> None:
        """Do now what would hold up the first steps: capture those that decode, compile for others."""
        if self._replays is None:
            return
        self._replays.prepare()
        for decoding, tokens in WARM_PROMPTS:
            if tokens <= self.cache.blocks * self.cache.block_tokens:
                lengths = (1,) * decoding + (tokens,)
                self.execute(Batch(pieces=tuple(self._of_nobody(length) for length in lengths)))

    def _of_nobody(self, tokens: int) -> Piece:
        """A prompt that nobody asked for, in the first blocks, which nobody has yet."""
        asked = Request(id="", prompt=(0,) * tokens, output_tokens=1)
        blocks = tuple(range(-(-tokens // self.cache.block_tokens)))
        return Piece(request=asked, start=0, length=tokens, samples=True, history=asked.prompt, blocks=blocks)

    def execute(self, batch: Batch) -> StepResult:
        """Run one step. The duration covers everything from index tensors to chosen tokens.

        A request samples as its `sampling` (a `SamplingOptions`) says; without, greedily.
        """
        begun = time.perf_counter()
        with torch.inference_mode():
            tokens, scores = self._step(batch.pieces)
        # Reading the tokens back waited for the device; without any, wait for it here.
        if not tokens and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return StepResult(tokens=tokens, duration_s=time.perf_counter() - begun, scores=scores)

    @property
    def block_bytes(self) -> int:
        """Of one block, keys and values of all layers."""
        return self.cache.bytes // self.cache.keys.shape[1]

    def read_blocks(self, blocks: Sequence[int], out: memoryview) -> None:
        """Write what these blocks hold to `out`."""
        with torch.inference_mode():
            contents = self.cache.read_blocks(blocks)
            self._raw(out).copy_(contents.flatten())

    def write_blocks(self, blocks: Sequence[int], contents: memoryview) -> None:
        """Give these blocks what was read from others, of a cache of the same layout."""
        with torch.inference_mode():
            shape = (2, self.cache.keys.shape[0], len(blocks), *self.cache.keys.shape[2:])
            self.cache.write_blocks(blocks, self._raw(contents).view(shape))

    def _raw(self, memory: memoryview) -> torch.Tensor:
        return torch.frombuffer(memory, dtype=self.cache.keys.dtype)

    def _step(self, pieces: Sequence[Piece]) -> tuple[dict[str, int], dict[str, TokenScore] | None]:
        if not pieces:
            return {}, None
        if self._replays is not None and all(piece.length == 1 and piece.samples for piece in pieces):
            return choose_tokens(self._replays.logits(pieces), pieces, self.model.ops.argmax)
        layout = lay_out(
            [(p.start, p.length, p.blocks) for p in pieces], self.cache.block_tokens, self.device
        )
        fed: list[int] = []
        for piece in pieces:
            fed.extend(piece.tokens)
        tokens_T = torch.tensor(fed, device=self.device)
        paged = PagedAttend(self.cache, layout, self.model.ops)

        def attend(layer: int, q_THd: torch.Tensor, k_TKd: torch.Tensor, v_TKd: torch.Tensor) -> torch.Tensor:
            self.layers += 1
            return paged(layer, q_THd, k_TKd, v_TKd)

        hidden_TD = self.model(tokens_T, layout.positions_T, attend)
        sampling = [i for i, piece in enumerate(pieces) if piece.samples]
        if not sampling:
            return {}, None
        logits_NV = self.model.logits(self._last_rows(hidden_TD, layout, sampling))
        return choose_tokens(logits_NV, [pieces[i] for i in sampling], self.model.ops.argmax)

    @staticmethod
    def _last_rows(hidden_TD: torch.Tensor, layout: Layout, sampling: list[int]) -> torch.Tensor:
        """Hidden states of the last token of the pieces that sample."""
        if len(sampling) == len(hidden_TD):
            return hidden_TD
        return hidden_TD[layout.rows_P1[1:][sampling].long() - 1]


def _replays(model: Qwen3, cache: PagedCache) -> Replays | None:
    """Captured steps, where this model's can be on this device."""
    if cache.keys.device.type != "cuda" or not isinstance(model.ops, DeviceOps) or not model.ops.fused:
        return None
    from tongyun.cloud.engine.replay import Replays, replays

    return Replays(model, cache) if replays(model, cache) else None


def choose_tokens(
    logits_NV: torch.Tensor, pieces: Sequence[Piece], argmax: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[dict[str, int], dict[str, TokenScore] | None]:
    """The token of each piece by request id, and the scores of those that asked for them."""
    ids = [piece.request.id for piece in pieces]
    if all(piece.request.sampling is None for piece in pieces):
        return dict(zip(ids, argmax(logits_NV).tolist(), strict=True)), None
    drawn = sample(logits_NV, [_draw(piece) for piece in pieces], argmax)
    scores = {ids[row]: TokenScore(logprob=own, top=top) for row, (own, top) in drawn.scores.items()}
    return dict(zip(ids, drawn.tokens, strict=True)), scores or None


def _draw(piece: Piece) -> Draw:
    options = piece.request.sampling
    if options is None:
        options = GREEDY
    if not isinstance(options, SamplingOptions):
        raise TypeError(
            f"request '{piece.request.id}': sampling is {type(options).__name__}, not SamplingOptions"
        )
    return Draw(
        options=options,
        seed=secrets.randbits(64) if options.seed is None else options.seed,
        history=piece.history,
        prompt_tokens=len(piece.request.prompt),
    )
