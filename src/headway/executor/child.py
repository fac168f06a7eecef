"""Child processes that end when their parent does, however that ends.

A child gets a socket whose other end the parent holds: its ticket comes through it, and its end is the parent's. Where
a fork copied the parent's end, the kernel's parent-death signal does the same.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


@dataclass(frozen=True, slots=True)
class Child:
    """The parent's side. pidfd: readable once the process has ended, even if it was reaped. Both are the owner's to
    close."""

    process: subprocess.Popen[bytes]
    pidfd: int
    link: socket.socket


def spawn(module: str, ticket: bytes, fds: Sequence[int] = ()) -> Child:
    """Starts ``python -m module``, which is to begin with Parent(). fds: descriptors that it inherits.

    The kernel's signal comes when the *thread* that called this ends.
    """
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), *fds],
                env=own_modules(),
                start_new_session=True,  # Ctrl-C in a terminal is for the parent to act on
            )
        pidfd = os.pidfd_open(process.pid)
    except BaseException:
        ours.close()
        raise
    with suppress(ConnectionError):  # it has died already, which is told like any other death
        ours.sendall(len(ticket).to_bytes(4, "little") + ticket)
    return Child(process, pidfd, ours)


class Parent:
    """The child's side of it, in the process that spawn() started. Raises EOFError where the parent has ended."""

    def __init__(self) -> None:
        end_with_parent(signal.SIGKILL)
        for number in (signal.SIGTERM, signal.SIGINT):  # to the whole group; that too is for the parent to act on
            signal.signal(number, signal.SIG_IGN)
        self._link = socket.socket(fileno=int(sys.argv[1]))
        self.ticket = self._read(int.from_bytes(self._read(4), "little"))

    def watch(self, name: str, heard: Callable[[bytes], None] | None = None) -> None:
        """From now on this process is called ``name`` and ends with its parent. heard: is called, on another thread,
        with what comes from the parent."""
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())
        threading.Thread(target=self._watch, args=(heard,), name="headway-parent", daemon=True).start()

    def send(self, data: bytes) -> None:
        self._link.sendall(data)

    def leave(self, status: int) -> None:
        """Ends this process at once: to take torch down in order takes a second, and the process is gone anyway."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            if not (more := self._link.recv(size - len(data))):
                raise EOFError("the parent has ended")
            data += more
        return data

    def _watch(self, heard: Callable[[bytes], None] | None) -> None:
        with suppress(ConnectionError):
            while data := self._link.recv(4096):
                if heard is not None:
                    heard(data)
        os._exit(1)


def end_with_parent(how: signal.Signals) -> None:
    """What this process gets when the thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, how)


def own_modules() -> dict[str, str]:
    """This process's environment, with its own search path for modules, and nothing from the current directory."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
