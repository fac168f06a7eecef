"""Stages that are a function: of rows, on the event loop or on threads."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from headway.batch.flow import Fail
from headway.batch.row import Done, Row
from headway.errors import RequestError

OnRows = Callable[[list[Row]], None]
"""Changes rows, or fails them; raises nothing."""
RowFunction = Callable[[dict[str, Any]], dict[str, Any]]


def each(name: str, change: Callable[[Row], None]) -> OnRows:
    """Whatever one row raises is that row's."""

    def run(rows: list[Row]) -> None:
        for row in rows:
            try:
                change(row)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # SystemExit would end the event loop, and so hang the job
                row.fail(error, name)

    return run


def preprocess(function: RowFunction) -> OnRows:
    """What it returns is added to the row."""

    def change(row: Row) -> None:
        row.data.update(_columns(function(row.data)))

    return each("preprocess", change)


def postprocess(function: RowFunction) -> OnRows:
    """What it returns is the output row."""

    def change(row: Row) -> None:
        row.data = dict(_columns(function(row.data)))

    return each("postprocess", change)


def _columns(returned: object) -> Mapping[str, Any]:
    if not isinstance(returned, Mapping):
        raise RequestError("row", returned, "the function must return a dict of columns")
    return cast("Mapping[str, Any]", returned)


class Inline:
    """For what takes microseconds a row. load: gives the function; called on a thread when the flow opens."""

    window = 0

    def __init__(self, name: str, load: Callable[[], OnRows]) -> None:
        self.name = name
        self._load = load

    async def open(self, fail: Fail) -> None:
        self._run = await asyncio.to_thread(self._load)

    def submit(self, rows: list[Row], done: Done) -> None:
        self._run(rows)
        done(rows)

    async def close(self) -> None:
        pass


class Threaded:
    """Up to ``concurrency`` batches of up to ``batch_size`` rows at a time. load: as Inline's."""

    def __init__(self, name: str, load: Callable[[], OnRows], batch_size: int, concurrency: int) -> None:
        self.name = name
        self.window = 2 * concurrency * batch_size
        self._load, self._batch_size = load, batch_size
        self._free = concurrency
        self._pool = ThreadPoolExecutor(concurrency, f"headway-{name}")
        self._waiting: deque[tuple[Row, Done]] = deque()

    async def open(self, fail: Fail) -> None:
        self._loop = asyncio.get_running_loop()
        self._run = await asyncio.to_thread(self._load)

    def submit(self, rows: list[Row], done: Done) -> None:
        self._waiting.extend((row, done) for row in rows)
        self._start()

    async def close(self) -> None:
        self._waiting.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        while self._free and self._waiting:
            self._free -= 1
            batch = [self._waiting.popleft() for _ in range(min(self._batch_size, len(self._waiting)))]
            future = self._loop.run_in_executor(self._pool, self._run, [row for row, _ in batch])
            future.add_done_callback(lambda _, batch=batch: self._finish(batch))

    def _finish(self, batch: list[tuple[Row, Done]]) -> None:
        self._free += 1
        by_done: dict[Done, list[Row]] = {}
        for row, done in batch:
            by_done.setdefault(done, []).append(row)
        for done, rows in by_done.items():
            done(rows)
        self._start()
