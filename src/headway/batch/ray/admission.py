"""Rows enter a flow as others leave it, so that any number of batches can wait and the engine finds the next row."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from headway.batch.config import StageConfig
from headway.batch.engines import Lease
from headway.batch.flow import Flow, Stage
from headway.batch.row import Row
from headway.batch.specs import EngineSpec

_AT_A_TIME = 8
"""Rows are let in once this part of the window is free: what is done for some costs less than for each."""


class Makes(Protocol):
    """The part of a ``headway.batch.specs.Spec`` that counts here."""

    @property
    def workers(self) -> StageConfig: ...

    def make(self) -> Stage: ...


@dataclass(slots=True, eq=False)
class _Batch:
    left: int
    ended: asyncio.Future[None]


class Admission:
    """On the flow's event loop. leases: on the engines in it."""

    def __init__(self, flow: Flow, leases: Sequence[Lease] = ()) -> None:
        self.flow, self._leases = flow, leases
        self._waiting: deque[tuple[Row, _Batch]] = deque()
        self._inside: dict[Row, _Batch] = {}
        self._admitting = False

    async def answer(self, rows: list[Row]) -> None:
        """Waits for all of them; raises what ends the job."""
        batch = _Batch(len(rows), asyncio.get_running_loop().create_future())
        self._waiting.extend((row, batch) for row in rows)
        self._admit()
        if rows:
            await asyncio.wait({batch.ended, self.flow.broken}, return_when=asyncio.FIRST_COMPLETED)
        if self.flow.broken.done():
            self.flow.broken.result()

    async def close(self) -> None:
        """Ends the engines too. Idempotent."""
        await self.flow.close()
        for lease in self._leases:
            await asyncio.to_thread(lease.close)

    def _admit(self) -> None:
        if self._admitting:  # rows may be done before push() returns
            return
        self._admitting = True
        while some := self._next():
            self._inside.update(some)
            self.flow.push([row for row, _ in some], self._leave)
        self._admitting = False

    def _next(self) -> list[tuple[Row, _Batch]]:
        window = self.flow.window
        room = min(window - len(self._inside), len(self._waiting))
        if room < min(window // _AT_A_TIME, len(self._waiting)):
            return []
        return [self._waiting.popleft() for _ in range(room)]

    def _leave(self, rows: list[Row]) -> None:
        for row in rows:
            batch = self._inside.pop(row)
            batch.left -= 1
            if not batch.left and not batch.ended.done():
                batch.ended.set_result(None)
        self._admit()


class Reopened:
    """An admission whose flow is given back after an error, with its engines, and is there again should more rows come.

    Ray Data lets go of a worker when its dataset is done, but not always after an error.
    """

    def __init__(self, specs: Sequence[Makes]) -> None:
        self._specs = specs
        self._inside: Admission | None = None
        self._opening = asyncio.Lock()
        self._calls, self._failed = 0, False

    async def open(self) -> Admission:
        async with self._opening:
            if self._inside is None:
                self._inside = await _opened(self._specs)
            return self._inside

    async def answer(self, rows: list[Row], check: Callable[[list[Row]], None]) -> None:
        """check: of what was answered. Raises what it raises, and what ends the job."""
        self._calls += 1
        try:
            await (await self.open()).answer(rows)
            check(rows)
        except BaseException:
            self._failed = True
            raise
        finally:
            self._calls -= 1
            if self._failed and not self._calls:
                self._failed = False
                await self.close()

    async def close(self) -> None:
        async with self._opening:
            inside, self._inside = self._inside, None
            if inside is not None:
                await inside.close()


async def _opened(specs: Sequence[Makes]) -> Admission:
    leases: list[Lease] = []
    stages: list[Stage] = []
    for spec in specs:
        if isinstance(spec, EngineSpec):
            leases.append(Lease(spec.settings))
            stages.append(spec.make(leases[-1]))
        else:
            stages.append(spec.make())
    admission = Admission(Flow(stages), leases)
    try:
        await admission.flow.open()
    except BaseException:
        await admission.close()
        raise
    return admission
