"""Files whose content outlives a SIGKILL or a loss of power, from the moment when that is promised."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Whenever the process or the machine ends, the file has either its old content or this."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    rename(temporary, path)


def rename(source: Path, target: Path) -> None:
    """Durable, if the source's content is."""
    os.replace(source, target)
    sync_directory(target.parent)


def remove(*paths: Path) -> None:
    """Those that are there."""
    for path in paths:
        path.unlink(missing_ok=True)
    for directory in {path.parent for path in paths}:
        sync_directory(directory)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Generator[bool]:
    """False if another has the lock. It ends with this process, however that ends; else its file goes."""
    descriptor = _lock(path)
    while descriptor is not None and not _is_there(path, descriptor):  # another has removed it meanwhile
        os.close(descriptor)
        descriptor = _lock(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _lock(path: Path) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass  # a file system without locks
    return descriptor


def _is_there(path: Path, descriptor: int) -> bool:
    return path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))


class AppendedFile:
    """Grows at its end. It is opened, and cut to ``length``, when something is first appended.

    What an append that failed has left is beyond ``length``. Appending and sync() may happen on two threads: sync()
    covers what was appended before it began.
    """

    def __init__(self, path: Path, length: int = 0) -> None:
        self.path, self.length = path, length
        self._descriptor: int | None = None

    def append(self, content: bytes) -> None:
        descriptor, view = self.open(), memoryview(content)
        written = 0
        while written < len(view):
            written += os.pwrite(descriptor, view[written:], self.length + written)
        self.length += written

    def open(self) -> int:
        """The descriptor."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
            sync_directory(self.path.parent)
            os.ftruncate(self._descriptor, self.length)
        return self._descriptor

    def sync(self) -> None:
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
