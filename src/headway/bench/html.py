"""A comparison as a page that needs nothing else: a table, and for each workload bars with their spread."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from headway.bench.comparison import HEADER, Comparison, Row

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430; }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem }
p { color: #57606c; margin: .2rem 0 } table { border-collapse: collapse; width: 100%; margin: 1.2rem 0 }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #e3e7ec; font-variant-numeric: tabular-nums }
th { color: #57606c; font-weight: 600 } th:first-child, td:first-child { text-align: left }
tr.first td { border-top: 2px solid #b9c1cb } .plots { display: flex; flex-wrap: wrap; gap: 1.5rem }
figure { margin: 0 } figcaption { color: #57606c; font-size: .85rem } svg { max-width: 100%; height: auto }
text { font: 12px system-ui, sans-serif; fill: #1c2430 } .note { fill: #57606c }
"""
_COLOURS = {"uni": "#2f6fb0", "mp": "#3f9c6b", "ray": "#d08a2e"}
_OTHER = "#7b8794"
_WIDTH, _LABEL, _VALUE, _ROW, _BAR = 450, 110, 90, 26, 16
_SPAN = _WIDTH - _LABEL - _VALUE


def page(comparison: Comparison) -> str:
    facts = {**comparison.engine, **comparison.versions}
    said = ", ".join(f"{escape(name)} {escape(str(value))}" for name, value in facts.items() if value is not None)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>Executors compared</title>',
            f"<style>{_STYLE}</style>",
            f"<h1>{escape(comparison.model)}: executors compared</h1>",
            f"<p>{comparison.mode}, {comparison.input_len} tokens a prompt; medians of {comparison.repeats} repeats, "
            "engines in turn.</p>",
            f"<p>{said}</p>",
            _table(comparison),
            *(f"<p>{escape(name)} did not run: {escape(error)}</p>" for name, error in comparison.errors()),
            *(_plots(comparison, key) for key in dict.fromkeys(row.workload for row in comparison.rows)),
            "<h2>What the columns say</h2>",
            "<p>vs uni: the median of the repeats' ratios to uni at the same depth. vs async off: the same, to this "
            "executor without async scheduling. executor tax: share of the time in which there was work and the worker "
            "was in no step, so that the model could have run and did not.</p>",
            "</html>",
        ]
    )


def _table(comparison: Comparison) -> str:
    lines = [f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in HEADER)}</tr>"]
    before = None
    for row in comparison.rows:
        first = ' class="first"' if row.workload != before else ""
        before = row.workload
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in comparison.cells(row))
        lines.append(f"<tr{first}>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _plots(comparison: Comparison, workload: tuple[int, int]) -> str:
    rows = [row for row in comparison.rows if row.workload == workload and row.rows_per_s]
    if not rows:
        return ""
    concurrency, output_len = workload
    rates = [(min(row.rows_per_s), row.typical or 0.0, max(row.rows_per_s)) for row in rows]
    taxes = [(tax, tax, tax) for tax in (row.executor_tax or 0.0 for row in rows)]
    return (
        f"<h2>{concurrency} at a time, {output_len} tokens an answer</h2><div class=plots>"
        + _figure("rows a second; the line is from the least to the most", rows, rates, "{:.2f}")
        + _figure("executor tax", rows, taxes, "{:.1%}")
        + "</div>"
    )


def _figure(caption: str, rows: list[Row], values: Sequence[tuple[float, float, float]], shown: str) -> str:
    """One bar a row; values: least, typical, most."""
    scale = _SPAN / (max(most for _, _, most in values) or 1.0)
    bars = [_bar(i, row, value, scale, shown) for i, (row, value) in enumerate(zip(rows, values))]
    size = f'viewBox="0 0 {_WIDTH} {_ROW * len(rows)}" width="{_WIDTH}"'
    drawing = f'<svg {size} role="img" aria-label="{caption}">{"".join(bars)}</svg>'
    return f"<figure><figcaption>{caption}</figcaption>{drawing}</figure>"


def _bar(index: int, row: Row, value: tuple[float, float, float], scale: float, shown: str) -> str:
    least, typical, most = (v * scale for v in value)
    top, middle = index * _ROW + (_ROW - _BAR) / 2, (index + 0.5) * _ROW
    colour = _COLOURS.get(row.executor, _OTHER)
    name = f"{row.executor}, {'async' if row.async_scheduling else 'sync'}"
    spread = f"M{_LABEL + least:.1f} {middle}H{_LABEL + most:.1f}" if most > least else ""
    return (
        f'<text x="{_LABEL - 8}" y="{middle + 4}" text-anchor="end">{escape(name)}</text>'
        f'<rect x="{_LABEL}" y="{top}" width="{typical:.1f}" height="{_BAR}" rx="2" fill="{colour}"'
        f' fill-opacity="{1 if row.async_scheduling else 0.55}"/>'
        f'<path d="{spread}" stroke="#1c2430" stroke-width="1.5"/>'
        f'<text class="note" x="{_LABEL + max(typical, most) + 6:.1f}" y="{middle + 4}">{shown.format(value[1])}</text>'
    )
