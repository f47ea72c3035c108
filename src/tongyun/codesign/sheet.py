"""What every report page is made of: one HTML file with no script, no font and no network.

Lays out what it is given; knows no plan and no run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from tongyun.report import quantity
from tongyun.specs import ChipSpec, Figure, PriceSpec
from tongyun.specs.contents import facts
from tongyun.units import Source


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page; parts are HTML, empty ones left out."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def card(value: str, span: str, name: str, what: str) -> str:
    """One figure: its value, its range or tail, what it is called and what it means."""
    return (
        f'<div class="card"><b>{escape(value)}</b><em>{escape(span)}</em>'
        f"<span>{escape(name)}</span><small>{escape(what)}</small></div>"
    )


def key(style: str, name: str) -> str:
    """A line of a legend."""
    return f'<span class="name"><i class="key {style}"></i>{escape(name)}</span>'


def figure(title: str, keys: Iterable[tuple[str, str]], drawn: str) -> str:
    """A drawing under its title and a legend of styles and names."""
    legend = "".join(key(style, name) for style, name in keys)
    return f"<figure><figcaption><b>{escape(title)}</b>{legend}</figcaption>{drawn}</figure>"


def chip_facts(chip: ChipSpec, price: PriceSpec | None) -> str:
    """Every figure of a chip and its price, with its kind and its source."""
    rows = [_figure_row(name, figure, dimension.si_unit) for name, figure, dimension in facts(chip)]
    if price is not None:
        rows.append(_figure_row(f"price.chip_hour ({price.basis})", price.chip_hour, "$/h"))
    note = "" if chip.note is None else f"<p>{escape(chip.note)}</p>"
    return (
        f"{note}<details open><summary>Figures</summary>"
        f"{table(['figure', 'value and range', 'kind', 'source'], rows)}</details>"
    )


def _figure_row(key: str, figure: Figure, unit: str) -> list[str]:
    value = quantity(figure.value, unit, low=figure.low, high=figure.high)
    return [key, value, figure.source.value, figure.reference]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def tags(sources: frozenset[Source]) -> str:
    return " ".join(f'<span class="tag">{name}</span>' for name in Source.mix(sources).split("+"))


STYLE = """
:root { color-scheme: light dark; --back: #fbfbf9; --text: #22262b; --soft: #6a7079; --line: #dcdcd6;
  --card: #ffffff; --best: #c2410c; --in: #2563a8; --out: #a9afb8; --memory: #2f6fb3; --compute: #d97a1f;
  --link: #7a56b5; --launch: #9aa1ab; --host: #4d8a57; }
@media (prefers-color-scheme: dark) { :root { --back: #16181b; --text: #e6e6e3; --soft: #9aa0a8;
  --line: #33373d; --card: #1f2226; --best: #f28a4b; --in: #6ea8e6; --out: #5d636c; --memory: #5b9bd8;
  --compute: #e79a4c; --link: #a487dc; --launch: #737a84; --host: #74b380; } }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 32px 20px 80px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 8px; }
h3 { font-size: 15px; margin: 24px 0 4px; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 10px 12px;
  white-space: pre-wrap; word-break: break-word; font-size: 13px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(142px, 1fr)); gap: 12px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px;
  display: flex; flex-direction: column; }
.card b { font-size: 18px; } .card em { font-style: normal; font-size: 13px; color: var(--soft); }
.card small { color: var(--soft); }
.tag { border: 1px solid var(--line); border-radius: 10px; padding: 0 8px; font-size: 12px;
  color: var(--soft); }
.wide { overflow-x: auto; } .name { white-space: nowrap; }
td { white-space: nowrap; } td:last-child { white-space: normal; min-width: 180px; }
table { border-collapse: collapse; font-size: 13px; margin: 8px 0; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 600; }
th, td { padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
summary { cursor: pointer; color: var(--soft); margin: 8px 0; }
svg { width: 100%; height: auto; } svg text { fill: var(--text); font-size: 12px; }
.grid { stroke: var(--line); stroke-width: 1; } .whisker { stroke: var(--text); stroke-width: 1.5; }
.best { fill: var(--best); } .in { fill: var(--in); } .out { fill: var(--out); }
.memory { fill: var(--memory); } .compute { fill: var(--compute); } .link { fill: var(--link); }
.launch { fill: var(--launch); } .host { fill: var(--host); }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); gap: 8px 20px; }
figure { margin: 10px 0 0; min-width: 0; } figcaption { font-size: 13px; color: var(--soft); }
figcaption b { color: var(--text); font-weight: 600; margin-right: 4px; }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .area { opacity: 0.16; stroke: none; }
.rule { stroke: var(--best); stroke-width: 1.2; stroke-dasharray: 4 3; }
.curve.c0 { stroke: var(--in); } .curve.c1 { stroke: var(--compute); } .curve.c2 { stroke: var(--host); }
.curve.c3 { stroke: var(--link); } .curve.c4 { stroke: var(--best); } .curve.c5 { stroke: var(--out); }
.area.c0 { fill: var(--in); } .area.c1 { fill: var(--compute); } .area.c2 { fill: var(--host); }
.area.c3 { fill: var(--link); } .area.c4 { fill: var(--best); } .area.c5 { fill: var(--out); }
.key.c0 { background: var(--in); } .key.c1 { background: var(--compute); }
.key.c2 { background: var(--host); }
.key.c3 { background: var(--link); } .key.c4 { background: var(--best); } .key.c5 { background: var(--out); }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 5px 0 10px; }
.key.best { background: var(--best); } .key.in { background: var(--in); } .key.out { background: var(--out); }
.key.memory { background: var(--memory); } .key.compute { background: var(--compute); }
.key.link { background: var(--link); } .key.launch { background: var(--launch); }
.key.host { background: var(--host); }
"""
