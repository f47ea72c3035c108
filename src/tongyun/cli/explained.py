"""How `tongyun plan --explain` looks: a table for each kind of step, and its JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tongyun.codesign.explain import Explanation, Line, Step

TERMS = (
    "µs: all repeats of the operator on one rank, launches included. roofline: least time at the chip's "
    "peak rates over that. GFLOP and MB: likewise; link MB is what the rank gives to a collective. "
    "bound: what the time goes to."
)


def as_json(explanation: Explanation) -> dict[str, Any]:
    """The explanation in SI; its lines add up to `seconds` of their step."""
    from tongyun.units import Source

    memory = explanation.memory
    return {
        "stage": explanation.stage,
        "prefill_share": explanation.prefill_share,
        "chunks": explanation.chunks,
        "prefill_use": explanation.use,
        "step_s": explanation.step_s,
        "tpot_s": explanation.tpot_s,
        "memory_bytes": {
            "weights": memory.weights,
            "kv": float(memory.kv[0]),
            "activations": float(memory.activations[0]),
        },
        "steps": [
            {
                "what": step.what,
                "seconds": step.seconds,
                "decoding": step.decoding,
                "prefilling": step.prefilling,
                "by_bound_s": step.by_bound(),
                **({"beside_s": dict(step.beside_s)} if step.beside_s else {}),
                "lines": [
                    {
                        "name": line.name,
                        "kind": line.kind,
                        "repeat": line.repeat,
                        "seconds": line.seconds,
                        "share": line.share,
                        "flops": line.flops,
                        "weight_bytes": line.weight_bytes,
                        "kv_bytes": line.kv_bytes,
                        "activation_bytes": line.activation_bytes,
                        "link_bytes": line.link_bytes,
                        "bound": line.bound,
                        "of_roofline": line.of_roofline,
                        "source": Source.mix(line.sources),
                        **({} if line.crossing is None else {"crossing": asdict(line.crossing)}),
                    }
                    for line in step.lines
                ],
            }
            for step in (explanation.decode, explanation.prefill)
        ],
    }


def tables(explanation: Explanation) -> list[RenderableType]:
    """What makes TPOT, then the two kinds of step line by line."""
    shard = explanation.plan.shard
    share = explanation.prefill_share
    parts = explanation.tpot_s
    place = f" (stage {explanation.stage}, the slowest of {shard.pp})" if shard.pp > 1 else ""
    if explanation.plan.prefill is not None:
        summary = (
            f"[bold]Where the time goes[/]{place}: TPOT {sum(parts.values()) * 1e3:.3g} ms = "
            f"{parts['decode'] * 1e3:.3g} ms in decode steps + {parts['hand_over'] * 1e3:.3g} ms of the "
            f"hand-over; a prompt takes {explanation.chunks} steps of the prefill pool, "
            f"{explanation.use:.0%} in use"
        )
        return [summary, *(_table(step) for step in (explanation.decode, explanation.prefill))]
    summary = (
        f"[bold]Where the time goes[/]{place}: TPOT {sum(parts.values()) * 1e3:.3g} ms = "
        f"{parts['decode'] * 1e3:.3g} ms in decode steps + {parts['prefill'] * 1e3:.3g} ms in steps that "
        f"carry prefill, which are {share:.1%} of all; a prompt takes {explanation.chunks} of them"
    )
    return [summary, *(_table(step) for step in (explanation.decode, explanation.prefill))]


def _table(step: Step) -> RenderableType:
    from tongyun.report import column, quantity, source_tag, table

    carried = f" and {step.prefilling:.4g} prompt tokens" if step.prefilling else ""
    bounds = ", ".join(f"{name} {part / step.seconds:.0%}" for name, part in step.by_bound().items())
    title = f"{step.what} step: {quantity(step.seconds, 's')} for {step.decoding:.4g} sequences{carried}"
    heads = ("×", "µs", "share", "GFLOP", "weight MB", "KV MB", "act. MB", "link MB", "roofline")
    columns = [
        column(f"{step.what} step", left=True),
        *(column(head) for head in heads),
        column("bound", left=True),
        column("source", left=True, wrap=True),
    ]
    lines = [_row(line) for line in step.lines]
    beside = "".join(
        f" Beside that the {who} is at work for {quantity(spent, 's')}, {source_tag(step.sources)}."
        for who, spent in step.beside_s.items()
    )
    crossings = "".join(f" {_crossing(line)}" for line in step.lines if line.crossing is not None)
    return table(title, columns, [*lines, _total(step)], caption=f"{bounds}.{beside}{crossings} {TERMS}")


def _crossing(line: Line) -> str:
    """How an exchange leaves the domain, in words."""
    from tongyun.report import quantity

    way = line.crossing
    assert way is not None
    parts = f"{way.network_bytes / 1e6:.4g} MB over the network and {way.domain_bytes / 1e6:.4g} MB on inside"
    if way.direct_s <= way.forwarded_s:
        return (
            f"{line.name}: straight to every rank, {quantity(way.direct_s, 's')}; once to each domain "
            f"{quantity(way.forwarded_s, 's')}."
        )
    return (
        f"{line.name}: once to each of {way.domains:.3g} domains, {parts}, both at once, "
        f"{quantity(way.forwarded_s, 's')}; straight to every rank {quantity(way.direct_s, 's')}."
    )


def _row(line: Line) -> list[str]:
    from tongyun.report import NOTHING, number, source_tag

    sizes = (line.weight_bytes, line.kv_bytes, line.activation_bytes, line.link_bytes)
    return [
        line.name,
        str(line.repeat),
        number(line.seconds * 1e6),
        f"{line.share:.1%}",
        number(line.flops / 1e9) if line.flops else NOTHING,
        *(number(size / 1e6) if size else NOTHING for size in sizes),
        NOTHING if line.of_roofline is None else f"{line.of_roofline:.0%}",
        line.bound,
        source_tag(line.sources),
    ]


def _total(step: Step) -> list[str]:
    from tongyun.report import number

    def total(field: str) -> str:
        return number(sum(getattr(line, field) for line in step.lines) / 1e6)

    flops = number(sum(line.flops for line in step.lines) / 1e9)
    sizes = (total(f"{kind}_bytes") for kind in ("weight", "kv", "activation", "link"))
    return ["[bold]all[/]", "", number(step.seconds * 1e6), "100.0%", flops, *sizes, "", "", ""]
