"""`tongyun specs list [KIND]` and `tongyun specs show NAME`: the facts, with their sources."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tongyun.report import Column
    from tongyun.specs.figure import Figure
    from tongyun.specs.schema import LinkSpec, Spec

app = typer.Typer(
    no_args_is_help=True, help="Chips, fabrics, storage, models, prices and workloads, with sources."
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON in SI units.")]


@app.command("list")
def list_specs(
    kind: Annotated[
        str | None, typer.Argument(help="chips, fabrics, storage, prices, workloads or models.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what is in the catalogue: a table of one kind, or the names of all."""
    from tongyun.errors import InputError, unknown
    from tongyun.report import show, to_json
    from tongyun.specs import find

    if kind is not None and kind not in find.KINDS:
        raise InputError(unknown("kind of spec", kind, find.KINDS))
    if as_json:
        kinds = find.KINDS if kind is None else (kind,)
        listed = {name: [_as_object(name, spec) for spec in _every(name)] for name in kinds}
        typer.echo(to_json(listed if kind is None else listed[kind]))
    elif kind is None:
        show(_names_table())
    else:
        show(_kind_table(kind))


@app.command("show")
def show_spec(
    name: Annotated[str, typer.Argument(help="A name, an alias, KIND/NAME, or the path of a TOML file.")],
    as_json: AsJson = False,
) -> None:
    """Show one spec: every figure with its range, its kind and the text of its source."""
    from tongyun.report import show, to_json

    kind, spec = _find(name)
    if as_json:
        typer.echo(to_json(_as_object(kind, spec)))
    else:
        show(*_spec_parts(kind, spec))


def _every(kind: str) -> Iterator[Any]:
    """Specs of a kind; models as their name and raw config."""
    from tongyun.specs import find

    if kind == "models":
        return ((name, find.find_model(name)[0]) for name in find.names("models"))
    return find.every(kind)


def _find(name: str) -> tuple[str, Any]:
    """The kind and the spec a name means; chips win over the prices that bear their name."""
    from tongyun.errors import InputError, SpecError, unknown
    from tongyun.specs import find
    from tongyun.specs.schema import SCHEMAS

    kind, slash, rest = name.partition("/")
    if slash and kind in find.KINDS:
        return kind, find.find(kind, rest)
    if name.endswith(".toml"):
        return "chips", find.find_chip(name)
    for candidate in ("chips", "fabrics", "storage", "workloads", "models", "prices", "ppus"):
        try:
            return candidate, find.find(candidate, name)
        except SpecError as error:
            if error.file != candidate:  # the file was found and is wrong
                raise
    every_name = [name for kind in (*SCHEMAS, "models") for name in find.names(kind)]
    raise InputError(unknown("spec", name, dict.fromkeys(every_name)))


def _as_object(kind: str, spec: Any) -> dict[str, Any]:
    """A spec for programs: SI values, the SI unit beside each figure."""
    from tongyun.specs.contents import facts, texts

    if kind == "models":
        name, raw = spec
        return {"name": name, "config": raw}
    figures = {
        key: {
            "value": figure.value,
            "low": figure.low,
            "high": figure.high,
            "unit": dimension.si_unit,
            "kind": figure.source,
            "source": figure.reference,
        }
        for key, figure, dimension in facts(spec)
    }
    return {**texts(spec), "figures": figures}


def _names_table() -> Any:
    from tongyun.report import column, table
    from tongyun.specs import find

    rows = [[kind, str(len(find.names(kind))), ", ".join(find.names(kind))] for kind in find.KINDS]
    columns = [column("kind", left=True), column("count"), column("names", left=True, wrap=True)]
    return table(
        "", columns, rows, caption="tongyun specs list KIND for a table, tongyun specs show NAME for one"
    )


def _kind_table(kind: str) -> Any:
    from tongyun.report import table

    columns, row, caption = _LAYOUTS[kind]()
    return table("", columns, [row(spec) for spec in _every(kind)], caption=caption)


def _human(figure: Figure | None, unit: str) -> str:
    """A figure in a given unit with its range: `2.4 (1.6–2.8)`."""
    from tongyun.report import NOTHING, number
    from tongyun.specs.figure import DIMENSIONS

    if figure is None:
        return NOTHING
    dimension = next(d for d in DIMENSIONS if unit in d.units)
    value, low, high = (dimension.within(v, unit) for v in (figure.value, figure.low, figure.high))
    span = f" ({number(low)}–{number(high)})" if figure.has_range else ""
    return number(value, 4) + span


