"""The channel between an engine and the workers of its node: one memfd, so that nothing outlives its processes.

    bell of the engine | bell of the workers | ring of plans (every worker reads it) | a ring of results per worker

Each side waits on one bell for all it could wait for: the engine's rings for results and for room among the plans, the
workers' for plans and for room among results.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from itertools import pairwise

import msgspec

from headway.errors import EngineError
from headway.executor.channel.bell import Bell
from headway.executor.channel.memory import map_shared
from headway.executor.channel.ring import RingReader, RingWriter, Unframer, frame, ring_size

_HEADER, _ENGINE_BELL, _WORKERS_BELL = 4096, 0, 64
_PLANS = 4 << 20
_RESULTS = 2 << 20
_MOST = 59 << 20  # for all rings of results


class Layout(msgspec.Struct, frozen=True, array_like=True):
    """ranks: those that share the memory. plans, results: bytes of those rings, multiples of 64."""

    ranks: list[int]
    plans: int
    results: int

    @classmethod
    def of(cls, ranks: list[int], plans: int = _PLANS, results: int = _RESULTS) -> Layout:
        return cls(ranks, plans, min(results, _MOST // max(1, len(ranks)) // 64 * 64))

    @property
    def nbytes(self) -> int:
        return self.results_at(len(self.ranks))

    def results_at(self, index: int) -> int:
        """Where the ring of results of the worker of that index in ``ranks`` begins."""
        return _HEADER + ring_size(self.plans, len(self.ranks)) + index * ring_size(self.results, 1)


class _Memory:
    """One process's view of it."""

    def __init__(self, fd: int, layout: Layout) -> None:
        self._bytes, self._address = map_shared(fd, layout.nbytes)
        edges = [layout.results_at(i) for i in range(len(layout.ranks) + 1)]
        self.plans = self._bytes[_HEADER : edges[0]]
        self.results = [self._bytes[a:b] for a, b in pairwise(edges)]

    def bell(self, offset: int, ringer: int) -> Bell:
        return Bell(self._bytes[offset : offset + 4], self._address + offset, ringer)


class EngineEnd:
    """The engine's side, used under one lock, but for the bell's value and wait."""

    def __init__(self, layout: Layout) -> None:
        """fd: the memory's descriptor, to pass on and then to close with close_fd."""
        self.layout = layout
        self.fd: int | None = os.memfd_create("headway")
        os.ftruncate(self.fd, layout.nbytes)
        self._memory = _Memory(self.fd, layout)
        self.bell = self.engine_bell(0)
        self._workers_bell = self._memory.bell(_WORKERS_BELL, 0)
        self._plans = RingWriter(self._memory.plans, len(layout.ranks))
        self._results = {r: (RingReader(m, 1, 0), Unframer()) for r, m in zip(layout.ranks, self._memory.results)}

    def engine_bell(self, ringer: int) -> Bell:
        """The engine's bell, for a thread of the engine to ring: each has its own number below 8."""
        return self._memory.bell(_ENGINE_BELL, ringer)

    def close_fd(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def send(self, message: bytes, wait: Callable[[int], None]) -> None:
        """To every worker. While there is no room, calls wait(the bell's value), which must take in results first."""
        data = frame(message)
        while data:
            seen = self.bell.value
            if written := self._plans.write(data):
                self._workers_bell.ring()
                data = data[written:]
            else:
                wait(seen)

    def receive(self) -> list[tuple[int, bytes]]:
        """What has come in: rank and message. Raises EngineError, naming the rank, where that makes no sense."""
        messages: list[tuple[int, bytes]] = []
        for rank, (ring, unframer) in self._results.items():
            try:
                data, tell = ring.read()
                if data:
                    messages += [(rank, m) for m in unframer.feed(data)]
            except EngineError as error:
                raise EngineError(f"rank {rank} wrote what is no message: {error}") from None
            if tell:
                self._workers_bell.ring()
        return messages

    def drop(self, rank: int) -> None:
        """That rank's process is gone: nobody waits for it to read."""
        if rank in self._results:
            self._plans.drop(self.layout.ranks.index(rank))

    def behind(self) -> list[int]:
        """The ranks that have not read all that was sent."""
        return [rank for i, rank in enumerate(self.layout.ranks) if self._plans.behind(i)]


class WorkerEnd:
    """A worker's side, used by one thread. memory: the descriptor in this process; it can be closed afterwards."""

    def __init__(self, memory: int, layout: Layout, rank: int) -> None:
        index = layout.ranks.index(rank)
        mapped = _Memory(memory, layout)
        self._bell = mapped.bell(_WORKERS_BELL, 8 + index)
        self._engine_bell = mapped.bell(_ENGINE_BELL, 8 + index)
        self._plans = RingReader(mapped.plans, len(layout.ranks), index)
        self._results = RingWriter(mapped.results[index], 1)
        self._unframer = Unframer()
        self._messages: deque[bytes] = deque()

    def receive(self) -> bytes:
        """The next message; waits for it."""
        while not self._messages:
            seen = self._bell.value
            data, tell = self._plans.read()
            if tell:
                self._engine_bell.ring()
            if data:
                self._messages += self._unframer.feed(data)
            else:
                self._bell.wait(seen)
        return self._messages.popleft()

    def send(self, message: bytes) -> None:
        """Waits while the ring of results is full."""
        data = frame(message)
        while data:
            seen = self._bell.value
            if written := self._results.write(data):
                self._engine_bell.ring()
                data = data[written:]
            else:
                self._bell.wait(seen)

    def close(self) -> None:
        """The memory goes with the last reference to it."""
