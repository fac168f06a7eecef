"""Tensor parallel ranks of one node, which reach each other through shared memory (csrc/collective.h)."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import time

import numpy as np
import torch
from torch import Tensor

from headway.errors import EngineError, WorkerDied
from headway.ops.cpu import abi

START_TIMEOUT_S = 300.0
# What ranks share is sparse: only pages that were written exist. A pipeline stage has the region of its number.
REGION_BITS = 40
LINKS_REGION = 63  # how stages reach each other: worker.link
_MEMORY_BYTES = (LINKS_REGION + 1) << REGION_BITS
_PART_BYTES = 4 << 20


class SharedComm:
    """A Comm, and what programs exchange their partial results through; ``struct`` is what C++ reads."""

    def __init__(
        self,
        kernels: abi.Kernels,
        threads: int,
        memory: int,
        *,
        region: int,
        rank: int,
        size: int,
        first_rank: int,
        store: object,
    ) -> None:
        """memory: a memfd that the ranks share, which this object closes; the group uses one region of it. first_rank:
        the engine's name of rank 0. store: kept alive, because other ranks may still use it.

        Waits for the other ranks, and raises EngineError when they do not come or WorkerDied when they end.
        """
        self._kernels, self._threads, self._memory, self._region = kernels, threads, memory, region
        self._first_rank, self._store = first_rank, store
        self._pidfd = np.full(size, -1, np.int32)
        first_part = -(-size * abi.SIGNAL_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
        self.struct = abi.Group(
            first_part=first_part, pidfd=self._pidfd.ctypes.data, rank=rank, size=size, lost=-1, part_bytes=_PART_BYTES
        )
        try:
            self._map()
            self._meet()
        except BaseException:
            self._close_descriptors()
            raise

    def all_reduce(self, x: Tensor) -> None:
        assert x.dtype == torch.float32 and x.is_contiguous()
        if self._kernels.all_reduce(ctypes.byref(self.struct), x.data_ptr(), x.numel(), self._threads):
            raise self.lost()

    def reserve(self, part_bytes: int, common_bytes: int) -> int:
        """Room for what a step exchanges at once; equal on all ranks, and before anything was exchanged.

        Returns the address of common_bytes that every rank may write into.
        """
        assert self.struct.exchanges == 0
        self.struct.part_bytes = -(-max(part_bytes, _PART_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE
        return self._map(common_bytes)

    def lost(self) -> WorkerDied:
        """The error of an exchange that another rank did not live to see."""
        return WorkerDied(self._first_rank + self.struct.lost)

    def close(self) -> None:
        """Ranks that still wait for this one raise."""
        struct.pack_into("<I", self._mapping, self._signal(self.struct.rank) + abi.CLOSED_OFFSET, 1)
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        for descriptor in (self._memory, *self._pidfd.tolist()):
            if descriptor >= 0:
                os.close(descriptor)
        self._memory = -1
        self._pidfd[:] = -1

    def _map(self, common_bytes: int = 0) -> int:
        length = self.struct.first_part + 2 * self.struct.size * self.struct.part_bytes
        self._mapping = map_region(self._memory, self._region, length + common_bytes)
        self.struct.memory = np.frombuffer(self._mapping, np.uint8).ctypes.data
        return self.struct.memory + length

    def _meet(self) -> None:
        rank = self.struct.rank
        struct.pack_into("<i", self._mapping, self._signal(rank) + abi.PID_OFFSET, os.getpid())
        deadline = time.monotonic() + START_TIMEOUT_S
        for other in range(self.struct.size):
            while not (pid := struct.unpack_from("<i", self._mapping, self._signal(other) + abi.PID_OFFSET)[0]):
                if time.monotonic() > deadline:
                    raise EngineError(f"rank {self._first_rank + other} did not start within {START_TIMEOUT_S:.0f} s")
                time.sleep(0.002)
            if other != rank:
                self._pidfd[other] = self._watch(pid, other)

    def _watch(self, pid: int, rank: int) -> int:
        try:
            return os.pidfd_open(pid)
        except ProcessLookupError:
            raise WorkerDied(self._first_rank + rank) from None

    def _signal(self, rank: int) -> int:
        return rank * abi.SIGNAL_BYTES


def map_region(memory: int, region: int, size: int, offset: int = 0) -> mmap.mmap:
    """``size`` bytes of a region of what ranks share; zero where nobody has written."""
    os.ftruncate(memory, _MEMORY_BYTES)
    return mmap.mmap(memory, size, mmap.MAP_SHARED, offset=(region << REGION_BITS) + offset)
