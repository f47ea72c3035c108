"""Seconds of a collective over the links of a chip.

A group of ranks is laid out node by node: `inside` ranks share a scale-up domain,
`nodes` domains are joined by scale-out. Bandwidth terms are the least bytes each rank
must send; latency terms count the steps of the algorithm. Contention between groups
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

ONE_HOP = ("switch", "full_mesh", "clos", "rail_clos")
"""Topologies where every rank reaches every other in one step."""


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


def _steps(link: Link, ranks: int) -> int:
    """Latencies of one pass: one where all are one hop apart, a ring's n−1 elsewhere."""
    return 1 if link.topology in ONE_HOP else ranks - 1


def gather_s(payload_bytes: Number, ranks: int, link: Link) -> Number:
    """All-gather of `payload_bytes` in all, or the reduce-scatter of as much: P·(n−1)/n / b + l."""
    if ranks == 1:
        return 0.0 * payload_bytes
    moved = payload_bytes * (ranks - 1) / ranks
    return moved / link_bytes_per_s(link, ranks) + _steps(link, ranks) * link.latency_s


def all_reduce_s(payload_bytes: Number, ranks: int, link: Link) -> Number:
    """Reduce-scatter and all-gather: 2·P·(n−1)/n / b and twice the latency; one rank: zero."""
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
    """Each destination gets P/n; what leaves the node crosses scale-out, one after the other."""
    ranks = group.inside * group.nodes
    total: Number = 0.0
    if group.inside > 1:
        near, up = payload * (group.inside - 1) / ranks, _up(chip)
        total = total + near / link_bytes_per_s(up, group.inside) + _steps(up, group.inside) * up.latency_s
    if group.nodes > 1:
        far, out = payload * (group.nodes - 1) / group.nodes, _out(chip)
        total = total + far / link_bytes_per_s(out, group.nodes) + _steps(out, group.nodes) * out.latency_s
    return total


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
