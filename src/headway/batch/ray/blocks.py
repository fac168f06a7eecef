# pyright: reportUnknownParameterType=false
"""Ray Data's blocks to rows and back. Columns that no stage touched stay the arrays they were."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import msgspec
import pyarrow as pa

from headway.batch.row import Row, RowError
from headway.batch.sinks import ERROR_FIELDS, json_default

PACKED = "__headway_rows"
"""The one column between two operators of a processor: rows as they are, whatever Arrow would make of their values."""

_ERROR = pa.struct([(name, pa.string()) for name in ERROR_FIELDS])
_PARAMS = ("sampling_params", "pooling_params", "request_kwargs")
_encoder = msgspec.json.Encoder(enc_hook=json_default)


def rows_of(block: pa.Table) -> list[Row]:
    """A row of an earlier processor that has failed there comes in with its error."""
    if block.column_names == [PACKED]:
        return [Row(i, *pickle.loads(row)) for i, row in enumerate(block[PACKED].to_pylist())]
    return [_row(i, source) for i, source in enumerate(block.to_pylist())]


def pack(rows: Sequence[Row]) -> pa.Table:
    packed = [pickle.dumps((row.data, row.source, row.error), pickle.HIGHEST_PROTOCOL) for row in rows]
    return pa.table({PACKED: pa.array(packed, pa.large_binary())})


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
    for name in _PARAMS:
        if isinstance(source.get(name), dict):  # rows of a block share a struct, so null is "not given"
            source[name] = _given(source[name])
    row = Row.of(index, source)
    error = source.get("error")
    if isinstance(error, dict) and set(error) == set(ERROR_FIELDS):
        row.error = RowError(**{field: str(error[field]) for field in ERROR_FIELDS})
    if row.error is not None or error is None:
        row.source.pop("error", None)
        row.data.pop("error", None)
    return row


def _given(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _given(one) for name, one in value.items() if one is not None}


def _column(name: str, rows: Sequence[Row], values: list[Any], block: pa.Table) -> pa.ChunkedArray | pa.Array:
    """As it came; else of its type, of the one that the values have in common, or JSON as text."""
    known = block.schema.field(name).type if name in block.column_names and name != PACKED else None
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
    return pa.array(map(_as_text, values), pa.string()) if array is None else array


def _array(values: list[Any], kind: pa.DataType | None = None) -> pa.Array | None:
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return None


def _holds(array: pa.Array, values: list[Any]) -> bool:
    """A struct's type drops what it has no field for."""
    try:
        return array.to_pylist() == values
    except ValueError:  # of arrays
        return False


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else _encoder.encode(value).decode()
