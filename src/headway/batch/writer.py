"""Writes answered rows in the order of their input, to a file that appears when it is complete."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from headway.errors import ConfigError


class OrderedWriter:
    """Rows may be put in any order; each is written once all before it are.

    Rows go to ``PATH.partial``, which becomes PATH on a clean exit. On an exception or an interrupt it stays, with
    every row that was put, if any was. Raises ConfigError where it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.written = 0
        self._waiting: dict[int, bytes] = {}
        self._next = 0
        if path.is_dir():
            raise ConfigError("output", str(path), "is a directory; must be a file")
        try:
            self._file = self.partial.open("wb")
        except OSError as error:
            raise ConfigError("output", str(path), f"cannot be written: {error.strerror}") from None

    @property
    def next_index(self) -> int:
        """The first row that is not written yet."""
        return self._next

    def put(self, index: int, record: dict[str, Any]) -> None:
        assert index >= self._next, f"row {index} was put twice"
        assert index not in self._waiting, f"row {index} was put twice"
        self._waiting[index] = msgspec.json.encode(record) + b"\n"
        while self._next in self._waiting:
            self._write(self._next)
            self._next += 1

    def _write(self, index: int) -> None:
        self._file.write(self._waiting.pop(index))
        self.written += 1

    def __enter__(self) -> OrderedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for index in sorted(self._waiting):
            self._write(index)
        self._file.close()
        if kind is None:
            self.partial.replace(self.path)
        elif not self.written:
            self.partial.unlink()
