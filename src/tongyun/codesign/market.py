"""Several models on pools of one kind of chip, with replicas of their own or taking turns on shared ones.

Puts the pools together, sends every request to those of its model, and says what each model
felt and cost. Pools have nothing in common but time: one is what it would be alone. All that
comes out is simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tongyun.cloud.engine.protocol import Switched, total
from tongyun.cloud.latency import Group, LatencyReport, RequestRecord, Slo, grouped, summarise
from tongyun.cloud.migration import Moves
from tongyun.cloud.sched.router import Router
from tongyun.cloud.schedule import Schedule
from tongyun.cloud.several import Several
from tongyun.cloud.workload import Arrival, requests
from tongyun.codesign.at_work import AtWork
from tongyun.codesign.fleet import Fleet, Played
from tongyun.codesign.replicas import Pool
from tongyun.codesign.runs import Ended, Run, ToldTo, dedicated, shared
from tongyun.codesign.sharing import Sharing
from tongyun.codesign.space import Question
from tongyun.codesign.upkeep import Kept, Upkeep
from tongyun.cost import usd_per_mtoken
from tongyun.errors import InputError, unknown
from tongyun.specs import Chip, SharingSpec
from tongyun.specs.classes import MigrationSpec
from tongyun.units import HOUR_S


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model that requests may name."""

    question: Question
    slo: Slo = field(default_factory=Slo)
    share: int = 1
    """Of the requests that name no model, in proportion."""


@dataclass(frozen=True, kw_only=True)
class SloByModel(Slo):
    """Every model's own limits; those of the others are the fields'."""

    models: Mapping[str, Slo]

    def met_by(self, record: RequestRecord) -> bool:
        return self.models[record.model or ""].met_by(record)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Pools, and the models they serve: each with such pools of its own, or all on the same."""

    models: tuple[str, ...]
    pools: tuple[Pool, ...]
    shared: bool

    def moves(self, spec: MigrationSpec | None) -> bool:
        """Whether a model's requests could move so: between engines of its own, where there are several."""
        if spec is None or self.shared:
            return False
        pools = self.pools if spec.prompts else self.pools[-1:]
        return any(pool.plan.replicas * pool.plan.shard.dp > 1 for pool in pools)

    @property
    def chips(self) -> int:
        each = sum(pool.chips for pool in self.pools)
        return each if self.shared else each * len(self.models)


@dataclass(frozen=True, kw_only=True)
class OfModel:
    """What one model's requests felt and cost, over the whole run's time; all models add up to the run."""

    report: LatencyReport | None
    """None without requests."""
    shared: bool
    chips: float
    """Its own, or its share, by tokens computed, of those that it shares."""
    joules: float
    usd_per_mtoken: float | None
    """Of its output tokens, its chips paid over the run's time; None without output or price."""
    switched: Switched
    moves: Moves | None
    """Of its requests between replicas of its own, where any are moved."""


@dataclass(frozen=True, kw_only=True)
class MarketPlayed:
    """A load as several models would have served it."""

    whole: Played
    models: Mapping[str, OfModel]
    chips: int
    kept: Kept | None = None
    """Where replicas come and go: what that did."""


