"""Waiting and waking across processes without polling: futex words in shared memory (Linux)."""

from __future__ import annotations

import ctypes
import mmap
import platform

_SYS_FUTEX = {"x86_64": 202, "ppc64le": 221, "s390x": 238}.get(platform.machine(), 98)  # 98: arm64 and later ports
_WAIT, _WAKE, _EVERYBODY = 0, 1, 2**31 - 1

_syscall = ctypes.CDLL(None).syscall  # ctypes lets go of the GIL meanwhile
_syscall.argtypes = [
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_uint32,
]


_nothing = ctypes.c_uint32()


def fence() -> None:
    """Reads and writes before it stay before those after it: the kernel begins a wake-up with a full barrier."""
    _syscall(_SYS_FUTEX, ctypes.addressof(_nothing), _WAKE, 1, None, None, 0)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Bell:
    """A 32-bit word in shared memory that several processes ring and any number wait on.

    Plain stores cannot count rings of several processes, so each ringer writes what nobody else writes: its own number
    (below 1024) beside its own count. To wait without missing a ring: read ``value``, look whether there is anything to
    do, and only then ``wait(value)``, which returns at once if there was a ring in between. ``ring`` always makes the
    system call: to look for waiters first would need a fence, which Python has not.
    """

    def __init__(self, memory: mmap.mmap, offset: int, ringer: int) -> None:
        assert 0 <= ringer < 1024
        self._word = ctypes.c_uint32.from_buffer(memory, offset)
        self._address = ctypes.addressof(self._word)
        self._ringer, self._count = ringer, 0

    @property
    def value(self) -> int:
        return self._word.value

    def ring(self) -> None:
        """What was written before is seen by whoever is woken. One thread at a time."""
        self._count = (self._count + 1) & 0x3FFFFF
        self._word.value = self._count << 10 | self._ringer
        _syscall(_SYS_FUTEX, self._address, _WAKE, _EVERYBODY, None, None, 0)

    def wait(self, value: int, timeout: float | None = None) -> None:
        """Returns after a ring since ``value`` was read, after timeout seconds, or after a signal; also for nothing."""
        limit = None
        if timeout is not None:
            seconds, rest = divmod(max(0.0, timeout), 1.0)
            limit = ctypes.byref(_Timespec(int(seconds), int(rest * 1e9)))
        _syscall(_SYS_FUTEX, self._address, _WAIT, value, limit, None, 0)
