"""Where each microsecond and each byte of a plan's steps goes.

Takes the operators that `cost.step_cost` priced and lays their seconds out, one line for
each operator, collective and share of the host; the lines add up to the step's cost, which
a test holds to the last bit. Where host and device work beside each other, a line has what the
step waits for, and a step says what it does not wait for (`roofline.laid_s`). Prices nothing
itself, and knows no other plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from tongyun.chip.collective import Group, collective_s, exchange_of
from tongyun.chip.kernels import kernels
from tongyun.chip.rates import PRODUCTS, rate_dtype
from tongyun.chip.roofline import Laid, laid_s, steps_s
from tongyun.codesign.answer import Plan
from tongyun.codesign.pools import PoolPrices, Replicas, most_use_s, paired
from tongyun.codesign.space import Question
from tongyun.codesign.speculate import drafts
from tongyun.codesign.steady import Memory, distinct_stages, load_at, memory_by_stage
from tongyun.cost import host_s, step_cost, step_host_s
from tongyun.model.graph import COLLECTIVES, Kind, Operator, StepShape
from tongyun.model.shard import Shard
from tongyun.model.steps import step
from tongyun.specs import Chip, Link
from tongyun.units import Number, Source

BOUNDS = ("compute", "memory", "link", "launch", "host")
"""What the seconds of a line are spent on, if they are spent on one thing."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One operator of one rank over all its `repeat`s in a step."""

    name: str
    kind: str
    repeat: int
    seconds: float
    share: float
    """Of the step's seconds."""
    flops: float
    weight_bytes: float
    kv_bytes: float
    """Keys and values read."""
    activation_bytes: float
    link_bytes: float
    """What the rank puts into, or holds after, a collective."""
    bound: str
    of_roofline: float | None
    """Least seconds at the chip's peak rates, no latency and no launch, over `seconds`; None for the host,
    and where the step does not wait for the operator's work."""
    sources: frozenset[Source]
    crossing: Crossing | None = None


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """An exchange with experts that leaves the domain, over all its `repeat`s."""

    domains: float
    """Those that hold any of a token's experts, on average."""
    network_bytes: float
    """What a rank sends over the network."""
    domain_bytes: float
    """What it passes on within its domain."""
    forwarded_s: float
    direct_s: float
    """With a copy over the network for each rank; the shorter of both is taken."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of one rank of the slowest pipeline stage."""

    what: str
    """`decode`, or `prefill`: the step that also carries a chunk of prompts."""
    seconds: float
    decoding: float
    """Sequences that get a token."""
    prefilling: float
    """Prompt tokens in the step."""
    lines: tuple[Line, ...]
    beside_s: Mapping[str, float] = field(default_factory=dict)
    """What the `host` or the `device` does beside these lines."""

    @property
    def sources(self) -> frozenset[Source]:
        """Of all lines."""
        return frozenset().union(*(line.sources for line in self.lines))

    def by_bound(self) -> dict[str, float]:
        """Seconds by what they are spent on, in the order of `BOUNDS`."""
        sums = dict.fromkeys(BOUNDS, 0.0)
        for line in self.lines:
            sums[line.bound] += line.seconds
        return {bound: seconds for bound, seconds in sums.items() if seconds}


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The two kinds of step of a plan, and how TPOT, TTFT and memory are made of them."""

    plan: Plan
    stage: int
    """The pipeline stage whose mean step is the slowest."""
    decode: Step
    prefill: Step
    prefill_share: float
    """f: share of steps that carry prefill."""
    chunks: int
    """n: steps a prompt takes."""
    use: float
    """ρ: use of the prefill budget."""
    memory: Memory
    """Of one rank of the fullest stage."""
    each: float = 1.0
    """e: tokens that a sequence gets in a step, more than one where drafts are verified."""
    hand_over_s: float = 0.0
    """Of a request's keys and values between two pools, for each of its tokens."""

    @cached_property
    def step_s(self) -> float:
        """t = (1 − f) · decode + f · prefill."""
        return (1 - self.prefill_share) * self.decode.seconds + self.prefill_share * self.prefill.seconds

    @property
    def tpot_s(self) -> dict[str, float]:
        """TPOT by its parts: pp · (1 − f) · decode / e, and pp · f · prefill / e; of two pools decode
        and the hand-over."""
        pp, f = self.plan.shard.pp / self.each, self.prefill_share
        if self.plan.prefill is not None:
            return {"decode": pp * self.decode.seconds, "hand_over": self.hand_over_s}
        return {"decode": pp * (1 - f) * self.decode.seconds, "prefill": pp * f * self.prefill.seconds}


