"""What the executor adds to the model: options by request, repeatable draws, scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from driver import Driven, drive, prompt, request, tiny

from tongyun.cloud.engine.protocol import TokenScore
from tongyun.cloud.engine.torch_executor import ExecutorOptions, TorchExecutor, give_cache, open_executor
from tongyun.cloud.sched.request import Batch, Request
from tongyun.errors import InputError
from tongyun.model.kernels import TorchOps
from tongyun.model.kernels.build import BuildFailed, load_kernels
from tongyun.model.kernels.native import NativeOps
from tongyun.model.options import SamplingOptions
from tongyun.model.paged import PagedCache, block_bytes
from tongyun.model.weights import random_model, write_random_checkpoint


def executor() -> TorchExecutor:
    model = random_model(tiny(), ops=TorchOps(), seed=3)
    return TorchExecutor(model, PagedCache(model.config, blocks=32, block_tokens=4))


def test_an_empty_batch_is_a_step_of_nothing() -> None:
    assert executor().execute(Batch(pieces=())).tokens == {}


def test_a_seeded_request_repeats_in_any_batch() -> None:
    options = SamplingOptions(temperature=1.2, top_p=0.95, repetition_penalty=1.1, seed=5)
    outputs = []
    for companions in (0, 2):
        run = executor()
        driven = Driven(request("a", prompt(1, 10), options), blocks=tuple(range(8)))
        others = [
            Driven(
                request(f"b{i}", prompt(2 + i, 6), SamplingOptions()), tuple(range(10 + 8 * i, 18 + 8 * i))
            )
            for i in range(2)
        ]
        for _ in range(15):
            drive(run, *((other, None) for other in others[:companions]), (driven, None))
        outputs.append(driven.output)
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) > 5


def test_scores_only_for_those_who_ask() -> None:
    run = executor()
    asks = SamplingOptions(temperature=0.0, logprobs=True, top_logprobs=3)
    a = Driven(request("a", prompt(0, 5), asks), blocks=tuple(range(8)))
    b = Driven(request("b", prompt(1, 5)), blocks=tuple(range(8, 16)))
    result = drive(run, (b, None), (a, None))
    assert result.scores is not None
    assert list(result.scores) == ["a"]
    score = result.scores["a"]
    assert score.top[0] == (result.tokens["a"], score.logprob)
    assert len(score.top) == 3
    assert drive(run, (b, None)).scores is None


def test_penalties_see_what_was_produced_and_sampling_has_one_type() -> None:
    plain = Driven(request("a", prompt(3, 6)), blocks=tuple(range(8)))
    never_again = SamplingOptions(temperature=0.0, frequency_penalty=2.0, presence_penalty=2.0)
    fresh = Driven(request("b", prompt(3, 6), never_again), blocks=tuple(range(8, 16)))
    run = executor()
    for _ in range(12):
        drive(run, (plain, None), (fresh, None))
    # Logits of this tiny model are far smaller than the penalties, so that no token comes twice.
    assert len(set(fresh.output)) == 12
    wrong = Request(id="c", prompt=(1, 2), output_tokens=1, sampling={"temperature": 0})
    with pytest.raises(TypeError, match="SamplingOptions"):
        drive(run, (Driven(wrong, blocks=(20,)), None))


def test_a_recomputed_request_goes_on_where_it_was() -> None:
    """After preemption the blocks are gone; the history alone brings the same tokens."""
    options = SamplingOptions(temperature=1.3, seed=9, presence_penalty=0.5)
    first = Driven(request("a", prompt(2, 9), options), blocks=tuple(range(8)))
    run = executor()
    for _ in range(10):
        drive(run, (first, None))
    again = Driven(first.request, blocks=tuple(range(20, 28)), output=first.output[:5])
    for _ in range(5):
        drive(run, (again, None))
    assert again.output == first.output


def test_a_chunk_that_does_not_reach_the_end_yields_nothing() -> None:
    run = executor()
    driven = Driven(request("a", prompt(1, 10)), blocks=(0, 1, 2, 3))
    assert drive(run, (driven, 6)).tokens == {}
    result = drive(run, (driven, None))
    assert list(result.tokens) == ["a"]
    assert result.duration_s > 0


def test_too_few_blocks_is_a_bug_of_the_caller() -> None:
    driven = Driven(request("a", prompt(1, 10)), blocks=(0, 1))
    with pytest.raises(ValueError, match="needs 3 blocks"):
        drive(executor(), (driven, None))


def test_cache_size_follows_the_bytes_given(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, tiny())
    each = block_bytes(tiny(), 16, torch.bfloat16)
    options = ExecutorOptions(kernels="torch", threads=1, kv_dtype="bf16", kv_bytes=10 * each + 1)
    opened = open_executor(tmp_path, options)
    assert opened.cache.blocks == 10
    assert opened.cache.bytes == 10 * each
    model = opened.model
    with pytest.raises(InputError, match="one block takes"):
        give_cache(model, ExecutorOptions(kv_bytes=1))
    with pytest.raises(InputError, match="accepted: bf16, f32"):
        give_cache(model, ExecutorOptions(kv_dtype="fp4"))


def test_bf16_arithmetic_as_on_a_gpu() -> None:
    """The path a GPU takes (bf16 activations and cache) agrees with float32 within bf16's rounding."""
    exact = executor()
    model = random_model(tiny(), ops=TorchOps(), seed=3)
    model.activation_dtype = torch.bfloat16
    narrow = TorchExecutor(model, PagedCache(model.config, blocks=32, block_tokens=4, dtype=torch.bfloat16))
    scores = []
    for run in (exact, narrow):
        asks = SamplingOptions(temperature=0.0, logprobs=True, top_logprobs=20)
        driven = Driven(request("a", prompt(4, 21), asks), blocks=tuple(range(8)))
        drive(run, (driven, 8))
        result = drive(run, (driven, None))
        assert result.scores is not None
        scores.append(dict(result.scores["a"].top))
    shared = scores[0].keys() & scores[1].keys()
    assert len(shared) >= 15
    assert max(abs(scores[0][t] - scores[1][t]) for t in shared) < 0.02


