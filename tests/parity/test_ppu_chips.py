"""Qwen3 cut over several simulated chips, and each instruction of the links on its own."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tongyun.chip.ppu import shard
from tongyun.chip.ppu.capture import capture
from tongyun.chip.ppu.emit.builder import Builder
from tongyun.chip.ppu.fault import Fault
from tongyun.chip.ppu.functional import Chip, run
from tongyun.chip.ppu.fusions import Fusions
from tongyun.chip.ppu.isa import At, Type
from tongyun.chip.ppu.lower import Scale, lower
from tongyun.errors import InputError
from tongyun.specs import find_ppu

transformers = pytest.importorskip("transformers")
PPU = dataclasses.replace(find_ppu("zhenwu-810e").at(), cores=3)
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "initializer_range": 0.1,
}  # fmt: skip
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
ROOM = 32


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def family(kind: str) -> tuple[dict[str, Any], Any, Any]:
    if kind == "moe":
        return {**SIZES, **MOE}, transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM
    return (
        {**SIZES, "tie_word_embeddings": kind == "tied"},
        transformers.Qwen3Config,
        transformers.Qwen3ForCausalLM,
    )


def cache_of(settings: Any) -> Any:
    return transformers.StaticCache(config=settings, max_cache_len=ROOM)


def filled(settings: Any, whole: Any, config: dict[str, Any], chips: int, rank: int) -> Any:
    """One chip's part of a cache that a prompt has been written to."""
    cache = cache_of(settings)
    cache.early_initialization(
        1, settings.num_key_value_heads, settings.head_dim, torch.bfloat16, torch.device("cpu")
    )
    for layer, given in zip(cache.layers, whole.layers, strict=True):
        for name in ("keys", "values"):
            getattr(layer, name).copy_(
                shard.held(f"cache.0.{name}", getattr(given, name), config, chips, rank)
            )
        layer.cumulative_length.copy_(given.cumulative_length)
        layer.cumulative_length_int = int(given.cumulative_length)
    return cache


def on_chips(
    kind: str, model: Any, chips: int, tokens: torch.Tensor, before: Any = None, without: tuple[str, ...] = ()
) -> torch.Tensor:
    """Logits of a step of the whole model, computed by `chips` chips that each hold a part of it."""
    config, make_config, make_model = family(kind)
    settings = make_config(**shard.part(config, chips))
    machines, outputs = [], []
    for rank in range(chips):
        one = shard.joined(make_model(settings).bfloat16().eval(), chips)
        shard.load(one, model.state_dict(), config, rank)
        cache = cache_of(settings) if before is None else filled(settings, before, config, chips, rank)
        found = capture(one, tokens, past_key_values=cache, use_cache=True)
        lowered = lower(found.graph, PPU, Fusions.without(*without), Scale(chips=chips, names=found.names))
        chip = Chip(lowered.program, cores=PPU.cores, sram_bytes=PPU.sram_bytes, rank=rank, check=True)
        for name, value in lowered.constants.items():
            chip.put(name, torch.from_numpy(value))
        for name, value in zip(lowered.inputs, found.given, strict=True):
            if name is not None:
                chip.put(name, value.detach().reshape(lowered.program.tensor(name).shape))
        machines.append(chip)
        outputs.append((lowered.outputs[-1], lowered.output_shapes[-1]))
    assert all(np.array_equal(chip.program.words, machines[0].program.words) for chip in machines)
    run(machines)
    parts = [chip.view(name).reshape(shape) for chip, (name, shape) in zip(machines, outputs, strict=True)]
    assert parts[0].shape[-1] == SIZES["vocab_size"] // chips
    return torch.cat(parts, -1).float()


