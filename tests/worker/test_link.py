"""What one stage sends, the next receives, in order; the two ends are threads here."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import EngineError
from headway.worker.group import open_gloo
from headway.worker.link import Link, SharedLink, SocketLink

SLOTS, SLOT_BYTES = 2, 4096
Ends = tuple[Link, Link]


def shared_ends() -> Ends:
    descriptor = os.memfd_create("link")
    size = SharedLink.size(SLOTS, SLOT_BYTES)
    os.ftruncate(descriptor, size)
    ends = [SharedLink(mmap.mmap(descriptor, size), SLOTS, SLOT_BYTES) for _ in range(2)]
    os.close(descriptor)
    return ends[0], ends[1]


@pytest.fixture(scope="module")
def socket_ends() -> Iterator[Ends]:
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        groups = list(pool.map(lambda rank: open_gloo(store, rank, 2), range(2)))
    ends = [SocketLink(group, 1 - rank, tag=7, slots=SLOTS) for rank, group in enumerate(groups)]
    yield ends[0], ends[1]
    for end in ends:
        end.close()


def pass_on(ends: Ends, sizes: list[int]) -> None:
    arrays = [np.random.default_rng(size).random((size, 3), np.float32) for size in sizes]

    def send() -> None:
        for array in arrays:
            sent = array.copy()
            ends[0].send(sent)
            sent[:] = -1  # the link has its own copy

    thread = threading.Thread(target=send)
    thread.start()
    for array in arrays:
        wide = np.zeros((len(array), 5), np.float32)
        ends[1].recv(wide[:, :3])
        assert (wide[:, :3] == array).all() and not wide[:, 3:].any()
    thread.join()


sizes = st.lists(st.integers(1, SLOT_BYTES // 12), min_size=1, max_size=12)


@given(sizes=sizes)
@settings(max_examples=40, deadline=None)
def test_messages_of_any_size_arrive_in_order_through_shared_memory(sizes: list[int]) -> None:
    pass_on(shared_ends(), sizes)


def test_messages_arrive_in_order_through_sockets(socket_ends: Ends) -> None:
    pass_on(socket_ends, [1, 300, 7, 7, 200, 1])


@pytest.mark.parametrize("receives", [True, False])
def test_a_stage_that_waits_for_one_that_has_ended_raises(receives: bool) -> None:
    here, there = shared_ends()
    closer = threading.Timer(0.05, there.close)
    closer.start()
    with pytest.raises(EngineError, match="has ended"):
        while True:
            here.recv(np.zeros(3)) if receives else here.send(np.ones(3))
    closer.join()
