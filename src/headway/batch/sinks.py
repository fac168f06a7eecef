"""Where answered rows go, in the order of the input: a file that appears when it is complete, or a pipe."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec

from headway.batch import durable
from headway.batch.row import Row
from headway.errors import ConfigError

Record = dict[str, Any]

ERROR_FIELDS = ("type", "message", "stage")


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
    """For what JSON does not know: arrays and scalars of numpy and torch."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a value of type {type(value).__name__} cannot be stored")


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
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*names, *(f"error.{field}" for field in ERROR_FIELDS)])
            for row in self._lines.read(partial):
                error = cast(Record, row.get("error") or {})
                cells = [*(row.get(name) for name in names), *(error.get(field) for field in ERROR_FIELDS)]
                writer.writerow(map(_cell, cells))

    def published(self) -> Iterator[Record]:
        with self.path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                error = {field: row.pop(f"error.{field}", "") for field in ERROR_FIELDS}
                yield {**row, "error": error} if error["type"] else {**row}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


class PipeSink:
    """JSONL to a pipe or a device, each append at once: a reader sees a row as soon as it is its turn."""

    chunk = 1
    partial = None

    def __init__(self, path: Path) -> None:
        lines = JsonLines()
        self.path, self.encode, self.decode = path, lines.encode, lines.decode
        self._descriptor = os.open(path, os.O_WRONLY)

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
    path = Path("/dev/stdout" if name == "-" else name)
    if path.is_dir():
        raise ConfigError("output", name, "is a directory; must be a file")
    if path.is_relative_to("/dev") or (path.exists() and not path.is_file()):
        if kind != "jsonl":
            raise ConfigError("output_format", kind, "only jsonl can be written to a pipe")
        return PipeSink(path)
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
