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
from typing import Protocol

import numpy as np

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
    """Achieved bandwidth of one rank towards `ranks - 1` peers."""
    return link.bytes_per_s * link.achieved * link_share(link, ranks)


def link_share(link: Link, ranks: int) -> float:
    """Part of its bandwidth that one rank can use towards `ranks - 1` peers.

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
    return min(1.0, share)


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


class Domain(Protocol):
    """Collectives among ranks of one scale-up domain; sizes as `Operator.payload_bytes` counts them."""

    def all_reduce_s(self, payload_bytes: Number, ranks: int) -> Number: ...

    def gather_s(self, payload_bytes: Number, ranks: int) -> Number: ...

    def all_to_all_s(self, payload_bytes: Number, ranks: int) -> Number: ...

    def send_s(self, payload_bytes: Number) -> Number: ...


@dataclass(frozen=True, kw_only=True)
class Rings:
    """A domain priced by its link alone: rings, and turns for an all-to-all."""

    link: Link

    def all_reduce_s(self, payload_bytes: Number, ranks: int) -> Number:
        return all_reduce_s(payload_bytes, ranks, self.link)

    def gather_s(self, payload_bytes: Number, ranks: int) -> Number:
        return gather_s(payload_bytes, ranks, self.link)

    def all_to_all_s(self, payload_bytes: Number, ranks: int) -> Number:
        return _turns(payload_bytes / ranks, ranks, self.link)

    def send_s(self, payload_bytes: Number) -> Number:
        return payload_bytes / link_bytes_per_s(self.link, 2) + self.link.latency_s


def collective_s(operator: Operator, chip: Chip, domain: Domain | None = None) -> Number:
    """Seconds of one execution of a collective operator on this chip's links.

    `domain` prices what stays inside the scale-up domain; None: rings over its link.
    """
    if operator.ranks == 1:
        return 0.0 * operator.payload_bytes
    exchange = exchange_of(operator, chip, domain)
    if exchange is not None:
        return exchange.seconds
    group = Group.of(operator.ranks, chip)
    return _BY_KIND[operator.kind](operator.payload_bytes, group, _ways(group, chip, domain))


def _ways(group: Group, chip: Chip, domain: Domain | None) -> Ways:
    inside = domain
    if group.inside > 1 or group.nodes == 1:
        inside = Rings(link=_up(chip)) if domain is None else domain
    return Ways(inside=inside, chip=chip)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Tokens on their way to experts over several domains, or back."""

    network_bytes: Number
    """What a rank sends over the network where copies are forwarded; its own node's part apart."""
    domain_bytes: Number
    """What it then passes on within its domain."""
    forwarded_s: Number
    direct_s: Number
    """With a copy over the network for each rank beyond the domain."""

    @property
    def seconds(self) -> Number:
        return np.minimum(self.forwarded_s, self.direct_s)


def exchange_of(operator: Operator, chip: Chip, domain: Domain | None = None) -> Exchange | None:
    """What an exchange with experts takes; None for other collectives, and within one domain.

    A token crosses the network once for each domain D that holds any of its experts, to the rank of
    its sender's place there, and is passed on inside; sums come back the same way. Or it goes directly,
    whichever is quicker, as dispatch kernels have both (DeepSeek-V3 report, 3.2.2; DeepEP).

        network  T · s · E[D] · (G − 1)/G     over G domains
        inside   T · s · E[R] · (n − 1)/n     to R ranks in all, n of them in a domain

    Both run at once, piece by piece: the longer decides, and the other's latency comes before or after.
    """
    group = Group.of(operator.ranks, chip)
    if operator.experts is None or group.nodes == 1:
        return None
    payload, inside, ways = operator.payload_bytes, group.inside, _ways(group, chip, domain)
    domains = operator.ranks / inside
    once = payload * (operator.experts.reached(domains) / operator.experts.reached(operator.ranks))
    away_s = _turns(once / group.nodes, group.nodes, ways.between)
    direct_s = _all_to_all(payload, group, ways)
    if inside == 1:
        return Exchange(
            network_bytes=once * (1 - 1 / domains), domain_bytes=0.0, forwarded_s=away_s, direct_s=direct_s
        )
    on_s, first_s = (ways.within.all_to_all_s(part, inside) for part in (payload, 0.0 * payload))
    return Exchange(
        network_bytes=once * (1 - 1 / domains),
        domain_bytes=payload * (1 - 1 / inside),
        forwarded_s=np.maximum(away_s + first_s, on_s + _turns(0.0, group.nodes, ways.between)),
        direct_s=direct_s,
    )


@dataclass(frozen=True, kw_only=True)
class Ways:
    """What a collective may cross: the domain, and the network between domains."""

    inside: Domain | None
    chip: Chip

    @property
    def within(self) -> Domain:
        assert self.inside is not None, "a group with several ranks in a domain has one"
        return self.inside

    @property
    def between(self) -> Link:
        if self.chip.scale_out is None:
            raise Infeasible(f"{self.chip.name}: no scale-out link beyond its scale-up domain")
        return self.chip.scale_out


def _all_reduce(payload: Number, group: Group, ways: Ways) -> Number:
    """Inside every node first, so that only P/inside of each rank crosses between nodes."""
    total: Number = 0.0
    if group.inside > 1:
        total = total + ways.within.all_reduce_s(payload, group.inside)
    if group.nodes > 1:
        total = total + all_reduce_s(payload / group.inside, group.nodes, ways.between)
    return total


def _gather(payload: Number, group: Group, ways: Ways) -> Number:
    """Across nodes each rank fetches its share, P/inside; inside the node all shares are exchanged."""
    total: Number = 0.0
    if group.nodes > 1:
        total = total + gather_s(payload / group.inside, group.nodes, ways.between)
    if group.inside > 1:
        total = total + ways.within.gather_s(payload, group.inside)
    return total


def _all_to_all(payload: Number, group: Group, ways: Ways) -> Number:
    """Each destination gets P/n in a turn of its own; what leaves the node crosses scale-out, afterwards."""
    total: Number = 0.0
    if group.inside > 1:
        total = total + ways.within.all_to_all_s(payload / group.nodes, group.inside)
    if group.nodes > 1:
        total = total + _turns(payload / group.nodes, group.nodes, ways.between)
    return total


def _turns(piece_bytes: Number, peers: int, link: Link) -> Number:
    return (peers - 1) * (link.latency_s + piece_bytes / link_bytes_per_s(link, peers))


def _send(payload: Number, group: Group, ways: Ways) -> Number:
    if group.nodes == 1:
        return ways.within.send_s(payload)
    return Rings(link=ways.between).send_s(payload)


def _up(chip: Chip) -> Link:
    if chip.scale_up is None:
        raise Infeasible(f"{chip.name}: no scale-up link, so nothing can be cut over several chips")
    return chip.scale_up


_BY_KIND: dict[Kind, Callable[[Number, Group, Ways], Number]] = {
    Kind.ALL_REDUCE: _all_reduce,
    Kind.ALL_GATHER: _gather,
    Kind.REDUCE_SCATTER: _gather,
    Kind.ALL_TO_ALL: _all_to_all,
    Kind.SEND: _send,
}
