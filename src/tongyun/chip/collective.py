"""Seconds of a collective over the links of a chip.

A group of ranks is laid out node by node: `inside` ranks share a scale-up domain,
`nodes` domains are joined by scale-out. Bandwidth terms are the least bytes each rank
must send; latency terms count the steps of a ring, which is also how the latencies of
the catalogue were derived. Contention between groups
and overlap with computing are not known here.

Symbols: P payload bytes, n ranks, b achieved bytes per second, l latency.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tongyun.errors import Infeasible
from tongyun.model.graph import Kind, Operator
from tongyun.specs import Chip, Link
from tongyun.units import Number


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks of a collective: `inside` of each scale-up domain, over `nodes` domains."""

    inside: int
    nodes: int

    @classmethod
    def of(cls, ranks: int, chip: Chip) -> Group:
        """Consecutive ranks filling one domain after the other."""
        domain = 1 if chip.scale_up is None else chip.scale_up.domain
        inside = min(ranks, domain)
        return cls(inside=inside, nodes=math.ceil(ranks / inside))


def link_bytes_per_s(link: Link, ranks: int) -> float:
    """Achieved bandwidth of one rank towards `ranks - 1` peers.

    A mesh or a set of ports gives each peer its own share, so that few peers leave ports
    idle; a torus offers a group one of its axes.
    """
    share = 1.0
    if link.topology == "full_mesh" and link.domain > 1:
        share = (ranks - 1) / (link.domain - 1)
    elif link.topology == "ports" and link.ports:
        share = (ranks - 1) / link.ports
    elif link.topology in ("torus2d", "torus3d"):
        share = 1 / int(link.topology[-2])
    return link.bytes_per_s * link.achieved * min(1.0, share)


def gather_s(payload_bytes: Number, ranks: int, link: Link) -> Number:
    """All-gather of `payload_bytes` in all, or the reduce-scatter of as much, as a ring.

    n−1 steps, each moving P/n over the link: t = (n−1) · (l + P / (n·b)). One rank: zero.
    """
    if ranks == 1:
        return 0.0 * payload_bytes
    return (ranks - 1) * (link.latency_s + payload_bytes / (ranks * link_bytes_per_s(link, ranks)))


def all_reduce_s(payload_bytes: Number, ranks: int, link: Link) -> Number:
    """A reduce-scatter and an all-gather: t = 2(n−1) · (l + P / (n·b)). One rank: zero."""
    return 2 * gather_s(payload_bytes, ranks, link)


def collective_s(operator: Operator, chip: Chip) -> Number:
    """Seconds of one execution of a collective operator on this chip's links."""
    if operator.ranks == 1:
        return 0.0 * operator.payload_bytes
    group = Group.of(operator.ranks, chip)
    return _BY_KIND[operator.kind](operator.payload_bytes, group, chip)


def _all_reduce(payload: Number, group: Group, chip: Chip) -> Number:
    """Inside every node first, so that only P/inside of each rank crosses between nodes."""
    total: Number = 0.0
    if group.inside > 1:
        total = total + all_reduce_s(payload, group.inside, _up(chip))
    if group.nodes > 1:
        total = total + all_reduce_s(payload / group.inside, group.nodes, _out(chip))
    return total


def _gather(payload: Number, group: Group, chip: Chip) -> Number:
    """Across nodes each rank fetches its share, P/inside; inside the node all shares are exchanged."""
    total: Number = 0.0
    if group.nodes > 1:
        total = total + gather_s(payload / group.inside, group.nodes, _out(chip))
    if group.inside > 1:
        total = total + gather_s(payload, group.inside, _up(chip))
    return total


def _all_to_all(payload: Number, group: Group, chip: Chip) -> Number:
    """Each destination gets P/n in a turn of its own; what leaves the node crosses scale-out, afterwards."""
    ranks = group.inside * group.nodes
    total: Number = 0.0
    if group.inside > 1:
        total = total + _turns(payload / ranks, group.inside, _up(chip))
    if group.nodes > 1:
        total = total + _turns(payload / group.nodes, group.nodes, _out(chip))
    return total


def _turns(piece_bytes: Number, peers: int, link: Link) -> Number:
    return (peers - 1) * (link.latency_s + piece_bytes / link_bytes_per_s(link, peers))


def _send(payload: Number, group: Group, chip: Chip) -> Number:
    link = _up(chip) if group.nodes == 1 else _out(chip)
    return payload / link_bytes_per_s(link, 2) + link.latency_s


def _up(chip: Chip) -> Link:
    if chip.scale_up is None:
        raise Infeasible(f"{chip.name}: no scale-up link, so nothing can be cut over several chips")
    return chip.scale_up


def _out(chip: Chip) -> Link:
    if chip.scale_out is None:
        raise Infeasible(f"{chip.name}: no scale-out link beyond its scale-up domain")
    return chip.scale_out


_BY_KIND: dict[Kind, Callable[[Number, Group, Chip], Number]] = {
    Kind.ALL_REDUCE: _all_reduce,
    Kind.ALL_GATHER: _gather,
    Kind.REDUCE_SCATTER: _gather,
    Kind.ALL_TO_ALL: _all_to_all,
    Kind.SEND: _send,
}
