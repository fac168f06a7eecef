"""A comparison of executors as a page: a table, and for each workload bars."""

from __future__ import annotations

from headway.bench.comparison import HEADER, Comparison, Row
from headway.bench.html import Bar, document, figure, paragraph, plots, table

_COLOURS = {"uni": "#2f6fb0", "mp": "#3f9c6b", "ray": "#d08a2e"}
_OTHER = "#7b8794"


def page(comparison: Comparison) -> str:
    facts = {**comparison.engine, **comparison.versions}
    rows = comparison.rows
    firsts = frozenset(i for i, row in enumerate(rows) if not i or row.workload != rows[i - 1].workload)
    parts = [
        paragraph(
            f"{comparison.mode}, {comparison.input_len} tokens a prompt; medians of {comparison.repeats} repeats, "
            "engines in turn."
        ),
        paragraph(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)),
        table(HEADER, [comparison.cells(row) for row in rows], firsts),
        *(paragraph(f"{name} did not run: {error}") for name, error in comparison.errors()),
        *(_plots(comparison, key) for key in dict.fromkeys(row.workload for row in rows)),
        "<h2>What the columns say</h2>",
        paragraph(
            "vs uni: the median of the repeats' ratios to uni at the same depth. vs async off: the same, to this "
            "executor without async scheduling. executor tax: share of the time in which there was work and the worker "
            "was in no step, so that the model could have run and did not."
        ),
    ]
    return document("Executors compared", f"{comparison.model}: executors compared", parts)


def _plots(comparison: Comparison, workload: tuple[int, int]) -> str:
    rows = [row for row in comparison.rows if row.workload == workload and row.rows_per_s]
    if not rows:
        return ""
    concurrency, output_len = workload
    rates = [_bar(row, min(row.rows_per_s), row.typical or 0.0, max(row.rows_per_s)) for row in rows]
    taxes = [_bar(row, tax, tax, tax) for row in rows for tax in (row.executor_tax or 0.0,)]
    return plots(
        f"{concurrency} at a time, {output_len} tokens an answer",
        [
            figure("rows a second; the line is from the least to the most", rates, "{:.2f}"),
            figure("executor tax", taxes, "{:.1%}"),
        ],
    )


def _bar(row: Row, least: float, typical: float, most: float) -> Bar:
    name = f"{row.executor}, {'async' if row.async_scheduling else 'sync'}"
    colour = _COLOURS.get(row.executor, _OTHER)
    return Bar(name=name, least=least, typical=typical, most=most, colour=colour, faint=not row.async_scheduling)