def explain(question: Question, plan: Plan) -> Explanation:
    """Lay out the steps of one plan, at the nominal corner of the chip; of several kinds of replica
    those of the main one."""
    if plan.prefill is not None:
        return _explain_pools(question, plan, plan.prefill)
    shard = plan.shard
    chip = question.at()
    group = np.array([plan.batch / (shard.dp * shard.pp)])
    budget = np.array([float(plan.step_tokens)])
    load = load_at(question, group, budget)
    stage = _slowest_stage(question, chip, shard, [(load.decode, 1 - load.share), (load.mixed, load.share)])
    memories = memory_by_stage(question, shard, group, budget)
    return Explanation(
        plan=plan,
        stage=stage,
        decode=_step(question, chip, (shard, stage), "decode", load.decode),
        prefill=_step(question, chip, (shard, stage), "prefill", load.mixed),
        prefill_share=float(load.share[0]),
        chunks=int(load.chunks[0]),
        use=float(load.use[0]),
        memory=max(memories, key=lambda memory: float(memory.total[0])),
        each=question.step_tokens,
    )


def _explain_pools(question: Question, plan: Plan, first: Plan) -> Explanation:
    """A step of the decode pool, and one of the prefill pool; memory is a decode replica's."""
    chip, shard = question.at(), plan.shard
    group = np.array([plan.batch / (shard.dp * shard.pp)])
    prices = PoolPrices(question, chip, group, np.array([float(first.step_tokens)]))
    shapes = (prices.decode_shape, prices.prefill_shape)
    stages = [
        _slowest_stage(question, chip, cut, [(shape, 1.0)])
        for shape, cut in zip(shapes, (shard, first.shard), strict=True)
    ]
    pools = (prices.prefill(first.shard), prices.decode(shard))
    sides = [
        Replicas(pool=pool, at=0, shard=one.shard, count=one.replicas)
        for pool, one in zip(pools, (first, plan), strict=True)
    ]
    use = float(most_use_s(pools[0].step_s, question.ttft_s)[0])
    both = paired(question, chip, sides[0], sides[1], use)
    memories = prices.decode_memories(shard)
    return Explanation(
        plan=plan,
        stage=stages[0],
        decode=_step(question, chip, (shard, stages[0]), "decode", shapes[0]),
        prefill=_step(question, chip, (first.shard, stages[1]), "prefill", shapes[1]),
        prefill_share=0.0,
        chunks=int(prices.chunks[0]),
        use=both.requests_per_s / sides[0].requests_per_s,
        memory=max(memories, key=lambda memory: float(memory.total[0])),
        each=question.step_tokens,
        hand_over_s=max(pool.hand_over_s for pool in pools) / (question.osl - 1),
    )


def _slowest_stage(
    question: Question, chip: Chip, shard: Shard, shapes: Sequence[tuple[StepShape, Number]]
) -> int:
    """The stage on which steps of these shapes, each as often as is given, take longest."""

    def mean_s(stage: int) -> float:
        mean: Number = 0.0
        for shape, share in shapes:
            cost = step_cost(question.model, shape, chip, shard, question.precision, stage=stage)
            drafted = steps_s(_drafted(question, shape, shard, stage), chip)
            mean = mean + share * (cost.seconds + drafted.seconds)
        return _number(mean)

    stages = [stage for stage, _ in distinct_stages(question.model, shard).values()]
    return max(stages, key=mean_s)


def _drafted(question: Question, shape: StepShape, shard: Shard, stage: int) -> tuple[Operator, ...]:
    """Of a step, what drafts the next one's tokens; on the last stage."""
    return drafts(question, shape, shard) if stage == shard.pp - 1 else ()


def _step(question: Question, chip: Chip, place: tuple[Shard, int], what: str, shape: StepShape) -> Step:
    shard, stage = place
    operators = step(question.model, shape, shard, question.precision, stage=stage)
    drafted = _drafted(question, shape, shard, stage)
    # Drafts are priced by themselves, behind the step.
    laid = [laid_s(several, chip) for several in (operators, drafted)]
    parts = [pair for each in laid for pair in each.parts]
    rows = [
        (op, _number(work), _number(launch))
        for op, (work, launch) in zip((*operators, *drafted), parts, strict=True)
    ]
    hosts = _host(chip, shape, operators)
    seconds = 0.0
    for each in [*(op.repeat * (work + launch) for op, work, launch in rows), *hosts.values()]:
        seconds += each
    act = question.precision.activations.bytes
    lines = [_line(op, chip, (work, launch), seconds, act) for op, work, launch in rows]
    lines += [_host_line(name, spent, seconds, chip) for name, spent in hosts.items()]
    return Step(
        what=what,
        seconds=seconds,
        decoding=_number(shape.decode.sequences) if shape.decode else 0.0,
        prefilling=_number(shape.prefill.tokens) if shape.prefill else 0.0,
        lines=tuple(lines),
        beside_s=_beside(laid),
    )


def _beside(laid: Sequence[Laid]) -> dict[str, float]:
    """What no step waits for, of who has any."""
    sums = {who: sum(_number(each.beside_s.get(who, 0.0)) for each in laid) for who in ("host", "device")}
    return {who: seconds for who, seconds in sums.items() if seconds}