def _letters(spec: Spec) -> str:
    """The kinds of source a spec rests on, as letters; `LEGEND` says which is which."""
    from tongyun.report import SOURCE_STYLE
    from tongyun.specs.contents import facts
    from tongyun.specs.figure import KINDS

    used = {figure.source for _, figure, _ in facts(spec)}
    return " ".join(f"[{SOURCE_STYLE[source]}]{source.value[0]}[/]" for source in KINDS if source in used)


LEGEND = "Sources: v vendor, m measured by others, d derived, a assumed. Ranges in brackets."


def _chips() -> tuple[list[Column], Any, str]:
    from tongyun.report import NOTHING, column
    from tongyun.specs import find
    from tongyun.specs.schema import ChipSpec
    from tongyun.units import DType

    priced = set(find.names("prices"))

    def link(spec: LinkSpec | None, what: str) -> str:
        if spec is None:
            return NOTHING
        return _human(spec.bandwidth, "gb_per_s") if what == "bandwidth" else _human(spec.domain, "count")

    def row(spec: ChipSpec) -> list[str]:
        peak = spec.matmul.peak
        return [
            spec.name + (" †" if spec.status == "pre-release" else ""),
            spec.vendor,
            _human(peak.get(DType.BF16), "tflops"),
            _human(peak.get(DType.FP8), "tflops"),
            _human(spec.memory.capacity, "gb"),
            _human(spec.memory.bandwidth, "tb_per_s"),
            link(spec.scale_up, "bandwidth"),
            link(spec.scale_up, "domain"),
            _human(spec.power.tdp, "w"),
            _human(find.find_price(spec.name).chip_hour, "usd_per_hour") if spec.name in priced else NOTHING,
            _letters(spec),
        ]

    heads = ("bf16 TFLOPS", "fp8", "HBM GB", "TB/s", "link GB/s", "domain", "W", "$/h")
    columns = [
        column("chip", left=True),
        column("vendor", left=True),
        *map(column, heads),
        column("source", left=True),
    ]
    return columns, row, f"Dense peaks; link per chip and direction. † pre-release. {LEGEND}"


def _fabrics() -> tuple[list[Column], Any, str]:
    from tongyun.report import column
    from tongyun.specs.schema import FabricSpec

    def row(spec: FabricSpec) -> list[str]:
        return [
            spec.name + (" †" if spec.status == "pre-release" else ""),
            spec.title,
            spec.kind,
            spec.topology,
            _human(spec.bandwidth, "gb_per_s"),
            _human(spec.latency, "us"),
            _human(spec.achieved, "fraction"),
            _human(spec.endpoints, "count"),
            _letters(spec),
        ]

    left = [column(name, left=True) for name in ("fabric", "what", "kind", "topology")]
    heads = ("GB/s", "latency µs", "achieved", "endpoints")
    return (
        [*left, *map(column, heads), column("source", left=True)],
        row,
        f"Bandwidth per chip and direction. {LEGEND}",
    )


def _storage() -> tuple[list[Column], Any, str]:
    from tongyun.report import column
    from tongyun.specs.schema import StorageSpec

    def row(spec: StorageSpec) -> list[str]:
        return [
            spec.name,
            spec.title,
            _human(spec.capacity, "pb"),
            _human(spec.read_bandwidth, "gb_per_s"),
            _human(spec.write_bandwidth, "gb_per_s"),
            _human(spec.client_bandwidth, "gb_per_s"),
            _human(spec.read_latency, "ms"),
            _letters(spec),
        ]

    heads = ("PB", "read GB/s", "write GB/s", "client GB/s", "latency ms")
    left = [column("storage", left=True), column("what", left=True)]
    return [*left, *map(column, heads), column("source", left=True)], row, LEGEND


def _prices() -> tuple[list[Column], Any, str]:
    from tongyun.report import column
    from tongyun.specs.schema import PriceSpec

    def row(spec: PriceSpec) -> list[str]:
        return [
            spec.chip,
            _human(spec.chip_hour, "usd_per_hour"),
            spec.basis,
            _letters(spec),
            spec.chip_hour.reference,
        ]

    left = [column(name, left=True) for name in ("basis", "kind")]
    columns = [column("chip", left=True), column("$/h"), *left, column("source", left=True, wrap=True)]
    return columns, row, LEGEND


