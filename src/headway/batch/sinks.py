"""Where answered rows go, in the order of the input: a file that appears when it is complete, or a pipe."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO, cast

import msgspec
import numpy as np

from headway.batch import durable
from headway.batch.row import Row
from headway.errors import ConfigError

Record = dict[str, Any]

STDOUT = Path("/dev/stdout")

ERROR_FIELDS = ("type", "message", "stage")
ERROR_COLUMNS = tuple(f"error.{field}" for field in ERROR_FIELDS)
"""Of CSV."""

LONGEST_CELL = 1 << 30


class Codec(Protocol):
    """Rows as bytes that can be put one after the other."""

    def encode(self, records: list[Record]) -> bytes:
        """Raises what the library raises if a value cannot be stored."""
        ...

    def decode(self, content: bytes) -> Iterator[Record]: ...


class Sink(Codec, Protocol):
    """Takes rows in order. chunk: how many to encode at a time.

    partial: the file where rows are until finish(), when the output appears, atomically, and this file goes. What was
    appended last can be cut off again. finish() may be called again by a process that cannot know whether it was.
    """

    path: Path
    chunk: int

    def record(self, row: Row, /) -> Record:
        """What the output says of a row."""
        ...

    @property
    def partial(self) -> durable.AppendedFile | None:
        """None: rows cannot be taken back, so a job that ends early cannot be resumed."""
        ...

    def append(self, content: bytes) -> None: ...
    def finish(self) -> None: ...

    def published(self) -> Iterator[Record]:
        """The rows of the output that is there, as an earlier job wrote them."""
        ...


def json_default(value: Any) -> Any:
    """For what JSON does not know: arrays and scalars of numpy and torch, moments and durations of pandas."""
    if getattr(value, "dtype", None) == np.float32:
        return _decimals(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"a value of type {type(value).__name__} cannot be stored")


def _decimals(value: Any) -> Any:
    """Doubles with the fewest digits, from 7 to 9, that read back as the same float32."""
    exact = np.asarray(value, np.float64)
    found = exact
    with np.errstate(all="ignore"):  # zeros, infinities
        magnitude = np.floor(np.log10(np.abs(exact)))
        for digits in (9, 8, 7):
            scale = 10.0 ** (digits - 1 - magnitude)
            rounded = np.rint(exact * scale) / scale
            found = np.where(rounded.astype(np.float32) == value, rounded, found)
    return found.tolist()


class JsonLines:
    def __init__(self) -> None:
        self._encoder = msgspec.json.Encoder(enc_hook=json_default)
        self._decoder = msgspec.json.Decoder(Record)

    def encode(self, records: list[Record]) -> bytes:
        return self._encoder.encode_lines(records)

    def decode(self, content: bytes) -> Iterator[Record]:
        return iter(self._decoder.decode_lines(content))

    def read(self, path: Path) -> Iterator[Record]:
        with path.open("rb") as lines:
            yield from map(self._decoder.decode, lines)


class FileSink:
    """Rows are appended to ``PATH.partial``; the state is its length. Subclasses turn that file into the output."""

    chunk = 512

    def __init__(self, path: Path, codec: Codec) -> None:
        self.path = path
        self.encode, self.decode = codec.encode, codec.decode
        self._partial = durable.AppendedFile(path.with_name(path.name + ".partial"))

    def record(self, row: Row) -> Record:
        return row.record()

    @property
    def partial(self) -> durable.AppendedFile:
        return self._partial

    def append(self, content: bytes) -> None:
        self._partial.append(content)

    def finish(self) -> None:
        self._partial.sync()
        self._partial.close()
        if self._partial.path.exists():
            self._publish(self._partial.path)

    def _publish(self, partial: Path) -> None:
        raise NotImplementedError

    def _convert(self, partial: Path) -> None:
        """For outputs whose form is known only when all rows are."""
        temporary = self.path.with_name(self.path.name + ".tmp")
        self._write(partial, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        durable.rename(temporary, self.path)
        durable.remove(partial)

    def _write(self, partial: Path, target: Path) -> None:
        raise NotImplementedError


class JsonLinesSink(FileSink):
    def __init__(self, path: Path) -> None:
        self._lines = JsonLines()
        super().__init__(path, self._lines)

    def _publish(self, partial: Path) -> None:
        durable.rename(partial, self.path)

    def published(self) -> Iterator[Record]:
        return self._lines.read(self.path)


class CsvSink(FileSink):
    """Every column that a row had, then error.type, error.message and error.stage; JSON where a value is no text."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines()
        super().__init__(path, self._lines)

    def _publish(self, partial: Path) -> None:
        self._convert(partial)

    def _write(self, partial: Path, target: Path) -> None:
        names = dict.fromkeys(name for row in self._lines.read(partial) for name in row)
        names.pop("error", None)
        with target.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(_UnixLines(file))
            writer.writerow([*names, *ERROR_COLUMNS])
            for row in self._lines.read(partial):
                error = cast(Record, row.get("error") or {})
                cells = [*(row.get(name) for name in names), *(error.get(field) for field in ERROR_FIELDS)]
                writer.writerow(map(_cell, cells))

    def published(self) -> Iterator[Record]:
        csv.field_size_limit(LONGEST_CELL)
        with self.path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                error = {field: row.pop(column, "") for field, column in zip(ERROR_FIELDS, ERROR_COLUMNS)}
                yield {**row, "error": error} if error["type"] else {**row}


class _UnixLines:
    """csv quotes a carriage return only if its own lines end in one."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, line: str) -> None:
        self._file.write(line[:-2] + "\n")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


class PipeSink:
    """JSONL to a pipe or a device, each append at once: a reader sees a row as soon as it is its turn."""

    chunk = 1
    partial = None

    def __init__(self, path: Path, descriptor: int) -> None:
        lines = JsonLines()
        self.path, self.encode, self.decode = path, lines.encode, lines.decode
        self._descriptor = descriptor

    def record(self, row: Row) -> Record:
        return row.record()

    def append(self, content: bytes) -> None:
        view = memoryview(content)
        while view:
            view = view[os.write(self._descriptor, view) :]

    def finish(self) -> None:
        os.close(self._descriptor)

    def published(self) -> Iterator[Record]:
        raise AssertionError("a pipe cannot be read again")


def open_sink(name: str, kind: str, types: Any = None) -> Sink:
    """kind: jsonl, csv, parquet, arrow or openai. types: the pyarrow schema of the input, if it has one.

    "-" is the standard output. Raises ConfigError if nothing can be written there.
    """
    path = STDOUT if name == "-" else Path(name)
    if path.is_dir():
        raise ConfigError("output", name, "is a directory; must be a file")
    if path == STDOUT or (path.exists() and not path.is_file()):
        if kind != "jsonl":
            raise ConfigError("output_format", kind, "only jsonl can be written to a pipe")
        try:  # a file that the standard output is has a place where it goes on
            return PipeSink(path, os.dup(1) if path == STDOUT else os.open(path, os.O_WRONLY))
        except OSError as error:
            raise ConfigError("output", name, f"cannot be written: {error.strerror}") from None
    path = path.resolve()  # what a link points to is replaced, not the link
    if not path.parent.is_dir():
        raise ConfigError("output", name, "cannot be written: No such file or directory")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError("output", name, "cannot be written: Permission denied")
    if kind in ("parquet", "arrow"):
        from headway.batch.arrow import ArrowSink

        return ArrowSink(path, kind, types)
    if kind == "openai":
        from headway.batch.openai_file import ResultSink

        return ResultSink(path)
    return CsvSink(path) if kind == "csv" else JsonLinesSink(path)
