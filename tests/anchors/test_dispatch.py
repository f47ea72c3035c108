"""Dispatch and combine over nodes beside DeepEP's published bandwidths.

DeepEP docs/legacy.md (V1, normal kernels): H800, 400 Gb/s a GPU, 4,096 tokens, hidden 7,168, four of eight
groups, eight experts, fp8 there and bf16 back. Its README (V2): H100-class GPUs (SM90) on the same
network, 8,192 tokens. Both count a token once for each node that holds any of its experts, its own among
them, over the kernel's time ("logical bandwidth"). Nothing was fitted to these figures but that the H800's
catalogue entry takes DeepEP's 160 GB/s for its links.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from random import Random

import numpy as np
import pytest

from tongyun.chip.collective import Group, collective_s, exchange_of, link_bytes_per_s
from tongyun.model.config import Experts, ModelConfig
from tongyun.model.graph import Kind, Operator
from tongyun.specs import find_chip, find_model

MODEL = ModelConfig.from_hf(find_model("deepseek-ai/DeepSeek-V3")[0], name="v3")


def experts() -> Experts:
    assert MODEL.experts is not None
    return MODEL.experts


def logical_bytes_per_s(chip: str, ranks: int, tokens: int, width: float) -> float:
    """A token for each node, over the time of the exchange."""
    spec = find_chip(chip).at()
    token = MODEL.hidden * width
    operator = Operator(
        name="dispatch",
        kind=Kind.ALL_TO_ALL,
        axis="ep",
        ranks=ranks,
        payload_bytes=tokens * experts().reached(ranks) * token,
        experts=experts(),
    )
    return tokens * experts().reached(ranks / 8) * token / float(collective_s(operator, spec))


@pytest.mark.parametrize(("ranks", "dispatch", "combine"), [(32, 58, 57), (64, 51, 50)])
def test_normal_kernels_of_the_first_release(ranks: int, dispatch: float, combine: float) -> None:
    for published, width in ((dispatch, 1), (combine, 2)):
        ours = logical_bytes_per_s("h800", ranks, 4096, width) / 1e9
        assert ours == pytest.approx(published, rel=0.10)


def test_two_nodes_of_the_first_release_overlap_in_part() -> None:
    """At 16 ranks links and network take about as long; 43 GB/s lie between both at once, which is our price
    (65) and what the second release exceeds, and one after the other (38)."""
    spec, ranks = find_chip("h800").at(), 16
    assert spec.scale_up is not None and spec.scale_out is not None
    nodes, reached = experts().reached(ranks / 8), experts().reached(ranks)
    network = nodes * (1 - 8 / ranks) / link_bytes_per_s(spec.scale_out, 2)
    links = reached * (1 - 1 / 8) / link_bytes_per_s(spec.scale_up, 8)
    after = nodes / (network + links) / 1e9
    assert after < 43 < logical_bytes_per_s("h800", ranks, 4096, 1) / 1e9


@pytest.mark.parametrize(("ranks", "dispatch", "combine"), [(16, 90, 81), (32, 61, 61)])
def test_the_second_release_keeps_up_with_the_network(ranks: int, dispatch: float, combine: float) -> None:
    for published, width in ((dispatch, 1), (combine, 2)):
        ours = logical_bytes_per_s("h100", ranks, 8192, width) / 1e9
        assert ours == pytest.approx(published, rel=0.15)


def test_a_copy_for_each_rank_would_be_slower_than_published() -> None:
    """What the exchange costs without forwarding: published figures rule it out."""
    spec = find_chip("h800").at()
    assert spec.scale_out is not None
    for ranks in (16, 32, 64):
        away = experts().reached(ranks) * (1 - 8 / ranks)
        alone = experts().reached(ranks / 8) / away * link_bytes_per_s(spec.scale_out, ranks // 8) / 1e9
        assert alone < 0.8 * {16: 43, 32: 58, 64: 51}[ranks]


@pytest.mark.parametrize(
    ("chip", "ranks"),
    [("h100", 16), ("h100", 64), ("h800", 128), ("gb200", 128), ("zhenwu-810e", 64), ("mi300x", 32)],
)
def test_the_quicker_way_is_taken_and_more_bytes_or_less_network_are_never_quicker(
    chip: str, ranks: int
) -> None:
    spec = find_chip(chip).at()
    assert spec.scale_out is not None and Group.of(ranks, spec).nodes > 1
    payloads = np.geomspace(1e3, 1e10, 57)
    one = Operator(
        name="x", kind=Kind.ALL_TO_ALL, axis="ep", ranks=ranks, payload_bytes=payloads, experts=experts()
    )
    found = exchange_of(one, spec)
    assert found is not None
    seconds = np.asarray(collective_s(one, spec))
    assert (seconds == np.minimum(found.forwarded_s, found.direct_s)).all()
    assert (np.diff(seconds) > 0).all()
    assert (np.asarray(found.network_bytes) <= payloads).all()
    slower = replace(spec, scale_out=replace(spec.scale_out, bytes_per_s=spec.scale_out.bytes_per_s / 2))
    assert (np.asarray(collective_s(one, slower)) >= seconds).all()


@pytest.mark.parametrize("parts", [2, 4, 8, 16, 32, 64])
def test_expected_shares_are_those_of_drawn_tokens(parts: int) -> None:
    """Groups and experts drawn at random, as balanced routing leaves them."""
    layer, random, drawn = experts(), Random(parts), 4000
    group, share = layer.count // layer.groups, layer.count // parts
    total = 0
    for _ in range(drawn):
        groups = random.sample(range(layer.groups), layer.groups_per_token)
        among = [number * group + i for number in groups for i in range(group)]
        total += len({pick // share for pick in random.sample(among, layer.per_token)})
    assert layer.reached(parts) == pytest.approx(total / drawn, rel=0.02)


def test_expected_shares_are_exact_where_they_can_be_counted() -> None:
    layer = Experts(count=8, per_token=2, intermediate=1, groups=4, groups_per_token=2)
    seen = [
        {pick // 4 for pick in picks}
        for groups in combinations(range(4), 2)
        for picks in combinations([2 * g + i for g in groups for i in range(2)], 2)
    ]
    assert layer.reached(2) == pytest.approx(sum(map(len, seen)) / len(seen))
    assert layer.reached(1) == pytest.approx(1)
    assert Group.of(16, find_chip("h800").at()).nodes == 2
