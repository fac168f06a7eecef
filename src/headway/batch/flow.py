"""Stages in a row, on one event loop. A row goes on as soon as a stage is done with it, whatever rows it came with.

push ──> stage ──> stage ──> stage ──> done
           └── a row that fails ────────┘
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Protocol

from headway.batch.row import Done, Row

MIN_WINDOW = 64

Fail = Callable[[BaseException], None]


class Stage(Protocol):
    """name: what a row's error says. All methods are called on the flow's event loop."""

    @property
    def name(self) -> str: ...

    @property
    def window(self) -> int:
        """How many rows inside keep it busy; known once it is open."""
        ...

    async def open(self, fail: Fail) -> None:
        """Whatever takes long; called once, before rows come. fail: for what ends the job, later on."""
        ...

    def submit(self, rows: list[Row], done: Done) -> None:
        """Takes rows in and returns at once; ``done`` is called with each of them once, some or all at a time.

        A row that cannot be answered is one with an error. Raises nothing: what ends the job is told to ``fail``.
        """
        ...

    async def close(self) -> None:
        """Idempotent; also after a failed open(). Rows inside are dropped."""
        ...


class Flow:
    """The caller bounds how many rows are inside at a time, and looks out for what ends the job in ``broken``."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)
        self._ways: dict[int, partial[None]] = {}  # on from each stage, for the caller that came last
        self._open = AsyncExitStack()
        self.broken: asyncio.Future[None]  # never has a result

    async def open(self) -> None:
        """All stages at the same time: one loads a model while another connects."""
        self.broken = asyncio.get_running_loop().create_future()
        for stage in self.stages:
            self._open.push_async_callback(stage.close)
        await asyncio.gather(*(stage.open(self._fail) for stage in self.stages))

    @property
    def window(self) -> int:
        """How many rows inside keep every stage busy; known once it is open."""
        return max(MIN_WINDOW, sum(stage.window for stage in self.stages))

    def push(self, rows: list[Row], done: Done) -> None:
        """done: called with each row once it is answered or has failed, in any order."""
        self._enter(0, done, rows)

    async def answer(self, rows: list[Row]) -> None:
        """Waits for all of them; raises what ends the job."""
        if not rows:
            return
        left, ended = len(rows), asyncio.get_running_loop().create_future()

        def count(some: list[Row]) -> None:
            nonlocal left
            left -= len(some)
            if not left and not ended.done():
                ended.set_result(None)

        self.push(rows, count)
        await asyncio.wait({ended, self.broken}, return_when=asyncio.FIRST_COMPLETED)
        if self.broken.done():
            self.broken.result()

    async def close(self) -> None:
        """Idempotent."""
        await self._open.aclose()

    async def __aenter__(self) -> Flow:
        try:
            await self.open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _fail(self, error: BaseException) -> None:
        if not self.broken.done():
            self.broken.set_exception(error)

    def _enter(self, index: int, done: Done, rows: list[Row]) -> None:
        if index == len(self.stages):
            done(rows)
            return
        well = [row for row in rows if row.error is None]
        if len(well) < len(rows):
            done([row for row in rows if row.error is not None])
        if well:
            self.stages[index].submit(well, self._way(index + 1, done))

    def _way(self, index: int, done: Done) -> Done:
        """The same one for all rows of a caller, so that a stage can hand on together what came apart."""
        way = self._ways.get(index)
        if way is None or way.args[1] != done:
            way = self._ways[index] = partial(self._enter, index, done)
        return way
