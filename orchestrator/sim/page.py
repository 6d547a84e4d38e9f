"""What does a page about simulated days look like? One HTML file: tables, charts, no script, nothing fetched. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from orchestrator.sim.chart import Chart, svg, swatch
from orchestrator.sim.day import Day
from orchestrator.sim.pictures import Colours, of_fleets, of_latencies, over_rates
from orchestrator.sim.sheets import Sheet, arms_of, rates_of, sheets_of
from orchestrator.sim.studies import Study, told_of

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2733; --soft: #5b6875; --grid: #e3e8ed; --edge: #c9d1d9;
  --c0: #0b6fb8; --c1: #c8501e; --c2: #0d8a62; --c3: #b0457f; --c4: #80650a; --c5: #2f97c9;
  --c6: #5f4bb3; --c7: #4b5563; }
@media (prefers-color-scheme: dark) { :root { --paper: #12171d; --ink: #e4e9ee; --soft: #9aa7b4; --grid: #252d36;
  --edge: #3a4550; --c0: #5fb3f0; --c1: #ff9464; --c2: #43cf9f; --c3: #f097c6; --c4: #dcbb48; --c5: #93d8fb;
  --c6: #b0a2ff; --c7: #c3cbd4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 1.2rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .4rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
p, figcaption + p { color: var(--soft); margin: .2rem 0 .6rem; max-width: 60rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; margin: .4rem 0; padding: 0; }
.legend li { display: flex; align-items: center; gap: .4rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 1rem; }
figure { margin: 0; max-width: 560px; } figcaption { font-weight: 600; }
figure svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
thead th { border-bottom: 1px solid var(--edge); color: var(--soft); font-weight: 600; }
.name { text-align: left; } tbody th { font-weight: 400; } summary { cursor: pointer; margin: .8rem 0; }
.t { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--soft); }
.u { fill: var(--ink); } .g { stroke: var(--grid); fill: none; } .a { stroke: var(--edge); fill: none; }
.l { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .m { stroke: none; } .b { stroke: none; opacity: .22; }
""" + "".join(
    f".l.c{number} {{ stroke: var(--c{number}); }} .m.c{number}, .b.c{number} {{ fill: var(--c{number}); }}\n"
    for number in range(8)
)


def page(studies: Sequence[Study], against: str = "") -> str:
    """Of these, one after the other; with the ratios to the arm `against`, if that is named. Raises ValueError where no
    day of that one is."""
    colours = {arm: number for number, arm in enumerate(arms_of(day for study in studies for day in study.days))}
    body = [_study(study, colours, against) for study in studies]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>',
            "<title>Simulated days</title>",
            f"<style>{_STYLE}</style></head>",
            "<body>",
            "<h1>Simulated days</h1>",
            "<p>Production's gateways, orchestrator and migrations over modelled engines, in virtual time. All arms of"
            " a section served the same requests at the same times.</p>",
            *body,
            "</body></html>",
            "",
        ]
    )


def _study(study: Study, colours: Colours, against: str) -> str:
    days, rates = study.days, rates_of(study.days)
    num_days = len({day.seed for day in days})
    parts = [f"<h2>{escape(study.title)}</h2>", f"<p>{num_days} day{'s' if num_days > 1 else ''} of each arm.</p>"]
    parts.append(_legend(days, colours))
    parts.append(_charts(over_rates(days, colours)))
    parts += [_table(sheet) for sheet in sheets_of(days, against)]
    for rate in rates:
        own = [day for day in days if day.requests_per_s == rate]
        charts = _of_rate(own, colours)
        if len(rates) > 1:
            charts = f"<details><summary>At {rate:g} requests a second</summary>\n{charts}\n</details>"
        parts.append(charts)
    rows = tuple(told_of(study.question))
    asked = _table(Sheet("", ("setting", "value"), rows, 1))
    parts.append(f"<details><summary>What was asked</summary>\n{asked}\n</details>")
    return "\n".join(part for part in parts if part)


def _of_rate(days: Sequence[Day], colours: Colours) -> str:
    return "\n".join(
        [
            "<h3>Latencies</h3>",
            "<p>Share of the requests that had it within this time; the first tenth is left out.</p>",
            _legend(days, colours),
            _charts(of_latencies(days, colours)),
            "<h3>The fleet over time</h3>",
            f"<p>Seed {days[0].seed}. Freeness: free blocks a running request, less what the head of the queue"
            " wants; line: median over the instances, band: from the least to the most.</p>",
            _legend(days, colours),
            _charts(of_fleets(days, colours)),
        ]
    )


def _legend(days: Sequence[Day], colours: Colours) -> str:
    items = (f"<li>{swatch(colours[arm])}{escape(arm)}</li>" for arm in arms_of(days))
    return f'<ul class="legend">{"".join(items)}</ul>'


def _charts(charts: Sequence[Chart]) -> str:
    figures = (f"<figure><figcaption>{escape(chart.title)}</figcaption>\n{svg(chart)}</figure>" for chart in charts)
    return f'<div class="charts">\n{"".join(figures)}\n</div>' if charts else ""


def _table(sheet: Sheet) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        told = []
        for index, cell in enumerate(cells):
            is_name = index < sheet.num_names
            name = "th" if is_name or tag == "th" else "td"
            as_name = ' class="name"' if is_name else ""
            told.append(f"<{name}{as_name}>{escape(cell)}</{name}>")
        return f"<tr>{''.join(told)}</tr>"

    head = f"<h3>{escape(sheet.title)}</h3>" if sheet.title else ""
    note = f"<p>{escape(sheet.note)}</p>" if sheet.note else ""
    rows = "\n".join(row(cells, "td") for cells in sheet.rows)
    table = f"<table><thead>{row(sheet.columns, 'th')}</thead>\n<tbody>{rows}</tbody></table>"
    return f'{head}\n<div class="scroll">{table}</div>\n{note}'