@pytest.mark.parametrize("kind", ["dense", "tied", "moe"])
@pytest.mark.parametrize("chips", [2, 4])
def test_a_prompt_and_a_token_on_several_chips(kind: str, chips: int) -> None:
    config, make_config, make_model = family(kind)
    torch.manual_seed(0)
    model = make_model(make_config(**config)).bfloat16().eval()
    exact = copy.deepcopy(model).float()
    prompt = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(1))
    caches = cache_of(model.config), cache_of(model.config)
    before, ours, theirs = None, 0.0, 0.0
    for tokens in (prompt, torch.tensor([[7]])):
        got = on_chips(kind, model, chips, tokens, before)
        with torch.no_grad():
            other = model(tokens, past_key_values=caches[0], use_cache=True).logits.float()
            true = exact(tokens, past_key_values=caches[1], use_cache=True).logits
        before = caches[0]
        ours += float((got - true).square().sum())
        theirs += float((other - true).square().sum())
    assert ours**0.5 <= 1.1 * theirs**0.5


def test_the_residual_may_be_added_apart() -> None:
    config, make_config, make_model = family("dense")
    torch.manual_seed(0)
    model = make_model(make_config(**config)).bfloat16().eval()
    prompt = torch.arange(9)[None]
    fused, apart = (on_chips("dense", model, 2, prompt, without=names) for names in ((), ("all",)))
    assert float((fused - apart).norm() / fused.norm()) < 0.02


def test_what_cannot_be_dealt_out_is_named() -> None:
    for chips, words in (
        (3, "num_attention_heads = 8 cannot be dealt out to 3 chips"),
        (16, "num_attention_heads"),
    ):
        with pytest.raises(InputError, match=words):
            shard.part(SIZES, chips)
    with pytest.raises(InputError, match="num_key_value_heads = 2 cannot be dealt out to 3"):
        shard.part({**SIZES, "num_attention_heads": 9, "intermediate_size": 96, "vocab_size": 255}, 3)
    with pytest.raises(InputError, match="runs on chips only"):
        shard.all_reduce(torch.ones(1), 2)


def test_each_chip_holds_its_part_and_no_more() -> None:
    config, make_config, make_model = family("moe")
    model = make_model(make_config(**config))
    whole = model.state_dict()
    for chips in (2, 4):
        one = shard.joined(make_model(make_config(**shard.part(config, chips))), chips)
        parts = []
        for rank in range(chips):
            shard.load(one, whole, config, rank)
            parts.append({shard.plain(name): value.clone() for name, value in one.state_dict().items()})
        for name, value in whole.items():
            held = sum(part[name].double().sum() for part in parts)
            copies = 1 if parts[0][name].shape != value.shape else chips
            if name.endswith(("k_proj.weight", "v_proj.weight")):
                copies = max(1, chips // config["num_key_value_heads"])
            assert float(held) == pytest.approx(copies * float(value.double().sum()), rel=1e-6, abs=1e-6), (
                name
            )


# The links' instructions.

SIZE = 32
"""Numbers a chip gives to a collective."""


def linked(op: str, chips: int, *, out: int, type: Type = Type.BF16, **operands: Any) -> list[torch.Tensor]:
    """What an instruction leaves on each chip that gives it `given(rank)`."""
    machines = []
    for rank in range(chips):
        b = Builder(PPU)
        source = b.layout.place("in", (SIZE,), type, "input")
        target = b.layout.place("out", (out,), type, "output")
        more = {name: At(source.at) if value == "in" else value for name, value in operands.items()}
        with b.kernel("link", op):
            b.emit(op, type, source=At(source.at), target=At(target.at), ranks=chips, **more)
        chip = Chip(b.program(), cores=PPU.cores, sram_bytes=PPU.sram_bytes, rank=rank)
        chip.put("in", given(rank))
        machines.append(chip)
    run(machines)
    return [chip.view("out").clone() for chip in machines]


def given(rank: int) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(rank)).bfloat16()


@pytest.mark.parametrize("chips", [2, 4, 8])
def test_all_reduce_sums_in_f32_and_rounds_once(chips: int) -> None:
    total = sum((given(rank).float() for rank in range(chips)), torch.zeros(SIZE))
    for found in linked("ALL_REDUCE", chips, out=SIZE, bytes=2 * SIZE):
        assert torch.equal(found, total.bfloat16())
    # Each rank's own addend: what the chips hold alike, here not, so that whose it is shows.
    found = linked("ALL_REDUCE", chips, out=SIZE, bytes=2 * SIZE, addend="in")
    for rank, one in enumerate(found):
        assert torch.equal(one, (total + given(rank).float()).bfloat16())


