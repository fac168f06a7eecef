"""How the stages of a pipeline reach each other: rows go on from stage to stage, tokens from the last to the first.

Each tensor parallel rank talks to its counterparts. A link goes one way and holds a few messages, so that a sender
need not wait for a receiver that is still busy with the one before.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from headway import futex
from headway.errors import EngineError, PeerLost, WorkerDied
from headway.ops.cpu.comm import LINKS_REGION, REGION_BITS, START_TIMEOUT_S, map_region
from headway.worker.group import open_gloo, open_store, share_memory

if TYPE_CHECKING:
    from headway.config.settings import EngineConfig
    from headway.messages import RankGroup

Array = NDArray[Any]

_LINE = 128  # bytes that do not share a cache line with others, nor the line fetched with it
_LINES = 5
_COUNT_MASK = 0xFFFF_FFFF
_LINK_BITS = 33


class Link(Protocol):
    """One way, from one rank to one other."""

    def send(self, array: Array) -> None:
        """Copies it. Waits while the link is full."""
        ...

    def recv(self, into: Array) -> None:
        """Waits for the next message, of the same shape and type."""
        ...

    def close(self) -> None:
        """A peer that waits raises PeerLost; WorkerDied where the process ended without it."""
        ...


class SharedLink:
    """Slots in shared memory that take turns: small messages stay in the cache, large ones are copied once a side.

        line 0: messages sent | 1: received | 2: closed | 3: the sender's process | 4: the receiver's | slot 0 | ...

    The memory is zero at first. sent and received (modulo 2**32) are each written by one side.
    """

    def __init__(self, memory: mmap.mmap, slots: int, slot_bytes: int, *, sends: bool, peer: int) -> None:
        """sends: which end this is. peer: the rank at the other one."""
        words = [ctypes.c_uint32.from_buffer(memory, i * _LINE) for i in range(_LINES)]
        self._sent, self._received, self._closed = words[:3]
        mine, self._pid = words[3:] if sends else reversed(words[3:])
        mine.value = os.getpid()
        self._bytes = np.frombuffer(memory, np.uint8, slots * slot_bytes, _LINES * _LINE).reshape(slots, slot_bytes)
        self._count = 0
        self._peer, self._pidfd = peer, -1
        self._deadline = time.monotonic() + START_TIMEOUT_S

    @staticmethod
    def size(slots: int, slot_bytes: int) -> int:
        return _LINES * _LINE + slots * slot_bytes

    def send(self, array: Array) -> None:
        self._wait(self._received, self._count - len(self._bytes))
        np.copyto(self._slot(array), array)
        self._pass(self._sent)

    def recv(self, into: Array) -> None:
        self._wait(self._sent, self._count)
        np.copyto(into, self._slot(into))
        self._pass(self._received)

    def close(self) -> None:
        self._closed.value = 1
        for word in (self._sent, self._received):
            futex.wake(ctypes.addressof(word))
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _slot(self, like: Array) -> Array:
        assert like.nbytes <= self._bytes.shape[1], f"{like.nbytes} bytes for a slot of {self._bytes.shape[1]}"
        return self._bytes[self._count % len(self._bytes), : like.nbytes].view(like.dtype).reshape(like.shape)

    def _wait(self, word: ctypes.c_uint32, count: int) -> None:
        """While the other side has come to ``count``."""
        value = count & _COUNT_MASK
        if self._pidfd < 0:
            self._watch()
        while word.value == value:
            if self._closed.value:
                raise PeerLost("a neighbouring pipeline stage has ended")
            # Who closes just before the wait, or is killed, wakes nobody.
            futex.wait(ctypes.addressof(word), value, timeout=0.5)
            if word.value == value:
                self._look_for_peer()
        futex.fence()

    def _watch(self) -> None:
        """Holds on to the other side's process, once it has opened the link."""
        if self._pid.value:
            try:
                self._pidfd = os.pidfd_open(self._pid.value)
            except ProcessLookupError:
                raise WorkerDied(self._peer) from None

    def _look_for_peer(self) -> None:
        if self._pidfd < 0:
            self._watch()
            if self._pidfd < 0 and time.monotonic() > self._deadline:
                raise EngineError(f"rank {self._peer} did not start within {START_TIMEOUT_S:.0f} s")
            return
        poll = select.poll()  # select() refuses descriptors above 1023
        poll.register(self._pidfd, select.POLLIN)  # readable once the process has ended
        if poll.poll(0):
            raise WorkerDied(self._peer)

    def _pass(self, word: ctypes.c_uint32) -> None:
        futex.fence()
        self._count += 1
        word.value = self._count & _COUNT_MASK
        futex.wake(ctypes.addressof(word))