def test_native_log_probabilities_are_the_same_bits_in_every_batch() -> None:
    """Alone, in chunks beside others, or on top of another request's prefix: not close, equal."""
    try:
        ops = NativeOps(load_kernels(), threads=2)
    except BuildFailed as error:
        pytest.skip(f"no native kernels here: {error}")
    asks = SamplingOptions(temperature=0.0, logprobs=True, top_logprobs=5)
    text = prompt(7, 22)

    def run(way: str) -> list[TokenScore]:
        model = random_model(tiny(sparse=True), ops=ops, seed=3)
        engine = TorchExecutor(model, PagedCache(model.config, blocks=64, block_tokens=4))
        others = [
            Driven(request(f"b{i}", prompt(i, 5 + i)), tuple(range(16 + 8 * i, 24 + 8 * i))) for i in range(5)
        ]
        driven = Driven(request("a", text, asks), blocks=tuple(range(10)))
        if way == "prefix":
            owner = Driven(request("o", text[:16] + prompt(8, 3)), blocks=(0, 1, 2, 3, 60, 61))
            drive(engine, (owner, None))
            driven.done = 16
        if way == "mixed":
            drive(engine, *((other, None) for other in others), (driven, 9))
            drive(engine, (driven, 3), *((other, None) for other in others[:2]))
        scores = []
        for step in range(6):
            beside = others[: 5 - step] if way == "mixed" else []
            result = drive(engine, *((other, None) for other in beside), (driven, None))
            assert result.scores is not None
            scores.append(result.scores["a"])
        return scores

    alone = run("alone")
    assert run("mixed") == alone
    assert run("prefix") == alone
