"""A ring of bytes in shared memory: one writer, many readers that each get everything. Nothing here waits.

    word 0: bytes ever written | word 8 (r + 1): bytes ever read by reader r | ... | the bytes

A writer fills what every reader has left behind; a message longer than the ring goes through it in pieces. The counts
are 64-bit words, each written by one process. x86 keeps stores in order; elsewhere there is a fence between bytes and
counts.
"""

from __future__ import annotations

from headway.errors import EngineError
from headway.futex import fence

_LINE = 64  # bytes that processors pass to each other at a time
MAX_MESSAGE = 1 << 31


def ring_size(capacity: int, readers: int) -> int:
    """Bytes of shared memory; a multiple of 64 where capacity is."""
    return _LINE * (1 + readers) + capacity


class RingWriter:
    """The writing side; memory is zero at first. Writes what fits, waits for nobody."""

    def __init__(self, memory: memoryview, readers: int) -> None:
        begin = _LINE * (1 + readers)
        self._counts = memory[:begin].cast("Q")
        self._bytes, self._capacity = memory[begin:], len(memory) - begin
        self._tails = [8 * (1 + r) for r in range(readers)]
        self._head = 0

    def write(self, data: memoryview) -> int:
        """Takes as many bytes as there is room for; how many. The readers still have to be told."""
        size = min(len(data), self._capacity - self.unread())
        begin = self._head % self._capacity
        first = min(size, self._capacity - begin)
        self._bytes[begin : begin + first] = data[:first]
        if size > first:
            self._bytes[: size - first] = data[first:size]
        fence()
        self._head += size
        self._counts[0] = self._head
        return size

    def unread(self) -> int:
        """Bytes that the slowest reader has yet to read; 0 without readers."""
        return max((self._head - self._counts[tail] for tail in self._tails if tail), default=0)

    def behind(self, reader: int) -> bool:
        """Whether a reader has yet to read something."""
        tail = self._tails[reader]
        return tail > 0 and self._counts[tail] < self._head

    def drop(self, reader: int) -> None:
        """That reader is gone: its place in the ring no longer counts."""
        self._tails[reader] = 0


class RingReader:
    """One reading side."""

    def __init__(self, memory: memoryview, readers: int, reader: int) -> None:
        begin = _LINE * (1 + readers)
        self._counts = memory[:begin].cast("Q")
        self._bytes, self._capacity = memory[begin:], len(memory) - begin
        self._tail_word, self._tail = 8 * (1 + reader), 0

    def read(self) -> tuple[bytes, bool]:
        """Everything written since the last read, and whether the writer must be told, as it may wait for room.

        A writer waits when the ring is full, so it is enough to tell it each time that a quarter of the ring is passed.
        """
        size = self._counts[0] - self._tail
        if size == 0:
            return b"", False
        if not 0 < size <= self._capacity:
            raise EngineError(f"the counts of a ring of {self._capacity} bytes make no sense: {size} bytes in it")
        fence()
        begin = self._tail % self._capacity
        data = bytes(self._bytes[begin : begin + size])
        if len(data) < size:
            data += self._bytes[: size - len(data)]
        fence()
        quarter = max(1, self._capacity // 4)
        before, self._tail = self._tail, self._tail + size
        self._counts[self._tail_word] = self._tail
        return data, before // quarter != self._tail // quarter


def frame(message: bytes) -> memoryview:
    """A message with its length before it, as it goes into a ring."""
    assert len(message) <= MAX_MESSAGE, f"a message of {len(message)} bytes"
    return memoryview(len(message).to_bytes(4, "little") + message)


class Unframer:
    """Puts the messages together again."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are whole now. Raises EngineError on a length that nobody writes."""
        rest = self._rest
        rest += data
        messages: list[bytes] = []
        at = 0
        while len(rest) - at >= 4:
            end = at + 4 + int.from_bytes(rest[at : at + 4], "little")
            if end - at - 4 > MAX_MESSAGE:
                raise EngineError(f"no message has {end - at - 4} bytes")
            if end > len(rest):
                break
            messages.append(bytes(rest[at + 4 : end]))
            at = end
        del rest[:at]
        return messages
