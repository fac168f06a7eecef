"""What a comparison of executors found, as data and as a table."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import msgspec

from headway.bench.report import accounting
from headway.bench.workload import Pass


class Row(msgspec.Struct, kw_only=True):
    """One executor and depth on one workload. rows_per_s: of every repeat, in the order they ran.

    tokens_per_s: generated, of the median repeat. executor_tax, shares: of all repeats. error: why it could not run, or
    not to the end.
    """

    executor: str
    async_scheduling: bool
    concurrency: int
    output_len: int
    num_prompts: int
    startup_s: float | None
    rows_per_s: list[float]
    tokens_per_s: float | None
    steps: int = 0
    executor_tax: float | None = None
    shares: dict[str, float] = {}
    error: str | None = None

    @classmethod
    def of(
        cls,
        executor: str,
        async_scheduling: bool,
        concurrency: int,
        output_len: int,
        num_prompts: int,
        passes: list[Pass],
        *,
        startup_s: float | None,
        error: str | None,
    ) -> Row:
        rates = [num_prompts / one.elapsed_s for one in passes]
        times = [one.times for one in passes]
        return cls(
            executor=executor,
            async_scheduling=async_scheduling,
            concurrency=concurrency,
            output_len=output_len,
            num_prompts=num_prompts,
            startup_s=startup_s,
            rows_per_s=rates,
            tokens_per_s=median(rates) * output_len if passes and passes[0].tokens else None,
            error=error,
            **accounting(sum(times[1:], times[0])) if times else {},
        )

    @property
    def typical(self) -> float | None:
        """Rows a second."""
        return median(self.rows_per_s) if self.rows_per_s else None

    @property
    def workload(self) -> tuple[int, int]:
        return self.concurrency, self.output_len


class Comparison(msgspec.Struct, kw_only=True):
    """engine: threads, kernels and so on, the same for all."""

    model: str
    mode: str
    input_len: int
    repeats: int
    engine: dict[str, Any]
    versions: dict[str, str]
    rows: list[Row]

    def delta_to_uni(self, row: Row) -> float | None:
        """How much faster than uni at the same depth: the median of the repeats' ratios, less 1."""
        return self._delta(row, lambda r: r.executor == "uni" and r.async_scheduling == row.async_scheduling)

    def delta_to_sync(self, row: Row) -> float | None:
        """How much faster than the same executor without async scheduling."""
        return self._delta(row, lambda r: r.executor == row.executor and not r.async_scheduling)

    def _delta(self, row: Row, is_base: Callable[[Row], bool]) -> float | None:
        base = next((r for r in self.rows if r.workload == row.workload and is_base(r)), None)
        if base is None or base is row:
            return None
        ratios = [ours / theirs for ours, theirs in zip(row.rows_per_s, base.rows_per_s)]
        return median(ratios) - 1 if ratios else None

    def cells(self, row: Row) -> list[str]:
        """The row under HEADER."""
        low, high = min(row.rows_per_s, default=0.0), max(row.rows_per_s, default=0.0)
        measured = [
            _number(row.typical),
            f"{low:.2f} - {high:.2f}" if row.rows_per_s else "-",
            _number(row.tokens_per_s),
            _percent(self.delta_to_uni(row)),
            _percent(self.delta_to_sync(row)),
            _percent(row.executor_tax, sign=False),
        ]
        depth = "on" if row.async_scheduling else "off"
        return [row.executor, depth, str(row.concurrency), str(row.output_len), _number(row.startup_s), *measured]

    def as_text(self) -> str:
        rows = [list(HEADER), *(self.cells(row) for row in self.rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
        errors = [f"{name}: {error}" for name, error in self.errors()]
        return "\n".join(
            [f"{self.model}, {self.mode}, {self.input_len} tokens a prompt", "", *lines, "", *errors]
        ).rstrip()

    def errors(self) -> list[tuple[str, str]]:
        """Executor and reason, each once."""
        return list(dict.fromkeys((row.executor, row.error) for row in self.rows if row.error is not None))


HEADER = (
    "executor",
    "async",
    "concurrency",
    "output",
    "start s",
    "rows/s",
    "least - most",
    "tokens/s",
    "vs uni",
    "vs async off",
    "executor tax",
)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None, *, sign: bool = True) -> str:
    return "-" if value is None else f"{value:{'+' if sign else ''}.1%}"
