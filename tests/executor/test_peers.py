"""What ranks of an external launch tell each other, over real sockets."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from queue import Queue

import pytest

from headway.errors import EngineDead, HeadwayError, WorkerDied, WorkerError
from headway.executor.channel import wire
from headway.executor.peers import Failure, Peers, Result, Steps


class Ranks:
    """Three ranks in one process, each with what its callbacks were given."""

    def __init__(self) -> None:
        pairs = [socket.socketpair() for _ in range(2)]
        self.far = [pair[1] for pair in pairs]
        connections = [{rank + 1: pair[0] for rank, pair in enumerate(pairs)}, {0: self.far[0]}, {0: self.far[1]}]
        self.peers = [Peers(rank, 3, own) for rank, own in enumerate(connections)]
        self.errors: list[Future[HeadwayError]] = [Future() for _ in range(3)]
        self.news: list[Queue[Steps | Result]] = [Queue() for _ in range(3)]
        self.ticked = threading.Event()
        for peers, error, news in zip(self.peers, self.errors, self.news, strict=True):
            peers.listen(news.put, error.set_result, self.ticked.set)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for peers in self.peers:
            peers.close()


@pytest.fixture
def ranks():
    with Ranks() as started:
        yield started


def together(ranks: Ranks, parts: list[bytes]) -> list[list[bytes]]:
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(Peers.exchange, ranks.peers, parts))


def test_an_exchange_gives_everybody_everything_in_rank_order(ranks: Ranks) -> None:
    for turn in range(20):
        parts = [b"%d of %d" % (turn, rank) * 1000 for rank in range(3)]
        assert together(ranks, parts) == [parts] * 3


def test_a_rank_that_ends_is_named_to_everybody(ranks: Ranks) -> None:
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        waiting = pool.submit(ranks.peers[1].exchange, b"")
        ranks.far[1].shutdown(socket.SHUT_RDWR)
        for error in (ranks.errors[0].result(5), ranks.errors[1].result(5)):
            assert isinstance(error, WorkerDied) and error.rank == 2
        with pytest.raises(WorkerDied):
            waiting.result(5)


def test_a_failure_reaches_everybody_with_its_traceback(ranks: Ranks) -> None:
    ranks.peers[2].fail(Failure(2, wire.Failure("ValueError", "no", "the traceback")))
    for future in ranks.errors:
        error = future.result(5)
        assert isinstance(error, WorkerError)
        assert (error.rank, error.kind, error.message, error.remote_traceback) == (
            2,
            "ValueError",
            "no",
            "the traceback",
        )


def test_who_has_said_goodbye_is_not_waited_for(ranks: Ranks) -> None:
    parts = [b"0", b"1", b"2"]
    assert together(ranks, parts) == [parts] * 3
    ranks.peers[2].close()
    with pytest.raises(EngineDead, match="rank 2 has closed"):
        ranks.peers[1].exchange(b"")
    assert not ranks.errors[1].done()


def test_steps_are_passed_on_to_all_others(ranks: Ranks) -> None:
    ranks.peers[1].tell(Steps(1, {7: 1234}))
    for rank in (0, 2):
        assert ranks.news[rank].get(timeout=5) == Steps(1, {7: 1234})
    assert ranks.news[1].empty()


def test_the_time_limits_are_looked_at_whatever_is_said(ranks: Ranks) -> None:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and not ranks.ticked.is_set():
        for peers in ranks.peers:
            peers.tell(Steps(peers.rank, {}))
    assert ranks.ticked.is_set()
