"""Pages that need nothing else: tables, and bars with their spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

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
_WIDTH, _LABEL, _VALUE, _ROW, _BAR = 450, 110, 90, 26, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """faint: paler than the others of its colour."""

    name: str
    least: float
    typical: float
    most: float
    colour: str
    faint: bool = False


def document(title: str, heading: str, parts: Sequence[str]) -> str:
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return "\n".join([head, f"<h1>{escape(heading)}</h1>", *parts, "</html>"])


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], firsts: frozenset[int] = frozenset()) -> str:
    """firsts: the rows that have a line above them."""
    lines = [f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in header)}</tr>"]
    for i, row in enumerate(rows):
        mark = ' class="first"' if i in firsts else ""
        lines.append(f"<tr{mark}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def plots(heading: str, figures: Sequence[str]) -> str:
    return f"<h2>{escape(heading)}</h2><div class=plots>{''.join(figures)}</div>"


def figure(caption: str, bars: Sequence[Bar], shown: str, label: int = _LABEL) -> str:
    """shown: how a value is written. label: the names' width, of 450."""
    scale = (_WIDTH - label - _VALUE) / (max((bar.most for bar in bars), default=0.0) or 1.0)
    size = f'viewBox="0 0 {_WIDTH} {_ROW * len(bars)}" width="{_WIDTH}"'
    drawn = "".join(_draw(i, bar, scale, shown, label) for i, bar in enumerate(bars))
    drawing = f'<svg {size} role="img" aria-label="{caption}">{drawn}</svg>'
    return f"<figure><figcaption>{caption}</figcaption>{drawing}</figure>"


def _draw(index: int, bar: Bar, scale: float, shown: str, label: int) -> str:
    least, typical, most = (value * scale for value in (bar.least, bar.typical, bar.most))
    top, middle = index * _ROW + (_ROW - _BAR) / 2, (index + 0.5) * _ROW
    spread = f"M{label + least:.1f} {middle}H{label + most:.1f}" if most > least else ""
    value = shown.format(bar.typical)
    return (
        f'<text x="{label - 8}" y="{middle + 4}" text-anchor="end">{escape(bar.name)}</text>'
        f'<rect x="{label}" y="{top}" width="{typical:.1f}" height="{_BAR}" rx="2" fill="{bar.colour}"'
        f' fill-opacity="{0.55 if bar.faint else 1}"/>'
        f'<path d="{spread}" stroke="#1c2430" stroke-width="1.5"/>'
        f'<text class="note" x="{label + max(typical, most) + 6:.1f}" y="{middle + 4}">{value}</text>'
    )