class SocketLink:
    """Over a torch.distributed group of all ranks: between nodes. tag: tells the links of two ranks apart."""

    def __init__(self, group: Any, peer: int, tag: int, slots: int) -> None:
        self._group, self._peer, self._tag, self._slots = group, peer, tag, slots
        self._under_way: deque[tuple[Any, torch.Tensor]] = deque()

    def send(self, array: Array) -> None:
        while len(self._under_way) >= self._slots:
            _wait(self._under_way.popleft()[0])
        tensor = torch.from_numpy(array.copy())
        self._under_way.append((self._group.send([tensor], self._peer, self._tag), tensor))

    def recv(self, into: Array) -> None:
        tensor = torch.from_numpy(np.empty(into.shape, into.dtype))
        _wait(self._group.recv([tensor], self._peer, self._tag))
        np.copyto(into, tensor.numpy())

    def close(self) -> None:
        self._group.shutdown()


def _wait(work: Any) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise PeerLost(f"a neighbouring pipeline stage is gone: {error}") from error


@dataclass(slots=True)
class Links:
    """A rank's. rows_in: from the stage before, None on the first; rows_out: to the next, None on the last. tokens: on
    the first stage from the last, on the last to the first; None between.
    """

    rows_in: Link | None
    rows_out: Link | None
    tokens: Link | None

    def close(self) -> None:
        for link in (self.rows_in, self.rows_out, self.tokens):
            if link is not None:
                link.close()


def open_links(config: EngineConfig, rank: int, group: RankGroup, hidden_size: int) -> Links:
    """Of a pipeline of several stages. Raises EngineError when other ranks do not come."""
    parallel, scheduler = config.parallel, config.scheduler
    stages, tensor_size = parallel.pipeline_parallel_size, parallel.tensor_parallel_size
    stage, tensor_rank = divmod(rank, tensor_size)
    # The first stage takes in tokens when it needs them, at the latest after as many steps as there are stages.
    rows, tokens = (2, scheduler.max_num_batched_tokens * hidden_size * 4), (stages + 1, scheduler.max_num_seqs * 4)
    memory, gloo = group.memory, None
    if memory is None:
        store = open_store(group, "pipeline")
        memory = share_memory(store, rank, group.size, willing=True)
        gloo = None if memory is not None else open_gloo(store, rank, group.size)

    def link(source: int, shape: tuple[int, int]) -> Link:
        """What ``source`` sends to the stage after it, or the last stage to the first."""
        target = (source + 1) % stages
        peer = (target if source == stage else source) * tensor_size + tensor_rank
        if memory is None:
            return SocketLink(gloo, peer, tag=source, slots=shape[0])
        mapping = _map(memory, source * tensor_size + tensor_rank, SharedLink.size(*shape))
        return SharedLink(mapping, *shape, sends=source == stage, peer=peer)

    links = Links(
        rows_in=link(stage - 1, rows) if stage else None,
        rows_out=link(stage, rows) if stage < stages - 1 else None,
        tokens=link(stages - 1, tokens) if stage in (0, stages - 1) else None,
    )
    if memory is not None and memory != group.memory:
        os.close(memory)
    return links


def _map(memory: int, index: int, size: int) -> mmap.mmap:
    assert size <= 1 << _LINK_BITS and index < 1 << REGION_BITS - _LINK_BITS, "the links' region is full"
    return map_region(memory, LINKS_REGION, size, index << _LINK_BITS)
