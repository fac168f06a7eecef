"""What one stage sends, the next receives, in order; the two ends are threads here."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import PeerLost, WorkerDied
from headway.worker.group import open_gloo
from headway.worker.link import Link, SharedLink, SocketLink

SLOTS, SLOT_BYTES = 3, 4096
Ends = tuple[Link, Link]


OTHER_STAGE = f"""
import mmap, sys, time
import numpy as np
from headway.worker.link import SharedLink
memory = mmap.mmap(int(sys.argv[1]), 0)
link = SharedLink(memory, {SLOTS}, {SLOT_BYTES}, sends=sys.argv[2] == "sends", peer=0)
if sys.argv[2] == "sends":
    link.send(np.arange(3))
print("ready", flush=True)
time.sleep(60)
"""


def link_memory() -> int:
    descriptor = os.memfd_create("link")
    os.ftruncate(descriptor, SharedLink.size(SLOTS, SLOT_BYTES))
    return descriptor


def shared_ends() -> tuple[SharedLink, SharedLink]:
    descriptor = link_memory()
    ends = [SharedLink(mmap.mmap(descriptor, 0), SLOTS, SLOT_BYTES, sends=not i, peer=1 - i) for i in range(2)]
    os.close(descriptor)
    return ends[0], ends[1]


@pytest.fixture(scope="module")
def socket_ends() -> Iterator[Ends]:
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        groups = list(pool.map(partial(open_gloo, store, size=2), range(2)))
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


def test_the_count_of_messages_may_wrap_around() -> None:
    memory = link_memory()
    words = mmap.mmap(memory, 0)
    ends = [SharedLink(mmap.mmap(memory, 0), SLOTS, SLOT_BYTES, sends=not i, peer=1 - i) for i in range(2)]
    os.close(memory)
    begin = 2**32 - 2
    for end, line in zip(ends, (0, 128), strict=True):
        struct.pack_into("<I", words, line, begin)
        vars(end)["_count"] = begin
    for i in range(SLOTS):
        ends[0].send(np.array([i]))
    received = np.zeros(1, np.int64)
    for i in range(SLOTS):
        ends[1].recv(received)
        assert received[0] == i


@pytest.mark.parametrize("receives", [True, False])
def test_a_stage_that_waits_for_one_that_has_ended_raises(receives: bool) -> None:
    ends = shared_ends()
    here, there = reversed(ends) if receives else ends
    closer = threading.Timer(0.05, there.close)
    closer.start()
    with pytest.raises(PeerLost, match="has ended"):
        while True:
            here.recv(np.zeros(3)) if receives else here.send(np.ones(3))
    closer.join()


@pytest.mark.parametrize("receives", [True, False])
def test_a_stage_that_waits_for_one_that_is_killed_raises(receives: bool) -> None:
    memory = link_memory()
    here = SharedLink(mmap.mmap(memory, 0), SLOTS, SLOT_BYTES, sends=not receives, peer=5)
    command = [sys.executable, "-c", OTHER_STAGE, str(memory), "sends" if receives else "receives"]
    with subprocess.Popen(command, pass_fds=[memory], stdout=subprocess.PIPE) as there:
        os.close(memory)
        assert there.stdout is not None and there.stdout.readline() == b"ready\n"
        if receives:
            first = np.zeros(3, np.int64)
            here.recv(first)
            assert first.tolist() == [0, 1, 2]
        killer = threading.Timer(0.05, there.kill)
        killer.start()
        began = time.monotonic()
        with pytest.raises(WorkerDied, match="rank 5") as raised:
            while True:
                here.recv(np.zeros(3)) if receives else here.send(np.ones(3))
        assert raised.value.rank == 5 and time.monotonic() - began < 5
        killer.join()
    here.close()