@dataclass(frozen=True, kw_only=True)
class Market:
    """Models by the name requests call them, and the parts of the fleet that serve them."""

    models: Mapping[str, Served]
    parts: tuple[Part, ...]
    sharing: SharingSpec = field(default_factory=SharingSpec)
    prefix_caching: bool = True
    migration: MigrationSpec | None = None
    """How running requests move between the replicas of a model that has several of its own."""
    upkeep: Upkeep | None = None
    """Failures and autoscaling."""

    def __post_init__(self) -> None:
        named = [name for part in self.parts for name in part.models]
        for name in named:
            if name not in self.models:
                raise InputError(unknown("model", name, self.models))
            if named.count(name) > 1:
                raise InputError(f"model '{name}' is in two pools that are not one prefill and one decode")
        missing = next((name for name in self.models if name not in named), None)
        if missing is not None:
            raise InputError(f"no pool serves model '{missing}'; leave `models` out of one, or name it there")

    @property
    def chips(self) -> int:
        return sum(part.chips for part in self.parts)

    @property
    def slo(self) -> SloByModel:
        """Every request is judged by its model's limits; those all models share are the run's."""
        limits = {name: one.slo for name, one in self.models.items()}
        ttft_s, tpot_s = ({getattr(slo, key) for slo in limits.values()} for key in ("ttft_s", "tpot_s"))
        return SloByModel(
            ttft_s=ttft_s.pop() if len(ttft_s) == 1 else None,
            tpot_s=tpot_s.pop() if len(tpot_s) == 1 else None,
            models=limits,
        )

    def named(self, arrivals: Sequence[Arrival], *, seed: int = 0) -> list[Arrival]:
        """Arrivals that all name one of the models: those that named none are drawn by `share`."""
        names = list(self.models)
        shares = np.array([self.models[name].share for name in names], dtype=np.float64)
        rng = np.random.default_rng([seed, len(names)])
        drawn = rng.choice(len(names), size=len(arrivals), p=shares / shares.sum()).tolist()
        for number, arrival in enumerate(arrivals, 1):
            if arrival.model is not None and arrival.model not in self.models:
                raise InputError(f"request {number}: {unknown('model', arrival.model, names)}")
        return [
            arrival if arrival.model is not None else arrival._replace(model=names[index])
            for arrival, index in zip(arrivals, drawn, strict=True)
        ]

    def play(
        self,
        arrivals: Sequence[Arrival],
        router: Callable[[], Router],
        *,
        chip: Chip,
        seed: int = 0,
        schedule: Schedule | None = None,
    ) -> MarketPlayed:
        """Send `arrivals` to their models; the same arguments give the same result to the last bit.

        `router` makes one for each model with replicas of its own; shared ones have `ByModel`.
        """
        if not arrivals:
            raise InputError("the load is empty: nothing to simulate")
        runs, work = self.put_to_work(router, chip=chip, seed=seed)
        if schedule is not None:
            for run in runs:
                run.tell(schedule)
        # One range of tokens for all, so that a request does not depend on the others' models.
        vocabulary = min(one.question.model.vocab for one in self.models.values())
        load = requests(self.named(arrivals, seed=seed), vocabulary=vocabulary, seed=seed)
        records = work.play(load)
        kept = None if work.running is None else work.running.kept(records)
        return self._summed(runs, records, kept, chip)

    def put_to_work(
        self, router: Callable[[], Router], *, chip: Chip, seed: int = 0, told: ToldTo | None = None
    ) -> tuple[list[Run], AtWork]:
        """All pools, and the whole of them with what its file lets happen; the same for who plays a load and
        for who answers requests at its pace."""
        runs = self._runs(router, chip, told)
        several = Several({name: run.front for run in runs for name in run.models})
        movers = tuple(mover for run in runs for mover in run.movers)
        running = None
        if self.upkeep is not None:
            sites = [site for run in runs for site in run.sites]
            lost = None if told is None else told.lost
            running = self.upkeep.attach(several, sites, chip, seed=seed, movers=movers, told=lost)
        return runs, AtWork(front=several, running=running, movers=movers, changing=None)

    def fleet(self, name: str, pools: tuple[Pool, ...]) -> Fleet:
        """The pools as if they were one model's."""
        question = replace(self.models[name].question, chips=sum(pool.chips for pool in pools))
        return Fleet(question=question, pools=pools, prefix_caching=self.prefix_caching)

    def _runs(self, router: Callable[[], Router], chip: Chip, told: ToldTo | None) -> list[Run]:
        """Of all parts in their order; shared pools are called that, with a number if there are several."""
        sharing = [part for part in self.parts if part.shared]
        runs: list[Run] = []
        for part in self.parts:
            number = f"-{sharing.index(part) + 1}" if part.shared and len(sharing) > 1 else ""
            runs += self._runs_of(part, f"shared{number}", router, chip, told)
        return runs

    def _runs_of(
        self, part: Part, label: str, router: Callable[[], Router], chip: Chip, told: ToldTo | None
    ) -> list[Run]:
        fleets = {name: self.fleet(name, part.pools) for name in part.models}
        if not part.shared:
            if part.moves(self.migration):
                fleets = {name: replace(fleet, migration=self.migration) for name, fleet in fleets.items()}
            return [dedicated(name, fleet, router, chip, told) for name, fleet in fleets.items()]
        slos = {name: self.models[name].slo for name in part.models}
        return [shared(Sharing(fleets=fleets, slos=slos, spec=self.sharing, chip=chip), label, told)]

    def _summed(
        self, runs: Sequence[Run], records: Sequence[RequestRecord], kept: Kept | None, chip: Chip
    ) -> MarketPlayed:
        of = {name: run for run in runs for name in run.models}
        by_run: dict[Run, list[RequestRecord]] = {run: [] for run in runs}
        for record in records:
            by_run[of[record.model or ""]].append(record)
        ended = [run.ended(each, kept, chip) for run, each in by_run.items()]
        slo = self.slo
        report = summarise(records, slo)
        groups = grouped(records, lambda record: record.model, slo)
        price = next(iter(self.models.values())).question.price
        chip_usd = None if price is None else price.chip_hour.value * report.duration_s / HOUR_S
        chips = sum(one.chips(report.duration_s) for one in ended)
        upkeep = frozenset() if self.upkeep is None else self.upkeep.sources(chip)
        models: dict[str, OfModel] = {}
        for one in ended:
            models |= of_models(one, groups, report.duration_s, chip_usd)
        return MarketPlayed(
            whole=Played(
                report=report,
                engines=tuple(stats for one in ended for stats in one.stats),
                joules=sum(one.joules for one in models.values()),
                usd_per_mtoken=None
                if price is None or not report.output_tokens
                else float(usd_per_mtoken(report.output_tokens_per_s, chips, price.chip_hour.value)),
                sources=frozenset().union(upkeep, *(run.sources for run in runs)),
                classes=grouped(records, lambda record: record.priority_class, slo),
                moves=_moves(runs),
            ),
            models={name: models[name] for name in self.models},
            chips=self.chips,
            kept=kept,
        )


def _moves(runs: Sequence[Run]) -> Moves | None:
    """Of all models, where any are moved."""
    logs = [log for run in runs for log in run.logs]
    return Moves.total(logs) if logs else None


def of_models(
    ended: Ended, groups: Mapping[str, Group], duration_s: float, chip_usd: float | None
) -> dict[str, OfModel]:
    """What the models of one run felt and cost; shared chips are told by tokens computed."""
    run, joules, chips = ended.run, ended.joules(duration_s), ended.chips(duration_s)
    whole = sum(groups[name].share for name in run.models if name in groups)
    found = {}
    for name in run.models:
        group = groups.get(name)
        # Chips that nobody used are everybody's.
        share = 1 / len(run.models) if not whole else 0.0 if group is None else group.share / whole
        tokens = 0 if group is None else group.report.output_tokens
        found[name] = OfModel(
            report=None if group is None else group.report,
            shared=run.shared,
            chips=share * chips,
            joules=share * joules,
            usd_per_mtoken=None
            if chip_usd is None or not tokens
            else chip_usd * share * chips / tokens * 1e6,
            switched=total(one.switched[name] for one in ended.stats if name in one.switched),
            moves=run.moves,
        )
    return found
