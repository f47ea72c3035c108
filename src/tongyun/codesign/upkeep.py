"""A fleet's `[failures]` and `[autoscale]`, put on its replicas: who stands where, what a start takes.

Chips are laid out one after the other, pool by pool and replica by replica, so many a node.
Knows the fleet file's tables and a fleet's pools; events are the simulation's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tongyun.cloud.cold_start import ColdStarts, FromHost, FromNeighbour, FromStorage, Way
from tongyun.cloud.ending import Ending
from tongyun.cloud.failures import Failures, Outage, Part
from tongyun.cloud.front import Front, Fronts
from tongyun.cloud.latency import RequestRecord
from tongyun.cloud.migration import Moving
from tongyun.cloud.replica import Replica, State
from tongyun.cloud.retries import Retries
from tongyun.cloud.scaling import Scaling
from tongyun.cloud.sched.autoscale import Autoscaler, By, Rule
from tongyun.cloud.sched.request import Request
from tongyun.errors import SpecError, unknown
from tongyun.specs import AutoscaleSpec, Chip, FailureSpec, OutageSpec, find_storage
from tongyun.units import HOUR_S, Source

HELD = frozenset({State.UP, State.LOADING, State.DRAINING})
"""What is paid for where replicas are scaled; elsewhere every chip is, down or not."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A replica became something else."""

    moment_s: float
    replica: str
    state: State


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What coming and going did, from the first arrival to the last end."""

    retried: int
    """Requests sent again at least once."""
    retries: int
    lost: int
    failures: int
    """Of chips, nodes and replicas that a script named."""
    there_chip_s: float
    """Chips there are, over the time."""
    held_chip_s: float
    """Of these, paid for."""
    held: Mapping[str, float]
    """The same by pool."""
    down_chip_s: float
    """Of replicas that were down."""
    cold_starts_s: tuple[float, ...]
    """Seconds of each start."""
    log: tuple[Change, ...]
    """In order of time; states at zero are the first."""

    @property
    def availability(self) -> float:
        """Share of the chips' time in which their replica was not down."""
        return 1.0 - self.down_chip_s / self.there_chip_s


@dataclass(frozen=True, kw_only=True)
class Site:
    """One pool as the layout needs it."""

    role: str
    """Its name: of several models, behind whose it is."""
    replicas: int
    ranks: int
    groups: int
    """Engines of a replica."""
    rank_bytes: float
    """Weights that a rank starts with."""
    host_bytes: float | None = None
    """And those that its host has to have besides, a rank's share; where models share a pool, all of them."""

    def coming_bytes(self, rule: AutoscaleSpec) -> float:
        """Of a rank, when a replica starts: on a host that has them, or has none."""
        if rule.weights == "host" or self.host_bytes is None:
            return self.rank_bytes
        return self.host_bytes


