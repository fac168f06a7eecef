# pyright: reportUnknownParameterType=false
"""Parquet and Arrow IPC, through pyarrow. Until a job is done its rows are Arrow streams, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from headway.batch.readers import InputRow, numbered
from headway.batch.row import OPEN_COLUMNS, without_nulls
from headway.batch.sinks import ERROR_FIELDS, FileSink, Record, json_default
from headway.errors import ConfigError, MissingDependencyError

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as missing:
    raise MissingDependencyError("Parquet and Arrow files need pyarrow: pip install 'headway[arrow]'") from missing

ERROR = pa.struct([(field, pa.string()) for field in ERROR_FIELDS])
ROWS_A_GROUP, BYTES_A_GROUP = 1 << 16, 1 << 26

_encoder = msgspec.json.Encoder(enc_hook=json_default)


class Streams:
    """Each encode() is a whole stream with a schema of its own. types: of columns whose type is known."""

    def __init__(self, types: pa.Schema | None) -> None:
        self._types = {field.name: field.type for field in types or ()} | {"error": ERROR}

    def encode(self, records: list[Record]) -> bytes:
        names = dict.fromkeys(name for record in records for name in record)
        names["error"] = None
        columns = {name: self._column(name, [record.get(name) for record in records]) for name in names}
        batch = pa.RecordBatch.from_pydict(columns)
        buffer = pa.BufferOutputStream()
        with pa.ipc.new_stream(buffer, batch.schema) as writer:
            writer.write_batch(batch)
        return buffer.getvalue().to_pybytes()

    def decode(self, content: bytes) -> Iterator[Record]:
        """What is decoded here is encoded again: its columns keep their types."""
        for batch in batches(pa.BufferReader(content)):
            for field in batch.schema:
                if not pa.types.is_null(field.type):
                    self._types.setdefault(field.name, field.type)
            yield from batch.to_pylist()

    def _column(self, name: str, values: list[Any]) -> pa.Array:
        """Of the column's known type, else of the one its values have in common, else JSON as text."""
        known = self._types.get(name)
        if known is not None and _fits(values, known):
            try:
                return pa.array(values, known)
            except (pa.ArrowException, TypeError, ValueError, OverflowError):
                pass  # a stage has replaced the column
        try:
            return pa.array(values)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            return pa.array(map(as_text, values), pa.string())


def _fits(values: list[Any], known: pa.DataType) -> bool:
    """False if a struct would lose what has no field in the known type."""
    if not pa.types.is_nested(known):
        return True
    try:
        return _covers(known, pa.infer_type(values))
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return True


def _covers(known: pa.DataType, seen: pa.DataType) -> bool:
    if pa.types.is_struct(known) and pa.types.is_struct(seen):
        fields = [(known.get_field_index(field.name), field.type) for field in seen]
        return all(at >= 0 and _covers(known.field(at).type, kind) for at, kind in fields)
    if _is_list(known) and _is_list(seen):
        return _covers(known.value_type, seen.value_type)
    return True


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else _encoder.encode(value).decode()


