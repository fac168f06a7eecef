"""Writes answered rows in the order of their input, to a file that appears when it is complete."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from headway.errors import ConfigError


class OrderedWriter:
    """Rows may be put in any order; each is written once all before it are.

    Rows go to ``PATH.partial``, which becomes PATH on a clean exit. On an exception or an interrupt it stays, with
    every row that was put, if any was. What an earlier job left there stays until the first row. A PATH that is no
    regular file, such as a pipe, is written directly. Raises ConfigError where it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.written = 0
        self._waiting: dict[int, bytes] = {}
        self._next = 0
        if path.is_dir():
            raise ConfigError("output", str(path), "is a directory; must be a file")
        self.direct = path.is_relative_to("/dev") or (path.exists() and not path.is_file())
        self.path = path if self.direct else path.resolve()  # what a link points to is replaced, not the link
        self.partial = self.path if self.direct else self.path.with_name(self.path.name + ".partial")
        try:
            self._file = self.partial.open("ab")
        except OSError as error:
            raise self._refused(error) from None

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
        """Flushes too: a process that is killed has lost no row, a reader of a pipe sees it at once."""
        self._discard_old_rows()
        try:
            self._file.write(self._waiting.pop(index))
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._refused(error) from None
        self.written += 1

    def _discard_old_rows(self) -> None:
        if not self.written and not self.direct:
            self._file.truncate(0)

    def _refused(self, error: OSError) -> ConfigError:
        return ConfigError("output", str(self.path), f"cannot be written: {error.strerror}")

    def __enter__(self) -> OrderedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            assert not self._waiting, "a row is missing"
            self._discard_old_rows()
            self._file.close()
            if not self.direct:
                self.partial.replace(self.path)
            return
        with suppress(OSError, ConfigError):  # what went wrong is being raised already
            for index in sorted(self._waiting):
                self._write(index)
        with suppress(OSError):
            self._file.close()
        if not self.direct and not self.partial.stat().st_size:
            self.partial.unlink()