@dataclass(frozen=True, kw_only=True)
class Upkeep:
    """The two tables of a fleet file; `file` names it in errors."""

    failures: FailureSpec | None = None
    autoscale: tuple[AutoscaleSpec, ...] = ()
    file: str = "fleet"

    def check(self, sites: Sequence[Site], chip: Chip) -> None:
        """SpecError where a table does not fit the fleet."""
        layout = _layout(sites, chip.chips_per_node)
        for index, event in enumerate(self.failures.event if self.failures is not None else ()):
            self._struck(index, event, layout)
        for key, rule, site in self._rules(sites):
            self._way(key, rule, chip)
            for name in ("min", "max", "start"):
                given = getattr(rule, name)
                most = site.replicas if rule.max is None or name == "max" else rule.max
                if given is not None and given > most:
                    raise SpecError(
                        self.file, f"{key}.{name}", f"{given}: accepted: up to {most} replicas of {site.role}"
                    )

    def sources(self, chip: Chip) -> frozenset[Source]:
        """Where the figures of a cold start come from."""
        found: set[Source] = set()
        for rule in self.autoscale:
            found |= {rule.engine_start.source, chip.provenance["host_link"]}
            if rule.weights == "neighbour":
                found |= chip.sources_of("scale_out.bandwidth", "scale_out.achieved", "scale_out.latency")
            if rule.storage is not None:
                store = find_storage(rule.storage)
                figures = (store.client_bandwidth, store.read_bandwidth, store.read_latency)
                found |= {figure.source for figure in figures}
        return frozenset(found)

    def attach(
        self,
        fleet: Fronts,
        sites: Sequence[Site],
        chip: Chip,
        *,
        seed: int = 0,
        movers: Sequence[Moving] = (),
        told: Callable[[RequestRecord], None] | None = None,
    ) -> Running:
        """Let the tables come true on a fleet that has not begun; `told` hears of requests that are lost.

        `movers` move requests between the engines of its pools, if anybody does.
        """
        self.check(sites, chip)
        spec = self.failures
        rules = {site.role: (key, rule) for key, rule, site in self._rules(sites)}
        replicas = _replicas(
            fleet, sites, chip.chips_per_node, {role: rule for role, (_, rule) in rules.items()}
        )
        retries = Retries(fleet, 0 if spec is None or spec.on_failure == "lose" else spec.retries, told=told)
        running = Running(fleet, replicas, retries, movers)
        for site in sites:
            if site.role in rules:
                key, rule = rules[site.role]
                running.scale(site, rule, self._way(key, rule, chip))
        if spec is not None:
            by_name = {replica.name: replica for replica in replicas}
            layout = _layout(sites, chip.chips_per_node)
            running.failures.script(
                [
                    Outage(
                        event.at_s,
                        tuple(by_name[name] for name in self._struck(i, event, layout)),
                        event.for_s,
                    )
                    for i, event in enumerate(spec.event)
                ]
            )
            running.failures.draw(_parts(spec, replicas, seed))
        return running

    def _rules(self, sites: Sequence[Site]) -> list[tuple[str, AutoscaleSpec, Site]]:
        """Each pool that is scaled, with its rule and the rule's key."""
        roles, found = {site.role: site for site in sites}, {}
        for index, rule in enumerate(self.autoscale):
            key = "autoscale" if len(self.autoscale) == 1 else f"autoscale.{index}"
            if rule.pool is not None and rule.pool not in roles:
                raise SpecError(self.file, f"{key}.pool", unknown("pool", rule.pool, roles))
            for role in roles if rule.pool is None else (rule.pool,):
                if role in found:
                    raise SpecError(self.file, key, f"the pool {role} has a rule already")
                found[role] = (key, rule, roles[role])
        return list(found.values())

    def _struck(self, index: int, event: OutageSpec, layout: dict[str, tuple[int, ...]]) -> list[str]:
        """Names of the replicas that an outage takes down."""
        key = f"failures.event.{index}"
        if event.instance is not None:
            if event.instance not in layout:
                raise SpecError(self.file, f"{key}.instance", unknown("instance", event.instance, layout))
            return [event.instance]
        last = max(node for nodes in layout.values() for node in nodes)
        if event.node is not None and event.node > last:
            raise SpecError(self.file, f"{key}.node", f"{event.node}: accepted: nodes 0 … {last}")
        return [name for name, nodes in layout.items() if event.node in nodes]

    def _way(self, key: str, rule: AutoscaleSpec, chip: Chip) -> Way:
        link = chip.host_bytes_per_s
        if link is None:
            raise SpecError(
                self.file, f"{key}.weights", f"{chip.name} has no host_link that weights come over"
            )
        if rule.weights == "host":
            return FromHost(link_bytes_per_s=link)
        if rule.storage is None:
            out = chip.scale_out
            if out is None:
                raise SpecError(self.file, f"{key}.weights", f"{chip.name} has no network to a neighbour")
            rate = min(link, out.bytes_per_s * out.achieved)
            return FromNeighbour(link_bytes_per_s=rate, latency_s=out.latency_s)
        try:
            store = find_storage(rule.storage)
        except SpecError as error:
            raise SpecError(self.file, f"{key}.storage", error.problem) from None
        return FromStorage(
            link_bytes_per_s=link,
            client_bytes_per_s=store.client_bandwidth.value,
            whole_bytes_per_s=store.read_bandwidth.value,
            latency_s=store.read_latency.value,
        )