def batches(source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    """Of streams that follow each other, one in memory at a time."""
    while source.tell() < source.size():
        yield from pa.ipc.open_stream(source)


def merged(types: list[pa.DataType]) -> pa.DataType:
    """The type that holds values of all; text where there is none, or where a file cannot store it."""
    try:
        schemas = [pa.schema([("", one)]) for one in types]
        found = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return pa.string()
    return pa.string() if pa.types.is_null(found) or _has_empty_struct(found) else found


def _has_empty_struct(kind: pa.DataType) -> bool:
    fields = [kind.field(i) for i in range(kind.num_fields)]
    return (pa.types.is_struct(kind) and not fields) or any(_has_empty_struct(field.type) for field in fields)


class ArrowSink(FileSink):
    """Columns passed through keep the input's types; ``error`` is a struct, null in answered rows."""

    def __init__(self, path: Path, kind: str, types: pa.Schema | None) -> None:
        super().__init__(path, Streams(types))
        self._kind, self._types = kind, types

    def _publish(self, partial: Path) -> None:
        self._convert(partial)

    def _write(self, partial: Path, target: Path) -> None:
        with pa.OSFile(str(partial)) as rows:
            schema = self._schema(rows)
        while True:
            try:
                return self._write_as(schema, partial, target)
            except _UnfitError as unfit:
                schema = schema.set(unfit.column, pa.field(schema.field(unfit.column).name, pa.string()))

    def _write_as(self, schema: pa.Schema, partial: Path, target: Path) -> None:
        with pa.OSFile(str(partial)) as rows, _writer(self._kind, target, schema) as writer:
            for group in _groups(batches(rows), schema):
                writer.write_table(group)

    def _schema(self, rows: pa.NativeFile) -> pa.Schema:
        """Of all the rows; of a file without rows, the input's."""
        seen = dict.fromkeys(batch.schema for batch in batches(rows)) if rows.size() else {}
        types: dict[str, list[pa.DataType]] = {}
        for schema in seen or [self._types or ()]:
            for field in schema:
                types.setdefault(field.name, []).append(field.type)
        types.pop("error", None)
        found = [(name, self._stored(merged(each))) for name, each in types.items()]
        return pa.schema([*found, ("error", ERROR)])

    def _stored(self, kind: pa.DataType) -> pa.DataType:
        """An Arrow file has one dictionary a column for all its batches, which here come one at a time."""
        return kind.value_type if self._kind == "arrow" and pa.types.is_dictionary(kind) else kind

    def published(self) -> Iterator[Record]:
        for batch in StoredReader(self.path, self._kind).batches():
            yield from batch.to_pylist()


def _writer(kind: str, target: Path, schema: pa.Schema) -> Any:
    return pq.ParquetWriter(target, schema) if kind == "parquet" else pa.ipc.new_file(str(target), schema)


def _groups(source: Iterator[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
    """Tables of a size that is good to read."""
    held: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in source:
        held.append(_with_schema(batch, schema))
        rows, size = rows + batch.num_rows, size + batch.nbytes
        if rows >= ROWS_A_GROUP or size >= BYTES_A_GROUP:
            yield pa.Table.from_batches(held)
            held, rows, size = [], 0, 0
    if held:
        yield pa.Table.from_batches(held)


class _UnfitError(Exception):
    """A column has values that its rows' common type cannot hold: large integers beside fractions."""

    def __init__(self, column: int) -> None:
        super().__init__(column)
        self.column = column


def _with_schema(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    columns: list[pa.Array] = []
    for i, field in enumerate(schema):
        known = field.name in batch.schema.names
        try:
            columns.append(_cast(batch[field.name], field.type) if known else pa.nulls(batch.num_rows, field.type))
        except pa.ArrowException:
            if pa.types.is_string(field.type):
                raise
            raise _UnfitError(i) from None
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _cast(column: pa.Array, kind: pa.DataType) -> pa.Array:
    if column.type == kind:
        return column
    if pa.types.is_string(kind) and not pa.types.is_dictionary(column.type):
        return pa.array(map(as_text, column.to_pylist()), kind)
    return pa.array(column.to_pylist(), kind)


class StoredReader:
    """Of a Parquet or Arrow IPC file, in order, a few rows in memory at a time."""

    waits = once = False

    def __init__(self, path: Path, kind: str) -> None:
        self._path, self._kind = path, kind
        try:
            self.types: pa.Schema = self._schema()
        except (pa.ArrowException, OSError) as error:
            raise ConfigError("input", str(path), f"is no {kind.capitalize()} file: {error}") from None
        if len(set(self.types.names)) < len(self.types.names):
            raise ConfigError("input", str(path), f"columns must have different names, not {self.types.names}")

    def __iter__(self) -> Iterator[InputRow]:
        try:
            yield from numbered(row for batch in self.batches() for row in _rows(batch))
        except (pa.ArrowException, OSError) as error:
            raise ConfigError("input", str(self._path), f"cannot be read: {error}") from None

    def count(self) -> int | None:
        if self._kind == "parquet":
            return pq.read_metadata(self._path).num_rows
        return sum(batch.num_rows for batch in self.batches())

    def batches(self, rows: int = 1024) -> Iterator[pa.RecordBatch]:
        if self._kind == "parquet":
            with pq.ParquetFile(self._path) as file:
                yield from file.iter_batches(batch_size=rows)
            return
        with pa.memory_map(str(self._path)) as source:
            file = pa.ipc.open_file(source)
            for i in range(file.num_record_batches):
                batch = file.get_batch(i)
                yield from (batch.slice(at, rows) for at in range(0, batch.num_rows, rows))

    def _schema(self) -> pa.Schema:
        if self._kind == "parquet":
            return pq.read_schema(self._path)
        with pa.memory_map(str(self._path)) as source:
            return pa.ipc.open_file(source).schema


def _rows(batch: pa.RecordBatch) -> Iterator[tuple[Record, str | None]]:
    """Columns, and what is wrong with them: a date after the year 9999, a text that is none."""
    try:
        rows = [(row, None) for row in batch.to_pylist()]
    except (ValueError, OverflowError):
        rows = [_cells(batch.slice(i, 1)) for i in range(batch.num_rows)]
    for name in OPEN_COLUMNS:
        if name in batch.schema.names:
            for row, _ in rows:
                if name in row:
                    row[name] = without_nulls(row[name])
    return iter(rows)


def _cells(row: pa.RecordBatch) -> tuple[Record, str | None]:
    columns: Record = {}
    problem = None
    for name in row.schema.names:
        try:
            columns[name] = row[name][0].as_py()
        except (ValueError, OverflowError) as error:
            problem = f"column {name!r}: {error}"
    return columns, problem
