"""Memory in huge pages. A step streams all weights once: on pages of 4 KB that takes a quarter longer."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import torch
from torch import Tensor

_HUGE = 2 << 20
_CHUNK = 32 << 20
_DONTNEED = 4  # of madvise, on Linux


def huge_memory(nbytes: int) -> Tensor:
    """uint8 [nbytes] of zeros, aligned to a huge page; pages become resident when written. Freed with the tensor."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory has a huge page policy of its own, usually "never"
    mapping = mmap.mmap(-1, -(-nbytes // _HUGE) * _HUGE + _HUGE, flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(mapping, np.uint8)
    start = -memory.ctypes.data % _HUGE
    return torch.from_numpy(memory[start : start + nbytes])


def drop_pages(tensor: Tensor) -> None:
    """Gives a tensor's memory back to the system; it stays where it is and reads as zeros until written again.

    The first and last page stay, where other things may be too.
    """
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start and ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED):
        raise OSError(f"madvise of {end - start} bytes failed")


class Arena:
    """Hands out pieces of huge pages, 64-byte aligned; a chunk is freed when all of its pieces are."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """[count] of zeros."""
        nbytes = count * dtype.itemsize
        if self._used + nbytes > len(self._chunk):
            self._chunk, self._used = huge_memory(max(nbytes, _CHUNK)), 0
        piece = self._chunk[self._used : self._used + nbytes].view(dtype)
        self._used += -(-nbytes // 64) * 64
        return piece
