"""Rows for an event loop: read there, or on a thread where they may be long in coming."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")

READ_AHEAD = 4096


class Feed(Protocol[T]):
    """take() raises what reading raised."""

    @property
    def ended(self) -> bool:
        """There are no more."""
        ...

    def take(self, count: int) -> list[T]:
        """At most so many of the rows that are there."""
        ...

    def start(self, on_rows: Callable[[], None]) -> None:
        """on_rows: called on the running event loop when there is something to take again."""
        ...


class DirectFeed(Generic[T]):
    def __init__(self, rows: Iterator[T]) -> None:
        self._rows = rows
        self.ended = False

    def take(self, count: int) -> list[T]:
        rows = list(islice(self._rows, count))
        self.ended = len(rows) < count
        return rows

    def start(self, on_rows: Callable[[], None]) -> None:
        pass


class ThreadFeed(Generic[T]):
    """Reads a few thousand rows ahead. The thread may be in a read that never returns, so nobody waits for it."""

    def __init__(self, rows: Iterator[T]) -> None:
        self._rows = rows
        self._read: deque[T] = deque()
        self._room = threading.Semaphore(READ_AHEAD)
        self._error: BaseException | None = None
        self._over = False
        self._told = False

    @property
    def ended(self) -> bool:
        return self._over and not self._read and self._error is None

    def take(self, count: int) -> list[T]:
        self._told = False
        taken: list[T] = []
        while self._read and len(taken) < count:
            taken.append(self._read.popleft())
            self._room.release()
        if self._error and not self._read and not taken:
            raise self._error
        return taken

    def start(self, on_rows: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, args=(loop, on_rows), name="headway-reader", daemon=True).start()

    def _run(self, loop: asyncio.AbstractEventLoop, on_rows: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed: the job has ended
            try:
                for row in self._rows:
                    self._room.acquire()
                    self._read.append(row)
                    if not self._told:
                        self._told = True
                        loop.call_soon_threadsafe(on_rows)
            except BaseException as error:
                self._error = error
            self._over = True
            loop.call_soon_threadsafe(on_rows)
