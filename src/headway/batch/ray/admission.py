"""Rows enter a flow as others leave it, so that any number of batches can wait and the engine finds the next row."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from headway.batch.config import StageConfig
from headway.batch.flow import Flow, Stage
from headway.batch.row import Row

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
    """On the flow's event loop."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._waiting: deque[tuple[Row, _Batch]] = deque()
        self._inside: dict[Row, _Batch] = {}
        self._admitting = False

    async def answer(self, rows: list[Row]) -> None:
        """Waits for all of them; raises what ends the job."""
        batch = _Batch(len(rows), asyncio.get_running_loop().create_future())
        self._waiting.extend((row, batch) for row in rows)
        self._admit()
        if rows:
            await asyncio.wait({batch.ended, self._flow.broken}, return_when=asyncio.FIRST_COMPLETED)
        if self._flow.broken.done():
            self._flow.broken.result()

    def _admit(self) -> None:
        if self._admitting:  # rows may be done before push() returns
            return
        self._admitting = True
        while some := self._next():
            self._inside.update(some)
            self._flow.push([row for row, _ in some], self._leave)
        self._admitting = False

    def _next(self) -> list[tuple[Row, _Batch]]:
        window = self._flow.window
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


async def opened(specs: Sequence[Makes]) -> tuple[Flow, Admission]:
    flow = await Flow([spec.make() for spec in specs]).__aenter__()
    return flow, Admission(flow)
