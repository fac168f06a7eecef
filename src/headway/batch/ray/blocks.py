# pyright: reportUnknownParameterType=false
"""Ray Data's blocks to rows and back. Columns that no stage touched stay the arrays they were."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from ray.data.extensions import ArrowTensorArray

from headway.batch.row import OPEN_COLUMNS, Row, RowError, without_nulls
from headway.batch.sinks import ERROR_FIELDS, json_default

PACKED = "__headway_rows"
"""Beside the input's columns, between two operators of a processor: what is new of a row, and its error."""

_ERROR = pa.struct([(name, pa.string()) for name in ERROR_FIELDS])
_encoder = msgspec.json.Encoder(enc_hook=json_default)


def rows_of(block: pa.Table) -> list[Row]:
    """A row of an earlier processor that has failed there comes in with its error."""
    if PACKED not in block.column_names:
        return [_row(i, source) for i, source in enumerate(block.to_pylist())]
    rows = rows_of(block.drop_columns([PACKED]))
    for row, packed in zip(rows, block[PACKED].to_pylist()):
        new, gone, row.error = pickle.loads(packed)
        row.data = {name: value for name, value in (row.data | new).items() if name not in gone}
    return rows


def pack(rows: Sequence[Row], block: pa.Table) -> pa.Table:
    """block: what the rows were made from. Of a row that has failed nothing counts but its error."""
    changes = [({}, set[str]()) if row.error else (new_of(row), row.source.keys() - row.data.keys()) for row in rows]
    packed = [pickle.dumps((*change, row.error), pickle.HIGHEST_PROTOCOL) for change, row in zip(changes, rows)]
    names = [name for name in block.column_names if name != PACKED]
    return block.select(names).append_column(PACKED, pa.array(packed, pa.large_binary()))


def new_of(row: Row) -> dict[str, Any]:
    """Columns that are not the input's as they were; a list may have been changed where it is."""
    source = row.source
    return {k: v for k, v in row.data.items() if isinstance(v, (list, dict)) or k not in source or v is not source[k]}


def table_of(rows: Sequence[Row], block: pa.Table, *, errors: bool) -> pa.Table:
    """errors: add the column ``error``, null in rows that were answered. block: what the rows were made from."""
    records = [row.record() for row in rows]
    names = dict.fromkeys(name for record in records for name in record)
    if errors:
        names["error"] = None
    columns = {name: _column(name, rows, [record.get(name) for record in records], block) for name in names}
    if errors:
        columns["error"] = pa.array(
            [record["error"] if row.error else None for row, record in zip(rows, records)], _ERROR
        )
    return pa.table(columns)


def _row(index: int, source: dict[str, Any]) -> Row:
    for name in OPEN_COLUMNS:
        if name in source:
            source[name] = without_nulls(source[name])
    row = Row.of(index, source)
    error = source.get("error")
    if isinstance(error, dict) and set(error) == set(ERROR_FIELDS):
        row.error = RowError(**{field: str(error[field]) for field in ERROR_FIELDS})
    if row.error is not None or error is None:
        row.source.pop("error", None)
        row.data.pop("error", None)
    return row


def _column(name: str, rows: Sequence[Row], values: list[Any], block: pa.Table) -> pa.ChunkedArray | pa.Array:
    """As it came; else of its type, of the one that the values have in common, or JSON as text."""
    known = block.schema.field(name).type if name in block.column_names else None
    if known is None:
        array = None
    elif pa.types.is_nested(known):  # a list may have been changed where it is
        array = _array(values, known)
        array = array if array is not None and _holds(array, values) else None
    elif all(value is row.source.get(name) for row, value in zip(rows, values)):
        return block[name]
    else:
        array = _array(values, known)
    if array is None:
        array = _array(values)
    if array is None:
        array = _tensors(values)
    return pa.array(map(_as_text, values), pa.string()) if array is None else array


def _array(values: list[Any], kind: pa.DataType | None = None) -> pa.Array | None:
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return None


def _tensors(values: list[Any]) -> pa.Array | None:
    """As Ray has arrays of more than one dimension."""
    arrays = [value for value in values if value is not None]
    if not all(isinstance(value, np.ndarray) and value.dtype.kind in "biuf" for value in arrays):
        return None
    places = iter(range(len(arrays)))
    return ArrowTensorArray.from_numpy(arrays).take(pa.array([v if v is None else next(places) for v in values]))


def _holds(array: pa.Array, values: list[Any]) -> bool:
    """A struct's type drops what it has no field for, and has null for what a row lacks."""
    try:
        return without_nulls(array.to_pylist()) == without_nulls(values)
    except ValueError:  # of arrays
        return False


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else _encoder.encode(value).decode()
