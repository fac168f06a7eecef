"""Sleeping on a 32-bit word of memory that processes share, until one of them wakes the others (Linux, futex(2))."""

from __future__ import annotations

import ctypes
import platform

_SYS_FUTEX = {"x86_64": 202, "ppc64le": 221, "s390x": 238}.get(platform.machine(), 98)  # 98: arm64 and later ports
_WAIT, _WAKE, _EVERYBODY = 0, 1, 2**31 - 1
_ORDERED = platform.machine() in ("x86_64", "AMD64")

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


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def wait(address: int, value: int, timeout: float | None = None) -> None:
    """Returns at once if the word is not ``value``; else after a wake, ``timeout`` seconds, a signal, or nothing."""
    limit = None
    if timeout is not None:
        seconds, rest = divmod(max(0.0, timeout), 1.0)
        limit = ctypes.byref(_Timespec(int(seconds), int(rest * 1e9)))
    _syscall(_SYS_FUTEX, address, _WAIT, value, limit, None, 0)


def wake(address: int) -> None:
    """Everybody that waits on the word."""
    _syscall(_SYS_FUTEX, address, _WAKE, _EVERYBODY, None, None, 0)


def fence() -> None:
    """Reads and writes before it stay before those after it. The kernel begins a wake-up with a full barrier."""
    if not _ORDERED:
        wake(ctypes.addressof(_nothing))
