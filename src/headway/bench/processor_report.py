"""What headway bench processor found: as data, as a table and as a page."""

from __future__ import annotations

from statistics import median
from typing import Any

import msgspec

from headway.bench.html import Bar, document, figure, paragraph, plots, table
from headway.bench.processor_modes import MODES, Turn


class Row(msgspec.Struct, kw_only=True):
    """One mode. startup_s: until its first row went in, once; turns: each repeat, in the order they ran.

    slots: requests that its engines run at a time. error: why it did not run, or not to the end.
    """

    mode: str
    engines: int
    slots: int
    startup_s: float | None = None
    turns: list[Turn] = []
    error: str | None = None

    def rates(self, count: str = "rows") -> list[float]:
        """A second, of each repeat. count: a field of Turn."""
        return [getattr(turn, count) / turn.elapsed_s for turn in self.turns]

    def typical(self, count: str = "rows") -> float | None:
        return median(self.rates(count)) if self.turns else None

    @property
    def cached(self) -> float | None:
        """The share of the prompts' tokens that were in the prefix cache."""
        tokens = sum(turn.input_tokens for turn in self.turns)
        return sum(turn.cached_tokens for turn in self.turns) / tokens if tokens else None

    def most(self, name: str) -> Any:
        """Of the repeats; None where none says."""
        return max((value for turn in self.turns if (value := getattr(turn, name)) is not None), default=None)

    @property
    def filled(self) -> float | None:
        values = [turn.filled for turn in self.turns if turn.filled is not None]
        return median(values) if values else None


HEADER = (
    "mode",
    "engines",
    "start s",
    "rows/s",
    "least - most",
    "an engine",
    "tokens in/s",
    "out/s",
    "ratio",
    "cached",
    "in flight",
    "filled",
    "MB",
    "failed",
)
_NOTES = (
    "start s: until the first row went in, once; on Ray, where an engine that stays starts with its first row, until "
    "that was answered. rows/s: from the first row that went in to the last that came out; a conversation of two "
    "turns is one row. an engine: rows/s divided by the engines. ratio: to the first mode here with as many turns, "
    "the median of the repeats' ratios. cached: share of the prompts' tokens that the prefix cache had. in flight: "
    "rows in all steps at a time, at most, and the requests that the engines run at a time. filled: how much of these "
    "was used, on average from the first row out to the last one in. MB: peak memory, unless other processes hold the "
    "engine."
)
_COLOURS = ("#2f6fb0", "#3f9c6b", "#d08a2e", "#8a63b8", "#c2536b", "#7b8794")
_LABEL = 180


class Report(msgspec.Struct, kw_only=True):
    """settings: of the benchmark. engine: of the engines, those that were given and some others."""

    model: str
    settings: dict[str, Any]
    engine: dict[str, Any]
    versions: dict[str, str]
    rows: list[Row]

    def ratio(self, row: Row) -> float | None:
        """To the first mode with as many turns: the median of the repeats' ratios."""
        steps = MODES[row.mode].steps
        base = next((r for r in self.rows if MODES[r.mode].steps == steps and r.turns), None)
        if base is None or base is row:
            return None
        ratios = [ours / theirs for ours, theirs in zip(row.rates(), base.rates())]
        return median(ratios) if ratios else None

    def cells(self, row: Row) -> list[str]:
        """The row under HEADER."""
        rates, typical, peak = row.rates(), row.typical(), row.most("peak_in_flight")
        return [
            row.mode,
            str(row.engines),
            _number(row.startup_s),
            _number(typical),
            f"{min(rates):.2f} - {max(rates):.2f}" if rates else "-",
            _number(None if typical is None else typical / row.engines),
            _number(row.typical("input_tokens")),
            _number(row.typical("output_tokens")),
            _number(self.ratio(row)),
            _percent(row.cached),
            "-" if peak is None else f"{peak} of {row.slots}",
            _percent(row.filled),
            _number(row.most("peak_rss_mb")),
            "-" if not row.turns else str(row.most("failed")),
        ]

    def as_text(self) -> str:
        rows = [list(HEADER), *(self.cells(row) for row in self.rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
        errors = [f"{row.mode}: {row.error}" for row in self.rows if row.error is not None]
        return "\n".join([f"{self.model}, {self._said()}", "", *lines, "", *errors]).rstrip()

    def page(self) -> str:
        ran = [row for row in self.rows if row.turns]
        colours = {row.mode: _COLOURS[i % len(_COLOURS)] for i, row in enumerate(self.rows)}
        rates = [_bar(row, colours, row.rates()) for row in ran]
        shares = [_bar(row, colours, [row.typical() or 0.0], row.engines) for row in ran]
        starts = [_bar(row, colours, [row.startup_s or 0.0]) for row in ran]
        fills = [_bar(row, colours, [row.filled]) for row in ran if row.filled is not None]
        drawn = [
            figure("rows a second; the line is from the least to the most", rates, "{:.2f}", _LABEL),
            figure("rows a second, divided by the engines", shares, "{:.2f}", _LABEL),
            figure("seconds to start", starts, "{:.2f}", _LABEL),
            *([figure("slots in use", fills, "{:.0%}", _LABEL)] if fills else []),
        ]
        facts = {**self.engine, **self.versions}
        parts = [
            paragraph(f"{self._said()}; medians of the repeats, modes in turn."),
            paragraph(", ".join(f"{name} {value}" for name, value in facts.items())),
            table(HEADER, [self.cells(row) for row in self.rows]),
            *(paragraph(f"{row.mode} did not run: {row.error}") for row in self.rows if row.error is not None),
            plots("Compared", drawn) if ran else "",
            "<h2>What the modes are</h2>",
            *(paragraph(f"{row.mode}: {MODES[row.mode].text}") for row in self.rows),
            "<h2>What the columns say</h2>",
            paragraph(_NOTES),
        ]
        return document("Batch processors compared", f"{self.model}: batch processors compared", parts)

    def _said(self) -> str:
        shown = ((name.replace("_", " "), value) for name, value in self.settings.items() if value is not None)
        return ", ".join(f"{name} {value}" for name, value in shown)


def _bar(row: Row, colours: dict[str, str], values: list[float], divided_by: int = 1) -> Bar:
    least, typical, most = (value / divided_by for value in (min(values), median(values), max(values)))
    return Bar(name=row.mode, least=least, typical=typical, most=most, colour=colours[row.mode])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
