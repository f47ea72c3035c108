"""KV blocks that go from one engine's cache to another's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tongyun.cloud.engine.carry import Carrier, Windows
from tongyun.cloud.engine.clock import WallClock
from tongyun.cloud.engine.letters import Arrive, Departed, Down, Expect, Give, Landed, Refused, Slice, Up
from tongyun.cloud.engine.loop import EngineLoop
from tongyun.cloud.engine.simulated import SimulatedExecutor
from tongyun.cloud.engine.torch_executor import ExecutorOptions, TorchExecutor, open_executor
from tongyun.cloud.sched.request import Request
from tongyun.cloud.sched.scheduler import Scheduler, SchedulerConfig
from tongyun.errors import InputError
from tongyun.model.config import ModelConfig
from tongyun.model.options import SamplingOptions
from tongyun.model.paged import PagedCache, block_bytes
from tongyun.model.tokenizer import write_byte_tokenizer
from tongyun.model.weights import write_random_checkpoint

RAW = {
    "model_type": "qwen3",
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": 300,
    "max_position_embeddings": 500,
    "tie_word_embeddings": True,
}
CONFIG = ModelConfig.from_hf(RAW, name="tiny")
LIMITS = SchedulerConfig(blocks=30, block_tokens=16, max_context_tokens=400, max_step_tokens=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("carry") / "tiny"
    write_byte_tokenizer(directory)
    write_random_checkpoint(directory, CONFIG)
    return directory


def executor(model: Path, kv_dtype: str = "f32") -> TorchExecutor:
    options = ExecutorOptions(kernels="torch", threads=1, kv_dtype=kv_dtype, kv_bytes=30 * 3 * 2048)
    return open_executor(model, options)


def loop(runner: object) -> EngineLoop:
    return EngineLoop(Scheduler(LIMITS), runner, WallClock())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_come_out_as_they_went_in(dtype: torch.dtype) -> None:
    one, other = (PagedCache(CONFIG, blocks=9, dtype=dtype) for _ in range(2))
    for tensor in (one.keys, one.values):
        tensor.copy_(torch.randn(tensor.shape))
    contents = one.read_blocks([7, 0, 3])
    assert contents.nbytes == 3 * block_bytes(CONFIG, 16, dtype)
    other.write_blocks([1, 8, 2], contents)
    assert torch.equal(other.keys[:, [1, 8, 2]], one.keys[:, [7, 0, 3]])
    assert torch.equal(other.values[:, [1, 8, 2]], one.values[:, [7, 0, 3]])
    others = [0, 3, 4, 5, 6, 7]
    assert not other.keys[:, others].any() and not other.values[:, others].any()


class Pair:
    """Two engines whose letters go straight to each other, a step of the source between two of them."""

    def __init__(self, source: EngineLoop, target: EngineLoop, windows: Windows) -> None:
        self.source, self.target = source, target
        self.giver, self.taker = Carrier(source, windows, 0), Carrier(target, windows, 1)
        self.tokens: list[int] = []
        self.said: list[Up] = []

    def say(self, carrier: Carrier, letter: Down) -> list[Up]:
        carrier.tell(letter)
        answers = carrier.collect()
        self.said += answers
        return answers

    def move(self, request_id: str, blocks: int) -> None:
        """As far as it goes, within a hundred steps of the source."""
        if isinstance(self.say(self.taker, Expect(1, request_id, blocks))[0], Refused):
            return
        self.say(self.giver, Give(1, request_id, blocks, 3, 16))
        for _ in range(100):
            self.step(self.source)
            self.giver.work()
            for letter in self.giver.collect():
                self.said.append(letter)
                if isinstance(letter, Departed):
                    self.say(self.taker, Arrive(1, letter.traveller, letter.last))
                    return
                assert isinstance(letter, Slice)
                for answer in self.say(self.taker, letter):
                    if isinstance(answer, Refused):
                        return
                    self.giver.tell(answer)

    def step(self, engine: EngineLoop) -> None:
        self.tokens += [event.token for event in engine.step() or () if event.token is not None]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("slice_blocks", [1, 100])
def test_a_request_goes_on_and_nothing_of_it_is_computed_again(
    model: Path, temperature: float, slice_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Request(
        id="r",
        prompt=tuple(range(3, 120)),
        output_tokens=100,
        sampling=SamplingOptions(temperature=temperature, seed=11, presence_penalty=0.5),
        ignore_eos=True,
    )
    runner = executor(model)
    monkeypatch.setattr("tongyun.cloud.engine.carry.SLICE_BYTES", slice_blocks * runner.block_bytes)
    pair = Pair(loop(runner), loop(executor(model)), Windows(2, runner.block_bytes))
    pair.source.add(asked)
    while len(pair.tokens) < 20:
        pair.step(pair.source)
    pair.move("r", 10)
    assert isinstance(pair.said[-1], Landed) and pair.said[-1].decodes
    slices = [letter for letter in pair.said if isinstance(letter, Slice)]
    # 137 tokens with keys and values when the first slice goes are eight full blocks, and a step a block.
    assert [letter.blocks for letter in slices] == ([1] * 9 if slice_blocks == 1 else [8])
    assert not pair.source.has_work and pair.source.stats().kv_blocks_used == 0
    left = 100 - len(pair.tokens)
    assert left < 80
    while pair.target.has_work:
        pair.step(pair.target)
    assert pair.target.stats().computed_tokens == left
    alone = Pair(loop(executor(model)), pair.target, Windows(2, runner.block_bytes))
    alone.source.add(asked)
    while alone.source.has_work:
        alone.step(alone.source)
    assert pair.tokens == alone.tokens


def test_what_has_no_room_or_another_layout_is_refused(model: Path) -> None:
    runner = executor(model)
    for other, blocks, why in (
        (runner, 31, "no room for 31 blocks"),
        (executor(model, "bf16"), 10, "blocks are .* bytes there: another layout"),
    ):
        pair = Pair(loop(runner), loop(other), Windows(2, runner.block_bytes))
        pair.source.add(Request(id="r", prompt=tuple(range(3, 120)), output_tokens=100))
        while len(pair.tokens) < 5:
            pair.step(pair.source)
        pair.move("r", blocks)
        assert isinstance(pair.said[-1], Refused)
        assert re.search(why, pair.said[-1].why)
        assert pair.target.stats().kv_blocks_used == 0 and pair.source.stats().running == 1


def test_an_engine_that_shows_no_blocks_takes_no_part() -> None:
    with pytest.raises(InputError, match="SimulatedExecutor keeps keys and values to itself"):
        Carrier(loop(SimulatedExecutor(lambda load: None)), Windows(1, 1), 0)
