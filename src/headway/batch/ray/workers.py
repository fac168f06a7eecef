# pyright: reportUnknownParameterType=false
"""What the actors of Ray Data do: an operator's stages, on the rows of every block that comes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headway.batch.ray.admission import Admission, Makes, opened
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
        return table_of(rows, block, errors=self.continues) if self.last else pack(rows)


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
    """One flow on a loop of its own: Ray's own stands still while Ray is not ready for results.

    Ray Data lets go of a worker when its dataset is done, but not always after an error: what the flow holds, such as
    an engine, is given back then, and there again should more rows come.
    """

    def __init__(self, work: Work) -> None:
        if not work.own_threads:
            settle_in()
        self._work = work
        self._inside: Admission | None = None
        self._calls, self._failed = 0, False
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="headway-flow", daemon=True).start()
        self._opening = asyncio.Lock()
        self._submit(self._open()).result()

    async def __call__(self, block: pa.Table) -> pa.Table:
        rows = rows_of(block)
        await asyncio.wrap_future(self._submit(self._answer(rows)))
        return self._work.table(rows, block)

    def __del__(self) -> None:
        self._submit(self._close()).result()

    def _submit(self, work: Coroutine[Any, Any, object]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _answer(self, rows: list[Row]) -> None:
        self._calls += 1
        try:
            admission = await self._open()
            await admission.answer(rows)
            self._work.check(rows)
        except BaseException:
            self._failed = True
            raise
        finally:
            self._calls -= 1
            if self._failed and not self._calls:
                self._failed = False
                await self._close()

    async def _open(self) -> Admission:
        async with self._opening:
            if self._inside is None:
                self._inside = await opened(self._work.specs)
            return self._inside

    async def _close(self) -> None:
        async with self._opening:
            inside, self._inside = self._inside, None
            if inside is not None:
                await inside.close()


def _account(row: Row) -> str:
    assert row.error is not None
    columns = repr(row.source)
    shown = columns if len(columns) <= 200 else columns[:199] + "…"
    return (
        f"{row.error.stage}: {row.error.type}: {row.error.message} (should_continue_on_error is off; the row: {shown})"
    )
