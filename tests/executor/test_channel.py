"""An engine and its workers over real shared memory, and over TCP."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
import zmq

from headway.errors import EngineError
from headway.executor.channel.shared import EngineEnd, Layout, WorkerEnd
from headway.executor.channel.tcp import Hub, RemoteEnd


class Engine:
    """Sends and receives like the real one: what blocks a write takes in results."""

    def __init__(self, layout: Layout) -> None:
        self.end = EngineEnd(layout)
        self.received: list[tuple[int, bytes]] = []
        assert self.end.fd is not None
        self.workers = [WorkerEnd(self.end.fd, layout, rank) for rank in layout.ranks]
        self.end.close_fd()

    def send(self, message: bytes) -> None:
        self.end.send(message, self.wait)

    def wait(self, seen: int) -> None:
        new = self.end.receive()
        self.received += new
        if not new:
            self.end.bell.wait(seen, 20)

    def take(self, count: int) -> list[tuple[int, bytes]]:
        while len(self.received) < count:
            self.wait(self.end.bell.value)
        return self.received


def echo(worker: WorkerEnd, count: int) -> None:
    for _ in range(count):
        worker.send(worker.receive())


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_messages_larger_than_the_rings_go_both_ways_at_a_time(threads: ThreadPoolExecutor) -> None:
    engine = Engine(Layout.of([0, 2], plans=4096, results=1024))
    sent = [os.urandom(size) for size in (0, 100_000, 1, 5000, 4092, 65536)]
    echoes = [threads.submit(echo, worker, len(sent)) for worker in engine.workers]
    for message in sent:
        engine.send(message)
    received = engine.take(2 * len(sent))
    assert [m for rank, m in received if rank == 0] == sent
    assert [m for rank, m in received if rank == 2] == sent
    for each in echoes:
        each.result(10)


def test_many_small_messages_are_not_lost_between_waiting_and_waking(threads: ThreadPoolExecutor) -> None:
    engine = Engine(Layout.of([0, 1, 2]))
    count = 1000
    echoes = [threads.submit(echo, worker, count) for worker in engine.workers]
    for i in range(count):
        engine.send(str(i).encode())
        engine.take(3 * (i + 1))
    for each in echoes:
        each.result(10)


def test_the_engine_does_not_wait_for_a_rank_that_is_gone() -> None:
    engine = Engine(Layout.of([0], plans=4096))
    engine.end.drop(0)
    engine.send(bytes(100_000))


def test_who_waits_sleeps(threads: ThreadPoolExecutor) -> None:
    engine = Engine(Layout.of([0]))
    used: list[float] = []

    def receive() -> bytes:
        began = time.thread_time()
        message = engine.workers[0].receive()
        used.append(time.thread_time() - began)
        return message

    waiting = threads.submit(receive)
    assert engine.end.receive() == []
    began = time.monotonic()
    engine.end.bell.wait(engine.end.bell.value, 0.5)
    assert time.monotonic() - began >= 0.5
    engine.send(b"plan")
    assert waiting.result(10) == b"plan"
    assert used[0] < 0.05


def test_all_the_memory_is_within_64_mb() -> None:
    for ranks in (1, 2, 8, 64, 512):
        assert Layout.of(list(range(ranks))).nbytes <= 64 << 20


@pytest.fixture
def hub() -> Iterator[tuple[Hub, threading.Semaphore]]:
    rung = threading.Semaphore(0)
    hub = Hub("127.0.0.1", rung.release)
    yield hub, rung
    hub.close()


def test_workers_on_other_nodes_talk_over_tcp(hub: tuple[Hub, threading.Semaphore]) -> None:
    engine, rung = hub
    workers = [RemoteEnd(engine.address, rank) for rank in (1, 3)]
    for worker in workers:
        worker.send(b"ready" * 100_000)
    assert rung.acquire(timeout=10) and rung.acquire(timeout=10)
    assert sorted(engine.receive()) == [(1, b"ready" * 100_000), (3, b"ready" * 100_000)]
    for number in (b"first", b"second"):
        for rank in (1, 3):
            engine.send(rank, number)
    for worker in workers:
        assert [worker.receive(), worker.receive()] == [b"first", b"second"]
        worker.close()


def test_a_rank_that_tcp_does_not_reach_is_told(hub: tuple[Hub, threading.Semaphore]) -> None:
    engine, rung = hub
    engine.send(7, b"plan")
    assert rung.acquire(timeout=10)
    assert engine.receive() == [(7, None)]


def test_a_failure_of_the_tcp_thread_is_told(hub: tuple[Hub, threading.Semaphore]) -> None:
    engine, rung = hub
    stray = RemoteEnd(engine.address, "nobody")  # pyright: ignore[reportArgumentType]
    stray.send(b"ready")
    assert rung.acquire(timeout=10)
    with pytest.raises(EngineError, match="nothing passes to and from other nodes: ValueError"):
        engine.receive()
    stray.close()


def test_tcp_lets_in_who_has_the_key_and_nobody_else(hub: tuple[Hub, threading.Semaphore]) -> None:
    engine, rung = hub
    public, secret = zmq.curve_keypair()
    stranger = RemoteEnd(msgspec.structs.replace(engine.address, public_key=public, secret_key=secret), 0)
    stranger.send(b"let me in")
    worker = RemoteEnd(engine.address, 1)
    worker.send(b"ready")
    assert rung.acquire(timeout=10)
    assert engine.receive() == [(1, b"ready")]
    worker.close()
    stranger.close()  # tries for another second
    assert engine.receive() == []
