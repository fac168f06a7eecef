"""Rows from a feed through a flow into an output: as many inside as keep the flow busy, and no more in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from headway.batch.feed import Feed
from headway.batch.flow import Flow
from headway.batch.ledger import Answer, answer_of
from headway.batch.output import Output
from headway.batch.readers import InputRow
from headway.batch.row import Row
from headway.errors import ConfigError

WINDOWS_AHEAD = 16
"""How far, in windows, rows may be answered ahead of the oldest that runs: what waits to be written is in memory."""

BURST = 1024
"""Rows given to a flow before the event loop has a turn."""

Item = InputRow | Answer
"""A row to answer, or one that is answered already."""


class Pump:
    """One pass over an input. window: rows inside the flow at a time. on_done: hears of answers as they come."""

    def __init__(
        self, flow: Flow, feed: Feed[Item], output: Output, window: int, on_done: Callable[[list[Answer]], None]
    ) -> None:
        self._flow, self._feed, self._output, self._on_done = flow, feed, output, on_done
        self._window = window
        self._held = {index: answer.digest for index, answer in output.waiting.items()}
        self._inside = 0
        self._next = output.following
        self._filling = False
        self._ended: asyncio.Future[None]
        self._due = asyncio.Event()

    async def run(self, flush_interval_s: float) -> None:
        """Every row is done then. Raises what ends the job; what is done is committed or in the output's hands."""
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        self._flow.broken.add_done_callback(self._break)
        flushing = loop.create_task(self._flush(flush_interval_s))
        flushing.add_done_callback(self._break)
        try:
            self._feed.start(self._fill)
            self._fill()
            await self._ended
        finally:
            if not self._ended.done():  # cancelled
                self._ended.cancel()
            self._flow.broken.remove_done_callback(self._break)
            self._due.set()
            await asyncio.wait({flushing})
        flushing.result()  # it may have failed as the last row was done

    def _break(self, cause: asyncio.Future[None]) -> None:
        if not cause.cancelled() and (error := cause.exception()):
            self._end(error)

    def _end(self, error: BaseException | None = None) -> None:
        if self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)

    def _fill(self) -> None:
        """Not again from within: a flow may be done with a row at once."""
        if self._filling or self._ended.done():
            return
        self._filling = True
        try:
            given = 0
            while given < BURST and (room := self._room()):
                items = self._feed.take(room)
                if not items:
                    break
                given += len(items)
                self._give(items)
            if given >= BURST:
                asyncio.get_running_loop().call_soon(self._fill)
            elif self._feed.ended and not self._inside:
                self._end()
        except Exception as error:
            self._end(error)
        finally:
            self._filling = False

    def _room(self) -> int:
        """How many rows may be read now."""
        if self._output.failure or self._ended.done():
            return 0
        ahead = self._output.following + WINDOWS_AHEAD * self._window - self._next
        return max(0, min(self._window - self._inside, ahead, BURST))

    def _give(self, items: list[Item]) -> None:
        rows: list[Row] = []
        copied: list[Answer] = []
        for item in items:
            if item.index in self._held:
                self._check_held(item)
            elif isinstance(item, Answer):
                copied.append(item)
            else:
                rows.append(item)
        self._next = items[-1].index + 1
        self._inside += len(rows)
        if copied:
            self._output.put(copied)
            self._on_done(copied)
        if rows:
            self._flow.push(rows, self._done)

    def _check_held(self, item: Item) -> None:
        if self._held.pop(item.index) != item.digest:
            raise changed(item.index + 1)

    def _done(self, rows: list[Row]) -> None:
        if self._ended.done():
            return
        try:
            self._inside -= len(rows)
            answers = [self._answer(row) for row in cast("list[InputRow]", rows)]
            self._output.put(answers)
            self._on_done(answers)
        except Exception as error:
            self._end(error)
            return
        if self._output.is_due:
            self._due.set()
        self._fill()

    def _answer(self, row: InputRow) -> Answer:
        record = self._output.sink.record
        try:
            answer = record(row)
            if row.error is None and answer.get("error") is not None:
                raise ValueError("an answered row has a column error, which is for what went wrong")
        except Exception as error:
            row.fail(error, "output")
            answer = record(row)
        return answer_of(row, answer)

    async def _flush(self, interval_s: float) -> None:
        """Commits from time to time; what is slow of that on a thread."""
        while not self._ended.done():
            await asyncio.wait(
                {self._ended, due := asyncio.ensure_future(self._due.wait())},
                timeout=interval_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            due.cancel()
            self._due.clear()
            state = self._output.prepare()
            if state:
                await asyncio.to_thread(self._output.make_durable, state)


def changed(rows: int) -> ConfigError:
    return ConfigError(
        "input", f"rows 1 to {rows}", "are not those of the job that is to be resumed; without resume it starts over"
    )
