"""Requests that wait for a slot, in the order in which they get one."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator

from headway.scheduler.state import RequestState


class WaitingQueue:
    """One line per priority, lower first. First come first served keeps them all in one line."""

    def __init__(self, by_priority: bool) -> None:
        self._by_priority = by_priority
        self._lines: dict[int, deque[RequestState]] = {}
        self._priorities: list[int] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[RequestState]:
        for priority in self._priorities:
            yield from self._lines[priority]

    def append(self, state: RequestState) -> None:
        self._line(state).append(state)
        self._size += 1

    def push_front(self, state: RequestState) -> None:
        self._line(state).appendleft(state)
        self._size += 1

    def remove(self, state: RequestState) -> None:
        priority = self.priority(state)
        line = self._lines[priority]
        line.remove(state)
        self._size -= 1
        if not line:
            del self._lines[priority]
            self._priorities.remove(priority)

    def priority(self, state: RequestState) -> int:
        return state.request.priority if self._by_priority else 0

    def _line(self, state: RequestState) -> deque[RequestState]:
        priority = self.priority(state)
        line = self._lines.get(priority)
        if line is None:
            line = self._lines[priority] = deque()
            insort(self._priorities, priority)
        return line