class Running:
    """Replicas of one fleet that come and go while it is played."""

    def __init__(
        self, fleet: Fronts, replicas: Sequence[Replica], retries: Retries, movers: Sequence[Moving] = ()
    ) -> None:
        self.fleet, self.replicas, self.retries, self._movers = fleet, tuple(replicas), retries, movers
        self.ending = Ending(fleet)
        self._over = self.ending.watch()
        self.failures = Failures(fleet, retries, over=self._over, changed=self._cancel, struck=self._call_off)
        self._starts: dict[tuple[Way, float], ColdStarts] = {}

    def scale(self, site: Site, rule: AutoscaleSpec, way: Way) -> None:
        """Put a pool under a rule; pools that load over one way share it."""
        start_s = rule.engine_start.value
        starts = self._starts.get((way, start_s))
        if starts is None:
            starts = ColdStarts(self.fleet, way, start_s=start_s, senders=self._serving, up=_serve)
            self._starts[way, start_s] = starts
        policy = Rule(
            by=By(rule.by),
            target=rule.target,
            least=rule.min,
            most=site.replicas if rule.max is None else rule.max,
            step=rule.step,
            cooldown_up_s=rule.cooldown_up_s,
            cooldown_down_s=rule.cooldown_down_s,
        )
        Scaling(
            self.fleet,
            [replica for replica in self.replicas if replica.name.rpartition("-")[0] == site.role],
            Autoscaler(policy),
            starts,
            rank_bytes=site.coming_bytes(rule),
            interval_s=rule.interval_s,
            over=self._over,
        )

    def play(self, requests: Iterable[Request]) -> list[RequestRecord]:
        """Every request to its end; records as a fleet that stands still gives them, then of the lost."""
        names = []
        for request in requests:
            names.append(request.id)
            self.fleet.send(request)
        self.ending.closing = True
        self.fleet.advance(float("inf"))
        ended_s = max(one.ended_s for front in self.fleet.fronts for one in front.instances)
        self.retries.give_up(ended_s)
        return [*self.retries.whole(self.fleet.records(names)), *self.retries.lost.values()]

    def of(self, pool: Front) -> list[Replica]:
        """A pool's, in the order of its engines."""
        return [one for one in self.replicas if one.pool is pool]

    def kept(self, records: Sequence[RequestRecord]) -> Kept:
        """The account of a run that is over."""
        begin_s = min(record.arrival_s for record in records)
        end_s = max(record.ended_s for record in records)

        def held_chip_s(one: Replica) -> float:
            return one.chips * one.spent_s(HELD if one.scaled else frozenset(State), begin_s, end_s)

        held = dict.fromkeys((one.name.rpartition("-")[0] for one in self.replicas), 0.0)
        for one in self.replicas:
            held[one.name.rpartition("-")[0]] += held_chip_s(one)
        down = frozenset({State.DOWN})
        log = [
            Change(moment_s=at_s, replica=one.name, state=state)
            for one in self.replicas
            for at_s, state in one.log
        ]
        return Kept(
            retried=self.retries.retried,
            retries=self.retries.retries,
            lost=len(self.retries.lost),
            failures=self.failures.count,
            there_chip_s=sum(one.chips for one in self.replicas) * (end_s - begin_s),
            held_chip_s=sum(map(held_chip_s, self.replicas)),
            held=held,
            down_chip_s=sum(one.chips * one.spent_s(down, begin_s, end_s) for one in self.replicas),
            cold_starts_s=tuple(took_s for starts in self._starts.values() for took_s in starts.took_s),
            log=tuple(sorted((one for one in log if one.moment_s <= end_s), key=lambda one: one.moment_s)),
        )

    def _serving(self) -> int:
        return sum(one.chips for one in self.replicas if one.state is State.UP)

    def _call_off(self, replicas: Sequence[Replica], now_s: float) -> None:
        """Moves to and from what has failed; who was under way from there is sent again, or lost."""
        for mover in self._movers:
            pool = mover.front
            of = {index: one.name for one in replicas if one.pool is pool for index in one.engines}
            for engine, torn in mover.strike(of, now_s):
                self.retries.judge([self.fleet.whole(pool, torn)], of[engine], now_s)

    def _cancel(self, replica: Replica, now_s: float) -> None:
        for starts in self._starts.values():
            starts.cancel(replica, now_s)


def _serve(replica: Replica, now_s: float) -> None:
    replica.turn(State.UP, now_s)


def _layout(sites: Sequence[Site], chips_per_node: int) -> dict[str, tuple[int, ...]]:
    """The node of each chip of each replica, by the replica's name."""
    found, chip = {}, 0
    for site in sites:
        for number in range(site.replicas):
            chips = range(chip, chip + site.ranks)
            found[f"{site.role}-{number}"] = tuple(each // chips_per_node for each in chips)
            chip += site.ranks
    return found


def _replicas(
    fleet: Fronts, sites: Sequence[Site], chips_per_node: int, rules: Mapping[str, AutoscaleSpec]
) -> list[Replica]:
    layout, found = _layout(sites, chips_per_node), []
    for front, site in zip(fleet.fronts, sites, strict=True):
        rule = rules.get(site.role)
        begin = site.replicas if rule is None else rule.min if rule.start is None else rule.start
        for number in range(site.replicas):
            name = f"{site.role}-{number}"
            found.append(
                Replica(
                    name,
                    front,
                    range(number * site.groups, (number + 1) * site.groups),
                    nodes=layout[name],
                    state=State.UP if number < begin else State.OFF,
                    scaled=rule is not None,
                )
            )
    return found


def _parts(spec: FailureSpec, replicas: Sequence[Replica], seed: int) -> list[Part]:
    """Everything that fails by chance: chips in the order of the layout, then nodes."""
    stands: list[list[tuple[str, tuple[Replica, ...]]]] = [[], []]
    by_node: dict[int, list[Replica]] = {}
    for replica in replicas:
        for number, node in enumerate(replica.nodes):
            stands[0].append((f"{replica.name} chip {number}", (replica,)))
            if replica not in by_node.setdefault(node, []):
                by_node[node].append(replica)
    stands[1] = [(f"node {node}", tuple(on_it)) for node, on_it in by_node.items()]
    hours = (
        (spec.chip_mtbf_hours, spec.chip_repair_hours),
        (spec.node_mtbf_hours, spec.node_repair_hours),
    )
    return [
        Part(
            name=name,
            replicas=on_it,
            mtbf_s=mtbf * HOUR_S,
            repair_s=repair * HOUR_S,
            seed=(seed, spec.seed, kind, index),
        )
        for kind, (mtbf, repair) in enumerate(hours)
        if mtbf is not None and repair is not None
        for index, (name, on_it) in enumerate(stands[kind])
    ]
