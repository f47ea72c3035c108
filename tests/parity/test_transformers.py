"""Greedy tokens and logits equal transformers' on the same checkpoint, however the work is cut.

The reference is transformers in float32 on the bf16 weights; ours is float32
arithmetic on the weights as stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Driven, drive, prompt, request, tiny

from tongyun.cloud.engine.torch_executor import TorchExecutor
from tongyun.errors import InputError
from tongyun.model.kernels import TorchOps, choose_ops
from tongyun.model.paged import PagedCache
from tongyun.model.weights import load_model, write_random_checkpoint

STEPS = 12
BLOCK = 4
CONFIGS = {
    "dense-tied": tiny(tied=True),
    "dense-untied": tiny(tied=False),
    "moe-tied": tiny(tied=True, sparse=True),
    "moe-untied": tiny(tied=False, sparse=True),
}


@dataclass
class Case:
    directory: Path
    reference: Any
    ops: TorchOps

    def executor(self, dtype: torch.dtype = torch.float32) -> TorchExecutor:
        model = load_model(self.directory, ops=self.ops)
        return TorchExecutor(model, PagedCache(model.config, blocks=64, block_tokens=BLOCK, dtype=dtype))

    def greedy(self, tokens: tuple[int, ...], steps: int = STEPS) -> list[int]:
        """What transformers would produce, recomputing the whole context for each token."""
        known = list(tokens)
        with torch.inference_mode():
            for _ in range(steps):
                known.append(int(self.reference(torch.tensor([known])).logits[0, -1].argmax()))
        return known[len(tokens) :]


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp(request.param)
    write_random_checkpoint(directory, CONFIGS[request.param], seed=1, shard_bytes=40_000)
    return directory, AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture(params=["torch", "native"])
def case(request: pytest.FixtureRequest, checkpoint: tuple[Path, Any]) -> Iterator[Case]:
    try:
        ops = choose_ops(request.param)
    except InputError as error:
        pytest.skip(str(error))
    yield Case(*checkpoint, ops=ops)


def test_logits_of_one_prompt(case: Case) -> None:
    """Every row, not only the last: within 2e-5 of the largest logit."""
    from tongyun.model.kernels.attention import lay_out
    from tongyun.model.paged import PagedAttend

    tokens = prompt(3, 23)
    executor = case.executor()
    layout = lay_out([(0, 23, range(6))], BLOCK)
    with torch.inference_mode():
        attend = PagedAttend(executor.cache, layout, case.ops)
        ours = executor.model.logits(executor.model(torch.tensor(tokens), layout.positions_T, attend))
        theirs = case.reference(torch.tensor([tokens])).logits[0]
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()


def test_batch_of_one(case: Case) -> None:
    driven = Driven(request("a", prompt(5, 19)), blocks=tuple(range(10, 20)))
    executor = case.executor()
    for _ in range(STEPS):
        drive(executor, (driven, None))
    assert driven.output == case.greedy(driven.request.prompt)


def test_mixed_batch_with_chunked_prefill(case: Case) -> None:
    """Decodes beside chunks of other prompts, the chunk ends away from block ends."""
    first = Driven(request("a", prompt(6, 9)), blocks=(40, 3, 17, 5, 30, 31, 32))
    second = Driven(request("b", prompt(7, 30)), blocks=tuple(range(50, 63)))
    third = Driven(request("c", prompt(8, 1)), blocks=(9, 8, 7, 6, 4))
    executor = case.executor()
    drive(executor, (first, None))
    drive(executor, (first, None), (second, 7), (third, None))
    drive(executor, (second, 13), (third, None), (first, None))
    drive(executor, (third, None), (first, None), (second, 2))
    while len(second.output) < STEPS:
        drive(executor, (third, None), (second, None), (first, None))
    for driven in (first, second, third):
        assert driven.output == case.greedy(driven.request.prompt, len(driven.output))


def test_prefix_computed_by_another_request(case: Case) -> None:
    """A hit takes over the blocks of a shared prefix and computes only what follows."""
    shared = prompt(9, 12)
    owner = Driven(request("a", shared + prompt(10, 5)), blocks=(20, 21, 22, 23, 24, 25, 26, 27))
    executor = case.executor()
    drive(executor, (owner, None))
    hit = Driven(request("b", shared + prompt(11, 6)), blocks=(20, 21, 22, 33, 34, 35, 36, 37), done=12)
    for _ in range(STEPS):
        drive(executor, (owner, None), (hit, None))
    assert hit.output == case.greedy(hit.request.prompt)
    assert owner.output == case.greedy(owner.request.prompt, len(owner.output))


def test_prefix_computed_in_the_same_step(case: Case) -> None:
    """All keys of a step are stored before any is read, so a hit may share the step of its owner."""
    shared = prompt(12, 8)
    owner = Driven(request("a", shared + prompt(13, 3)), blocks=(1, 2, 3, 4, 5, 6))
    hit = Driven(request("b", shared + prompt(14, 4)), blocks=(1, 2, 13, 14, 15, 16), done=8)
    executor = case.executor()
    for _ in range(STEPS):
        drive(executor, (owner, None), (hit, None))
    assert hit.output == case.greedy(hit.request.prompt)
