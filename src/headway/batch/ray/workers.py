# pyright: reportUnknownParameterType=false
"""What the actors of Ray Data do: an operator's stages, on the rows of every block that comes."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headway.batch.ray.admission import Makes, Reopened
from headway.batch.ray.blocks import pack, rows_of, table_of
from headway.batch.ray.settle import settle_in
from headway.batch.row import Row
from headway.batch.specs import FunctionSpec
from headway.errors import RowFailed

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """specs: of the stages. last: of the processor's operators. continues: a row that fails stays among the others."""

    specs: Sequence[Makes]
    last: bool
    continues: bool
    own_threads: bool = False
    """OMP_NUM_THREADS is the user's, not Ray's."""

    def check(self, rows: list[Row]) -> None:
        """Raises RowFailed."""
        failed = None if self.continues else next((row for row in rows if row.error is not None), None)
        if failed is not None:
            raise RowFailed(_account(failed))

    def table(self, rows: list[Row], block: pa.Table) -> pa.Table:
        """A row that cannot be stored fails, alone."""
        try:
            return self._table(rows, block)
        except Exception:
            for i, row in enumerate(rows):
                try:
                    self._table([row], block.slice(i, 1))
                except Exception as error:
                    row.fail(error, "output")
            self.check(rows)
            return self._table(rows, block)

    def _table(self, rows: list[Row], block: pa.Table) -> pa.Table:
        return table_of(rows, block, errors=self.continues) if self.last else pack(rows, block)


class FunctionWorker:
    """Stages that are functions, each called with the rows of one batch."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._functions = [spec.load() for spec in work.specs if isinstance(spec, FunctionSpec)]

    def __call__(self, block: pa.Table) -> pa.Table:
        rows = rows_of(block)
        for function in self._functions:
            function([row for row in rows if row.error is None])
        self._work.check(rows)
        return self._work.table(rows, block)


class FlowWorker:
    """One flow on a loop of its own: Ray's own stands still while Ray is not ready for results."""

    def __init__(self, work: Work) -> None:
        if not work.own_threads:
            settle_in()
        self._work = work
        self._flow = Reopened(work.specs)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="headway-flow", daemon=True).start()
        self._submit(self._flow.open()).result()

    async def __call__(self, block: pa.Table) -> pa.Table:
        rows = rows_of(block)
        await asyncio.wrap_future(self._submit(self._flow.answer(rows, self._work.check)))
        return self._work.table(rows, block)

    def __del__(self) -> None:
        if not sys.is_finalizing():  # then the loop's thread is no more, and the wait would never end
            self._submit(self._flow.close()).result()

    def _submit(self, work: Coroutine[Any, Any, object]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)


def _account(row: Row) -> str:
    assert row.error is not None
    columns = repr(row.source)
    shown = columns if len(columns) <= 200 else columns[:199] + "…"
    return (
        f"{row.error.stage}: {row.error.type}: {row.error.message} (should_continue_on_error is off; the row: {shown})"
    )
