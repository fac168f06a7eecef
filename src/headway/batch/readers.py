"""Rows of files, pipes and iterables, one at a time. A row that cannot be read is one with an error."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast
from zlib import crc32

import msgspec

from headway.batch.row import Row, RowError
from headway.errors import ConfigError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}

LONGEST_CELL = 1 << 30


@dataclass(slots=True, eq=False)
class InputRow(Row):
    """place: "line 7" of a text file, else "row 7"; both count from 1. digest: a CRC of the input up to its end.

    A column ``error`` is dropped: it says how a row of the output went.
    """

    unit: str = "row"
    number: int = 0
    digest: int = 0

    @property
    def place(self) -> str:
        return f"{self.unit} {self.number}"


class Reader(Protocol):
    """waits: a row may be long in coming, so it is not read on an event loop. once: it can be read only once.

    types: the input's pyarrow schema, if it has one.
    """

    waits: bool
    once: bool
    types: Any

    def __iter__(self) -> Iterator[InputRow]: ...

    def count(self) -> int | None:
        """How many rows there are, for people; None if that takes long to know."""
        ...


class JsonLinesReader:
    """Blank lines are skipped."""

    types = None

    def __init__(self, path: Path) -> None:
        self._path = path
        self.waits = self.once = not path.is_file()

    def __iter__(self) -> Iterator[InputRow]:
        decoder, index, digest = msgspec.json.Decoder(), 0, 0
        with self._path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).strip()
                if text:
                    digest = crc32(text, digest)
                    yield _parsed(decoder, text, index, number, digest)
                    index += 1

    def count(self) -> int | None:
        return count_lines(self._path)


def _parsed(decoder: msgspec.json.Decoder[Any], text: bytes, index: int, number: int, digest: int) -> InputRow:
    try:
        fields = decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return _unreadable(index, number, digest, f"not JSON: {error}")
    if type(fields) is not dict:
        problem = f"must be a JSON object, not {type(fields).__name__}"
        return _unreadable(index, number, digest, problem)
    return _row(index, "line", number, digest, cast("dict[str, Any]", fields))


def _row(index: int, unit: str, number: int, digest: int, source: dict[str, Any]) -> InputRow:
    source.pop("error", None)
    return InputRow(index, dict(source), source, unit=unit, number=number, digest=digest)


def _unreadable(index: int, number: int, digest: int, problem: str) -> InputRow:
    """It has no columns, so its error says where it is."""
    error = RowError("InvalidRow", f"line {number}: {problem}", "read")
    return InputRow(index, {}, {}, error, unit="line", number=number, digest=digest)


class CsvReader:
    """The first row names the columns; every value is text."""

    types = None

    def __init__(self, path: Path) -> None:
        self._path = path
        self.waits = self.once = not path.is_file()

    def __iter__(self) -> Iterator[InputRow]:
        csv.field_size_limit(LONGEST_CELL)  # 128 kB otherwise; a setting of the whole process
        with self._path.open(encoding="utf-8-sig", newline="") as file:
            cells = csv.reader(file)
            try:
                yield from self._rows(cells)
            except (csv.Error, UnicodeDecodeError) as error:
                raise ConfigError("input", str(self._path), f"after line {cells.line_num}: no CSV: {error}") from None

    def _rows(self, cells: Any) -> Iterator[InputRow]:
        names, index, digest = next(cells, []), 0, 0
        if len(set(names)) < len(names):
            raise ConfigError("input", str(self._path), f"columns must have different names, not {names}")
        for row in cells:
            if not row:
                continue
            digest = crc32("\0".join(row).encode(), digest)
            if len(row) == len(names):
                yield _row(index, "line", cells.line_num, digest, dict(zip(names, row)))
            else:
                problem = f"has {len(row)} cells, the first row {len(names)}"
                yield _unreadable(index, cells.line_num, digest, problem)
            index += 1

    def count(self) -> int | None:
        """Where no cell is quoted, rows are lines."""
        if self.waits or any(b'"' in chunk for chunk in _chunks(self._path)):
            return None
        return max(0, (count_lines(self._path) or 0) - 1)


class IterableReader:
    """Rows that are mappings already."""

    waits = False

    def __init__(self, rows: Iterable[Mapping[str, Any]], count: int | None = None, types: Any = None) -> None:
        self._rows, self.types = rows, types
        self.once = isinstance(rows, Iterator)
        self._count = len(rows) if count is None and isinstance(rows, Sized) else count

    def __iter__(self) -> Iterator[InputRow]:
        encoder, digest = msgspec.msgpack.Encoder(enc_hook=repr), 0
        for index, row in enumerate(self._rows):
            digest = crc32(encoder.encode(row), digest)
            yield _row(index, "row", index + 1, digest, dict(row))

    def count(self) -> int | None:
        return self._count


class _StoredRows:
    """Of a Parquet or Arrow file, some in memory at a time; iterable many times."""

    def __init__(self, path: Path, kind: str) -> None:
        self._path, self._kind = path, kind

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from headway.batch.arrow import stored_batches

        for batch in stored_batches(self._path, self._kind):
            yield from batch.to_pylist()


def open_reader(source: str | Path | Iterable[Mapping[str, Any]], kind: str | None = None) -> Reader:
    """Of a file's path, "-" for the standard input, or rows. kind: one of FORMATS' (default: by the file's name)."""
    if not isinstance(source, (str, Path)):
        return IterableReader(source)
    path = Path("/dev/stdin" if source == "-" else source)
    if not path.exists() or path.is_dir():
        raise ConfigError("input", str(source), "is a directory" if path.is_dir() else "no such file")
    if not os.access(path, os.R_OK):
        raise ConfigError("input", str(source), "cannot be read: permission denied")
    kind = kind or format_of(path)
    if kind in ("parquet", "arrow"):
        from headway.batch.arrow import stored_schema

        types, count = stored_schema(path, kind)
        return IterableReader(_StoredRows(path, kind), count, types)
    return CsvReader(path) if kind == "csv" else JsonLinesReader(path)


def format_of(path: str | Path) -> str:
    return FORMATS.get(Path(path).suffix.lower(), "jsonl")


def count_lines(path: Path) -> int | None:
    """Lines of a file; None for a pipe, which can be read only once."""
    if not path.is_file():
        return None
    count, last = 0, b"\n"
    for chunk in _chunks(path):
        count, last = count + chunk.count(b"\n"), chunk[-1:]
    return count + (last != b"\n")


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as data:
        while chunk := data.read(1 << 20):
            yield chunk