def _workloads() -> tuple[list[Column], Any, str]:
    from tongyun.report import NOTHING, column
    from tongyun.specs.workload import WorkloadSpec

    def row(spec: WorkloadSpec) -> list[str]:
        arrival = spec.arrival
        rate = (
            _human(arrival.users, "count") + " users"
            if arrival.users
            else _human(arrival.rate, "per_s") + " /s"
        )
        return [
            spec.name,
            spec.title,
            f"{arrival.process}, {rate}",
            f"{_human(spec.input.mean, 'tokens')} {spec.input.distribution}",
            f"{_human(spec.output.mean, 'tokens')} {spec.output.distribution}",
            NOTHING if spec.prefix is None else _human(spec.prefix.share, "fraction"),
            _letters(spec),
        ]

    left = [column(name, left=True) for name in ("workload", "what", "arrivals", "input", "output")]
    return [*left, column("share a prefix"), column("source", left=True)], row, LEGEND


def _ppus() -> tuple[list[Column], Any, str]:
    from tongyun.report import column
    from tongyun.specs.ppu import PpuSpec

    def row(spec: PpuSpec) -> list[str]:
        chip = spec.at()
        return [
            spec.name,
            spec.title,
            str(chip.cores),
            f"{chip.clock_hz / 1e9:.2f}",
            f"{chip.peak_flops_per_s() / 1e12:.0f}",
            f"{chip.sram_bytes / 2**10:.0f}",
            f"{chip.l2_bytes / 2**20:.0f}",
            _human(spec.shared.hbm, "gb"),
            _human(spec.shared.hbm_bandwidth, "tb_per_s"),
            _letters(spec),
        ]

    left = [column("ppu", left=True), column("what", left=True)]
    heads = ("cores", "GHz", "bf16 TFLOPS", "SRAM KiB", "L2 MiB", "HBM GB", "TB/s", "source")
    return [*left, *map(column, heads)], row, LEGEND


def _models() -> tuple[list[Column], Any, str]:
    from tongyun.model.config import ModelConfig
    from tongyun.report import NOTHING, column

    def row(spec: tuple[str, dict[str, Any]]) -> list[str]:
        c = ModelConfig.from_hf(spec[1], name=spec[0])
        experts = f"{c.experts.per_token} of {c.experts.count}" if c.experts else NOTHING
        heads = (
            f"{c.heads} / {c.kv_heads} × {c.head_dim}"
            if c.latent is None
            else f"{c.heads} latent {c.latent.kv_rank}"
        )
        return [
            c.name,
            c.family,
            str(c.layers),
            str(c.hidden),
            heads,
            experts,
            f"{c.vocab:,}",
            f"{c.max_positions:,}",
        ]

    heads = ("layers", "hidden", "heads / kv × dim", "experts", "vocab", "positions")
    return (
        [column("model", left=True), column("family", left=True), *map(column, heads)],
        row,
        "From config.json.",
    )


_LAYOUTS = {
    "chips": _chips,
    "fabrics": _fabrics,
    "storage": _storage,
    "prices": _prices,
    "workloads": _workloads,
    "models": _models,
    "ppus": _ppus,
}


def _spec_parts(kind: str, spec: Any) -> Iterator[Any]:
    """What `show` prints, top to bottom."""
    from rich.markup import escape

    from tongyun.report import column, source_tag, table
    from tongyun.specs import find
    from tongyun.specs.contents import texts

    if kind == "models":
        name, raw = spec
        yield f"[bold]{escape(name)}[/]"
        columns = [column("key", left=True), column("value", left=True, wrap=True)]
        yield table("", columns, [[key, escape(str(value))] for key, value in raw.items()])
        return
    words = texts(spec)
    yield f"[bold]{escape(words.pop('title', words['name']))}[/]"
    for key, value in words.items():
        shown = ", ".join(value) if isinstance(value, list) else str(value)
        if shown:
            yield f"[dim]{key}:[/] {escape(shown)}"
    yield _figures_table(spec)
    if kind == "chips" and spec.name in find.names("prices"):
        price = find.find_price(spec.name).chip_hour
        dollars = _human(price, "usd_per_hour")
        yield f"price: {dollars} $/h, {source_tag(price.source)}: {escape(price.reference)}"


def _figures_table(spec: Spec) -> Any:
    """Every figure as its file has it, with the source in full."""
    from rich.markup import escape

    from tongyun.report import column, source_tag, table
    from tongyun.specs.contents import facts
    from tongyun.specs.figure import LABELS, written

    rows = []
    for key, figure, dimension in facts(spec):
        unit, numbers = written(figure, dimension)
        span = f"{numbers['low']:,} – {numbers['high']:,}" if figure.has_range else ""
        value, label = f"{numbers[unit]:,}", LABELS[unit]
        rows.append([key, value, label, span, source_tag(figure.source), escape(figure.reference)])
    columns = [
        column("figure", left=True),
        column("value"),
        column("unit", left=True),
        column("range"),
        column("kind", left=True),
        column("source", left=True, wrap=True),
    ]
    return table("", columns, rows)
