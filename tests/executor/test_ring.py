"""The ring of bytes: whatever the sizes, whoever is slow, every reader gets every message and nobody waits in vain."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.errors import EngineError
from headway.executor.channel.ring import RingReader, RingWriter, Unframer, frame, ring_size


class Simulation:
    """One writer and some readers, step by step in one thread. The writer waits, once the ring is full, until told."""

    def __init__(self, capacity: int, readers: int, messages: list[bytes]) -> None:
        memory = memoryview(bytearray(ring_size(capacity, readers)))
        self.writer = RingWriter(memory, readers)
        self.readers = [RingReader(memory, readers, r) for r in range(readers)]
        self.unframers = [Unframer() for _ in range(readers)]
        self.received: list[list[bytes]] = [[] for _ in range(readers)]
        self.outgoing = memoryview(b"".join(frame(m) for m in messages))
        self.waits = False

    def write(self) -> None:
        if self.outgoing and not self.waits:
            written = self.writer.write(self.outgoing)
            self.outgoing = self.outgoing[written:]
            self.waits = written == 0

    def read(self, reader: int) -> None:
        data, tell = self.readers[reader].read()
        self.received[reader] += self.unframers[reader].feed(data)
        if tell:
            self.waits = False


messages = st.lists(st.binary(max_size=300), max_size=12)
capacities = st.integers(1, 12).map(lambda n: 8 * n)


@given(capacities, messages, st.integers(1, 4), st.lists(st.integers(0, 4), max_size=200))
def test_every_reader_gets_every_message_in_order(
    capacity: int, sent: list[bytes], readers: int, turns: list[int]
) -> None:
    ring = Simulation(capacity, readers, sent)
    for turn in turns:
        ring.read(turn) if turn < readers else ring.write()
    while ring.outgoing or any(ring.writer.behind(r) for r in range(readers)):
        ring.write()
        for reader in range(readers):
            ring.read(reader)
    assert ring.received == [sent] * readers
    assert ring.writer.unread() == 0


@given(capacities, messages, st.integers(1, 4), st.data())
def test_the_writer_waits_for_no_dead_reader(
    capacity: int, sent: list[bytes], readers: int, data: st.DataObject
) -> None:
    ring = Simulation(capacity, readers, sent)
    dead = data.draw(st.sets(st.integers(0, readers - 1)))
    for _ in range(data.draw(st.integers(0, 20))):
        ring.write()
    for reader in dead:
        ring.writer.drop(reader)
    ring.waits = False
    alive = [r for r in range(readers) if r not in dead]
    while ring.outgoing or any(ring.writer.behind(r) for r in alive):
        ring.write()
        for reader in alive:
            ring.read(reader)
    assert [ring.received[r] for r in alive] == [sent] * len(alive)


def test_only_readers_that_have_not_read_are_behind() -> None:
    ring = Simulation(64, 2, [b"plan"])
    ring.write()
    ring.read(0)
    assert [ring.writer.behind(r) for r in range(2)] == [False, True]


@given(st.integers(0, 2**64 - 1))
def test_counts_that_nobody_writes_are_an_error(head: int) -> None:
    memory = memoryview(bytearray(ring_size(64, 1)))
    memory[:8] = head.to_bytes(8, "little")
    reader = RingReader(memory, 1, 0)
    if head <= 64:
        assert len(reader.read()[0]) == head
    else:
        with pytest.raises(EngineError, match="make no sense"):
            reader.read()


def test_a_length_that_nobody_writes_is_an_error() -> None:
    with pytest.raises(EngineError, match="no message has 4294967295 bytes"):
        Unframer().feed(b"\xff\xff\xff\xff")
