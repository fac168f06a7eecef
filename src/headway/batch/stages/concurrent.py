"""Rows that are asked about elsewhere, many at a time."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque

from headway.batch.flow import Fail
from headway.batch.row import Done, Row

Entry = tuple[Row, Done]


class ConcurrentStage(ABC):
    """At most ``limit`` rows at a time are with tasks, each of which has one row or a few. See flow.Stage."""

    def __init__(self, limit: int = 0) -> None:
        self._limit = self._free = limit
        self._waiting: deque[Entry] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def window(self) -> int:
        return 2 * self._limit

    async def open(self, fail: Fail) -> None:
        self._fail = fail

    def submit(self, rows: list[Row], done: Done) -> None:
        self._waiting.extend((row, done) for row in rows)
        self._start()

    async def close(self) -> None:
        self._waiting.clear()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @abstractmethod
    async def _answer(self, entries: list[Entry]) -> None:
        """Calls ``_leave`` with each entry once. What it raises ends the job."""

    def _next(self) -> list[Entry]:
        """What goes out together: some of those that wait, or none for now. There is at least one, and room for it."""
        return [self._waiting.popleft()]

    def _resize(self, limit: int) -> None:
        self._free += limit - self._limit
        self._limit = limit
        self._start()

    def _start(self) -> None:
        while self._free > 0 and self._waiting and (entries := self._next()):
            self._free -= len(entries)
            task = asyncio.get_running_loop().create_task(self._answer(entries))
            self._tasks.add(task)
            task.add_done_callback(self._end)

    def _leave(self, entries: list[Entry]) -> None:
        self._free += len(entries)
        rows: dict[Done, list[Row]] = {}
        for row, done in entries:
            rows.setdefault(done, []).append(row)
        for done, some in rows.items():
            done(some)
        self._start()

    def _end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)