def _line(op: Operator, chip: Chip, parts: tuple[float, float], step_s: float, act_bytes: float) -> Line:
    work, launch = parts
    seconds = op.repeat * (work + launch)
    bound = _bound(op, chip, parts)
    cached = _number(op.read_bytes - op.m * op.k * act_bytes) if op.kind is Kind.ATTENTION else 0.0
    moved, weights = _number(op.moved_bytes), _number(op.weight_bytes)
    return Line(
        name=op.name,
        kind=op.kind.value,
        repeat=op.repeat,
        seconds=seconds,
        share=seconds / step_s,
        flops=op.repeat * _number(op.flops),
        weight_bytes=op.repeat * weights,
        kv_bytes=op.repeat * cached,
        activation_bytes=op.repeat * (moved - weights - cached),
        link_bytes=op.repeat * _number(op.payload_bytes),
        bound=bound,
        of_roofline=op.repeat * max(_ideal_s(op, chip).values()) / seconds if work else None,
        sources=_sources(op, chip, bound),
        crossing=_crossing(op, chip),
    )


def _crossing(op: Operator, chip: Chip) -> Crossing | None:
    found = exchange_of(op, chip, kernels(chip)) if op.kind in COLLECTIVES else None
    if found is None or op.experts is None:
        return None

    def all_of(value: Number) -> float:
        return op.repeat * _number(value)

    return Crossing(
        domains=op.experts.reached(op.ranks / Group.of(op.ranks, chip).inside),
        network_bytes=all_of(found.network_bytes),
        domain_bytes=all_of(found.domain_bytes),
        forwarded_s=all_of(found.forwarded_s),
        direct_s=all_of(found.direct_s),
    )


def _ideal_s(op: Operator, chip: Chip) -> dict[str, float]:
    """Least seconds of one execution, by what would bind at peak rates."""
    if op.kind in COLLECTIVES:
        ideal = replace(chip, scale_up=_perfect(chip.scale_up), scale_out=_perfect(chip.scale_out))
        return {"link": _number(collective_s(op, ideal))}
    ideals = {"memory": _number(op.moved_bytes) / chip.memory_bytes_per_s}
    if op.kind in PRODUCTS:
        ideals["compute"] = _number(op.flops) / chip.peak_flops_per_s[rate_dtype(chip, op.compute)]
    return ideals


def _perfect(link: Link | None) -> Link | None:
    return None if link is None else replace(link, achieved=1.0, latency_s=0.0)


def _bound(op: Operator, chip: Chip, parts: tuple[float, float]) -> str:
    """Launch where it takes longer than the work, else the higher of the chip's ceilings."""
    work, launch = parts
    if launch > work:
        return "launch"
    ideals = _ideal_s(op, chip)
    return max(ideals, key=lambda name: ideals[name])


def _sources(op: Operator, chip: Chip, bound: str) -> frozenset[Source]:
    """Sources of the figures that decide this line."""
    keys = {"overhead.kernel_launch"}
    if bound == "memory":
        keys |= {"memory.bandwidth", "memory.achieved"}
    elif bound == "compute":
        dtype = rate_dtype(chip, op.compute)
        achieved = "attention" if op.kind is Kind.ATTENTION else f"achieved.{dtype}"
        keys |= {f"matmul.peak.{dtype}", f"matmul.{achieved}"}
    elif bound == "link":
        group = Group.of(op.ranks, chip)
        keys |= {"scale_up"} if group.inside > 1 else set()
        keys |= {"scale_out"} if group.nodes > 1 else set()
    return frozenset({Source.ANALYTIC}) | chip.sources_of(*sorted(keys))


def _host(chip: Chip, shape: StepShape, operators: tuple[Operator, ...]) -> dict[str, float]:
    """The host's seconds that are not zero, in the order in which `step_cost` adds them."""
    own_s = step_host_s(chip, operators)
    rest_s = _number(host_s(chip, shape, operators)) - (own_s - chip.step_host_s)
    spent = {"host_step": own_s, "host_sequences": rest_s}
    return {name: seconds for name, seconds in spent.items() if seconds}


def _host_line(name: str, seconds: float, step_s: float, chip: Chip) -> Line:
    return Line(
        name=name,
        kind="host",
        repeat=1,
        seconds=seconds,
        share=seconds / step_s,
        flops=0.0,
        weight_bytes=0.0,
        kv_bytes=0.0,
        activation_bytes=0.0,
        link_bytes=0.0,
        bound="host",
        of_roofline=None,
        sources=chip.sources_of("overhead.step_host"),
    )


def _number(value: object) -> float:
    """A plain float of a scalar, or of a grid of one point."""
    return float(np.asarray(value, dtype=np.float64).reshape(-1)[0])
