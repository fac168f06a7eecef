"""A stage that takes time and no processor, and tells how busy it was: what an engine is to the rows' way there."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from headway.batch.config import StageConfig
from headway.batch.flow import Fail
from headway.batch.row import Done, Row


@dataclass(frozen=True, kw_only=True)
class SlowSpec:
    """slots: rows at a time. seconds: a row, ten times that for every 16th. log: of when how many rows ran."""

    slots: int
    seconds: float
    log: str
    name: str = "slow"
    workers: StageConfig = field(default_factory=StageConfig)

    def make(self) -> SlowStage:
        return SlowStage(self)


class SlowStage:
    name = "slow"

    def __init__(self, spec: SlowSpec) -> None:
        self.window = 2 * spec.slots
        self._spec, self._running = spec, 0
        self._waiting: deque[tuple[Row, Done]] = deque()
        self._random = random.Random(0)

    async def open(self, fail: Fail) -> None:
        self._loop = asyncio.get_running_loop()
        self._log = Path(self._spec.log).open("a", buffering=1)  # noqa: SIM115

    def submit(self, rows: list[Row], done: Done) -> None:
        self._waiting.extend((row, done) for row in rows)
        self._start()

    async def close(self) -> None:
        self._log.close()

    def _start(self) -> None:
        while self._waiting and self._running < self._spec.slots:
            row, done = self._waiting.popleft()
            self._running += 1
            seconds = self._spec.seconds * (10 if self._random.random() < 1 / 16 else 1)
            self._loop.call_later(seconds, self._end, row, done)
        print(time.monotonic(), self._running, file=self._log)

    def _end(self, row: Row, done: Done) -> None:
        self._running -= 1
        done([row])
        self._start()


def fullness(log: Path, slots: int, seconds: float) -> float:
    """The share of the slots that were used, from the first row until no more rows were waiting."""
    marks = [(float(at), int(running)) for at, running in map(str.split, log.read_text().splitlines())]
    last = max(i for i, (_, running) in enumerate(marks) if running == slots)
    busy = sum(running * (end - at) for (at, running), (end, _) in pairwise(marks[: last + 1]))
    return busy / slots / (marks[last][0] - marks[0][0])