@pytest.mark.parametrize("chips", [2, 4])
def test_all_gather_keeps_the_order_of_ranks(chips: int) -> None:
    want = torch.cat([given(rank) for rank in range(chips)])
    assert all(
        torch.equal(one, want) for one in linked("ALL_GATHER", chips, out=chips * SIZE, bytes=2 * SIZE)
    )


@pytest.mark.parametrize("chips", [2, 4])
def test_reduce_scatter_leaves_each_rank_its_part(chips: int) -> None:
    total = sum((given(rank).float() for rank in range(chips)), torch.zeros(SIZE)).bfloat16()
    parts = linked("REDUCE_SCATTER", chips, out=SIZE // chips, bytes=2 * SIZE // chips)
    assert torch.equal(torch.cat(parts), total)


@pytest.mark.parametrize("chips", [2, 4])
def test_all_to_all_transposes_parts_and_ranks(chips: int) -> None:
    found = linked("ALL_TO_ALL", chips, out=SIZE, bytes=2 * SIZE // chips)
    whole = torch.stack([given(rank) for rank in range(chips)]).view(chips, chips, -1)
    assert torch.equal(torch.stack(found).view(chips, chips, -1), whole.transpose(0, 1))


def messengers(*orders: tuple[tuple[str, int], ...], receive: int = SIZE) -> list[Chip]:
    """Chips that each run a list of SEND and RECV with their peers."""
    machines = []
    for rank, order in enumerate(orders):
        b = Builder(PPU)
        source = b.layout.place("in", (SIZE,), Type.BF16, "input")
        target = b.layout.place("out", (SIZE,), Type.BF16, "output")
        for op, peer in order:
            with b.kernel("link", op):
                if op == "SEND":
                    b.emit(op, source=At(source.at), target=At(target.at), bytes=2 * SIZE, peer=peer)
                else:
                    b.emit(op, target=At(target.at), bytes=2 * receive, peer=peer)
        machines.append(Chip(b.program(), cores=PPU.cores, sram_bytes=PPU.sram_bytes, rank=rank))
        machines[-1].put("in", given(rank))
    return machines


def test_messages_go_round_a_ring() -> None:
    ring = [(("SEND", (rank + 1) % 3), ("RECV", (rank - 1) % 3)) for rank in range(3)]
    chips = messengers(*ring)
    run(chips)
    for rank, chip in enumerate(chips):
        assert torch.equal(chip.view("out"), given((rank - 1) % 3))


@pytest.mark.parametrize(
    ("orders", "receive", "words"),
    [
        (((("RECV", 1),), (("RECV", 0),)), SIZE, r"chips wait for each other: \['RECV', 'RECV'\]"),
        (((("SEND", 1),), ()), SIZE, "a SEND from chip 0 to 1 that no RECV took"),
        (((("SEND", 1),), (("RECV", 0),)), SIZE // 2, "chip 1 waits for 32 bytes at .*, 0 sent 64"),
        (((("SEND", 5),), ()), SIZE, "SEND of chip 0 with peer 5; 2 chips run"),
    ],
)  # fmt: skip
def test_a_message_that_does_not_arrive_is_a_fault(orders: Any, receive: int, words: str) -> None:
    with pytest.raises(Fault, match=words):
        run(messengers(*orders, receive=receive))


def test_chips_at_different_collectives_are_a_fault() -> None:
    with pytest.raises(Fault, match="ALL_REDUCE over 2 ranks; 1 chips run"):
        b = Builder(PPU)
        place = b.layout.place("in", (SIZE,), Type.BF16, "input")
        with b.kernel("link", "sum"):
            b.emit("ALL_REDUCE", Type.BF16, source=At(place.at), target=At(place.at), bytes=64, ranks=2)
        run([Chip(b.program(), cores=1, sram_bytes=PPU.sram_bytes)])
