"""Rows of files, pipes and iterables, one at a time. A row that cannot be read is one with an error."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast
from zlib import crc32

import msgspec

from headway.batch.row import Row, RowError
from headway.batch.sinks import ERROR_COLUMNS, LONGEST_CELL
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

STDIN = Path("/dev/stdin")


@dataclass(slots=True, eq=False)
class InputRow(Row):
    """place: "line 7" of a text file, else "row 7"; both count from 1. digest: a CRC of the input up to its end.

    A column ``error``, or in CSV those that it becomes, is dropped: it says how a row of an earlier output went.
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


class _TextReader:
    """Of a file, or of a pipe, which can be read once."""

    types = None

    def __init__(self, path: Path) -> None:
        self._path = path
        self.waits = self.once = not path.is_file()

    def _open(self) -> BinaryIO:
        """What is no file may be a socket, which has no path to open."""
        return open(os.dup(0) if self.once and self._path == STDIN else self._path, "rb")


class JsonLinesReader(_TextReader):
    """Blank lines are skipped."""

    def __iter__(self) -> Iterator[InputRow]:
        decoder, index, digest = msgspec.json.Decoder(), 0, 0
        with self._open() as lines:
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
        return _row(index, "line", number, digest, {}, f"not JSON: {error}")
    if type(fields) is not dict:
        return _row(index, "line", number, digest, {}, f"must be a JSON object, not {type(fields).__name__}")
    return _row(index, "line", number, digest, cast("dict[str, Any]", fields))


def _row(
    index: int, unit: str, number: int, digest: int, source: dict[str, Any], problem: str | None = None
) -> InputRow:
    """problem: why it could not be read, or not all of it; it may have no columns, so its error says where it is."""
    source.pop("error", None)
    row = InputRow(index, dict(source), source, unit=unit, number=number, digest=digest)
    if problem is not None:
        row.error = RowError("InvalidRow", f"{row.place}: {problem}", "read")
    return row


class CsvReader(_TextReader):
    """The first row names the columns; every value is text."""

    def __iter__(self) -> Iterator[InputRow]:
        csv.field_size_limit(LONGEST_CELL)  # 128 kB otherwise; a setting of the whole process
        with TextIOWrapper(self._open(), "utf-8-sig", newline="") as file:
            cells = csv.reader(file)
            try:
                yield from self._rows(cells)
            except (csv.Error, UnicodeDecodeError) as error:
                raise ConfigError("input", str(self._path), f"after line {cells.line_num}: no CSV: {error}") from None

    def _rows(self, cells: Any) -> Iterator[InputRow]:
        names, index = next(cells, []), 0
        if len(set(names)) < len(names):
            raise ConfigError("input", str(self._path), f"columns must have different names, not {names}")
        digest = crc32("\0".join(names).encode())
        for row in cells:
            if not row:
                continue
            digest = crc32("\0".join(row).encode(), digest)
            if len(row) == len(names):
                source = {name: cell for name, cell in zip(names, row) if name not in ERROR_COLUMNS}
                yield _row(index, "line", cells.line_num, digest, source)
            else:
                problem = f"has {len(row)} cells, the first row {len(names)}"
                yield _row(index, "line", cells.line_num, digest, {}, problem)
            index += 1

    def count(self) -> int | None:
        """Where no cell is quoted, rows are lines."""
        if self.waits or any(b'"' in chunk for chunk in _chunks(self._path)):
            return None
        return max(0, (count_lines(self._path) or 0) - 1)


class IterableReader:
    """Rows that are mappings already."""

    waits = False
    types = None

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._rows = rows
        self.once = isinstance(rows, Iterator)

    def __iter__(self) -> Iterator[InputRow]:
        return numbered(map(_mapping, self._rows))

    def count(self) -> int | None:
        return len(self._rows) if isinstance(self._rows, Sized) else None


def _mapping(row: object) -> tuple[dict[str, Any], str | None]:
    if isinstance(row, Mapping):
        return dict(cast("Mapping[str, Any]", row)), None
    return {}, f"must be a mapping, not {type(row).__name__}"


def numbered(rows: Iterable[tuple[dict[str, Any], str | None]]) -> Iterator[InputRow]:
    """Of columns, and of what is wrong with them."""
    encoder, digest = msgspec.msgpack.Encoder(enc_hook=repr), 0
    for index, (columns, problem) in enumerate(rows):
        try:
            digest = crc32(encoder.encode(columns), digest)
        except (OverflowError, UnicodeEncodeError):  # integers of more than 64 bits, texts that are none
            digest = crc32(repr(columns).encode(errors="backslashreplace"), digest)
        yield _row(index, "row", index + 1, digest, columns, problem)


def open_reader(source: str | Path | Iterable[Mapping[str, Any]], kind: str | None = None) -> Reader:
    """Of a file's path, "-" for the standard input, or rows. kind: one of FORMATS' (default: by the file's name)."""
    if not isinstance(source, (str, Path)):
        return IterableReader(source)
    path = STDIN if source == "-" else Path(source)
    if not path.exists() or path.is_dir():
        raise ConfigError("input", str(source), "is a directory" if path.is_dir() else "no such file")
    if not os.access(path, os.R_OK):
        raise ConfigError("input", str(source), "cannot be read: permission denied")
    kind = kind or format_of(path)
    if kind in ("parquet", "arrow"):
        from headway.batch.arrow import StoredReader

        return StoredReader(path, kind)
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
