"""Files whose content outlives a SIGKILL or a loss of power, from the moment when that is promised."""

from __future__ import annotations

import os
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
            os.ftruncate(self._descriptor, self.length)
        return self._descriptor

    def sync(self) -> None:
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
