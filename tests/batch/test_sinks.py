from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headway.batch.sinks import Sink, open_sink
from headway.errors import ConfigError

ERROR = {"type": "ValueError", "message": "m", "stage": "s"}
Records = list[dict[str, Any]]


def write(path: Path, *pieces: Records, types: Any = None) -> Sink:
    sink = open_sink(str(path), path.suffix[1:], types)
    for records in pieces:
        sink.append(sink.encode(records))
    assert not path.exists()
    sink.finish()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return sink


def stored(path: Path) -> pa.Table:
    return pq.read_table(path) if path.suffix == ".parquet" else pa.ipc.open_file(str(path)).read_all()


@pytest.mark.parametrize("name", ["o.jsonl", "o.csv", "o.parquet", "o.arrow"])
def test_rows_are_read_back_as_they_were_written(name: str, tmp_path: Path) -> None:
    sink = write(tmp_path / name, [{"id": "1", "x": "a"}], [{"id": "2", "error": ERROR}, {"id": "3", "x": "c\n,"}])
    rows = [{key: value for key, value in row.items() if value not in (None, "")} for row in sink.published()]
    assert rows == [{"id": "1", "x": "a"}, {"id": "2", "error": ERROR}, {"id": "3", "x": "c\n,"}]


@pytest.mark.parametrize("name", ["o.jsonl", "o.csv", "o.parquet", "o.arrow"])
def test_finishing_twice_is_finishing_once(name: str, tmp_path: Path) -> None:
    sink = write(tmp_path / name, [{"a": "1"}])
    sink.finish()
    assert [row["a"] for row in sink.published()] == ["1"]


def test_csv_has_every_column_that_a_row_had_and_three_of_errors(tmp_path: Path) -> None:
    write(tmp_path / "o.csv", [{"a": 1, "error": ERROR}], [{"a": None, "b": {"c": [1.5, True]}, "d": 'x"y'}])
    with (tmp_path / "o.csv").open(newline="") as file:
        header, failed, answered = csv.reader(file)
    assert header == ["a", "b", "d", "error.type", "error.message", "error.stage"]
    assert failed == ["1", "", "", "ValueError", "m", "s"]
    assert answered == ["", '{"c":[1.5,true]}', 'x"y', "", "", ""]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_passed_through_keep_their_types(kind: str, tmp_path: Path) -> None:
    moment = datetime(2020, 1, 2, tzinfo=timezone.utc)
    types = pa.schema(
        {
            "small": pa.int8(),
            "when": pa.timestamp("us", "UTC"),
            "text": pa.large_string(),
            "raw": pa.binary(),
            "word": pa.dictionary(pa.int32(), pa.string()),
            "chat": pa.list_(pa.struct({"role": pa.string(), "name": pa.string()})),
        }
    )
    row = {
        "small": 1,
        "when": moment,
        "text": "t",
        "raw": b"\0\xff",
        "word": "w",
        "chat": [{"role": "user", "name": None}],
    }
    path = tmp_path / f"o.{kind}"
    write(path, [row], [dict.fromkeys(row)], [{**row, "new": 1.5}], types=types)
    table = stored(path)
    for field in types:
        kept = pa.string() if kind == "arrow" and field.name == "word" else field.type
        assert table.schema.field(field.name).type == kept
    assert table.schema.names == [*row, "new", "error"]
    assert table.to_pylist()[2] == {**row, "new": 1.5, "error": None}


@pytest.mark.parametrize("kind", [pa.list_(pa.int8()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 1)])
def test_lists_passed_through_keep_their_types(kind: pa.DataType, tmp_path: Path) -> None:
    write(tmp_path / "o.arrow", [{"a": [1]}, {"a": None}], types=pa.schema({"a": kind}))
    assert stored(tmp_path / "o.arrow").schema.field("a").type == kind


def test_rows_that_were_held_keep_their_types(tmp_path: Path) -> None:
    """They are decoded, and encoded again."""
    sink = open_sink(str(tmp_path / "o.parquet"), "parquet")
    held = sink.encode([{"embeddings": np.array([0.5], np.float32)}])
    write_again = open_sink(str(tmp_path / "o.parquet"), "parquet")
    write_again.append(write_again.encode(list(write_again.decode(held))))
    write_again.finish()
    assert stored(tmp_path / "o.parquet").schema.field("embeddings").type == pa.list_(pa.float32())


def test_a_column_that_a_stage_replaced_has_its_new_type(tmp_path: Path) -> None:
    types = pa.schema({"a": pa.int8(), "chat": pa.list_(pa.struct({"role": pa.string()}))})
    write(tmp_path / "o.parquet", [{"a": "text", "chat": [{"role": "user", "content": "c"}]}], types=types)
    assert stored(tmp_path / "o.parquet").to_pylist() == [
        {"a": "text", "chat": [{"content": "c", "role": "user"}], "error": None}
    ]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_types_are_those_that_all_rows_have_in_common(kind: str, tmp_path: Path) -> None:
    first = {"n": 1, "mixed": 1, "none": None, "empty": {}, "late": None, "tokens": [1], "object": {"a": 1}}
    second = {"n": 2.5, "mixed": "x", "none": None, "empty": {}, "late": [1], "tokens": [], "object": {"b": [None]}}
    path = tmp_path / f"o.{kind}"
    write(path, [first], [second])
    table = stored(path)
    assert table.column("n").to_pylist() == [1.0, 2.5]
    assert table.column("mixed").to_pylist() == ["1", "x"]
    assert table.column("empty").to_pylist() == ["{}", "{}"]
    assert table.column("late").to_pylist() == [None, [1]]
    assert table.column("object").to_pylist() == [{"a": 1, "b": None}, {"a": None, "b": [None]}]
    assert table.schema.field("none").type == pa.string()
    assert table.schema.field("tokens").type == pa.list_(pa.int64())


@pytest.mark.parametrize("large", [2**60 + 1, Decimal("1.1")])
def test_values_that_no_common_type_holds_are_text(large: Any, tmp_path: Path) -> None:
    write(tmp_path / "o.parquet", [{"n": 1.5, "m": 1}], [{"n": large, "m": 2}])
    table = stored(tmp_path / "o.parquet")
    assert [json.loads(value) for value in table["n"].to_pylist()] == [1.5, json.loads(json.dumps(large, default=str))]
    assert table["m"].to_pylist() == [1, 2]


def test_a_schema_is_the_same_whether_rows_failed_or_not(tmp_path: Path) -> None:
    write(tmp_path / "o.parquet", [{"a": 1}])
    whole = stored(tmp_path / "o.parquet").schema
    sink = open_sink(str(tmp_path / "p.parquet"), "parquet")
    sink.append(sink.encode([{"a": 1, "error": ERROR}]))
    sink.finish()
    assert stored(tmp_path / "p.parquet").schema == whole


def test_arrays_are_stored(tmp_path: Path) -> None:
    row = {"embeddings": np.array([0.5, 1], np.float32), "matrix": np.zeros((2, 1)), "scalar": np.int64(3)}
    sink = write(tmp_path / "o.parquet", [row])
    assert stored(tmp_path / "o.parquet").schema.field("embeddings").type == pa.list_(pa.float32())
    assert next(sink.published())["scalar"] == 3
    (tmp_path / "o.parquet").unlink()
    sink = write(tmp_path / "o.jsonl", [row])
    assert list(sink.published()) == [{"embeddings": [0.5, 1.0], "matrix": [[0.0], [0.0]], "scalar": 3}]


def test_single_precision_has_the_fewest_digits_that_read_back_the_same(tmp_path: Path) -> None:
    values = np.array([0.1, 1 / 3, 16777217, -1.1e-20, 3e38, 1e-45, 0, np.pi, np.inf], np.float32)
    many = np.random.default_rng(0).normal(0, 0.05, 2000).astype(np.float32)
    sink = write(tmp_path / "o.jsonl", [{"a": values, "b": values[1], "many": many}])
    (row,) = sink.published()
    assert row["a"][:3] == [0.1, 0.33333334, 16777216.0]
    assert (row["b"], row["a"][-1]) == (0.33333334, None)  # JSON has no infinity
    assert (np.array(row["a"][:-1], np.float32) == values[:-1]).all()
    assert row["many"] == [float(str(one)) for one in many]


def test_moments_of_pandas_are_stored(tmp_path: Path) -> None:
    moment = pa.scalar(1600000000123456789, pa.timestamp("ns")).as_py()
    (row,) = write(tmp_path / "o.jsonl", [{"when": moment}]).published()
    assert row == {"when": "2020-09-13T12:26:40.123456789"}


def test_csv_holds_any_text(tmp_path: Path) -> None:
    """In a process of its own: how long a cell may be is a setting of all of it."""
    probe = (
        "import sys; from headway.batch.sinks import open_sink; sink = open_sink(sys.argv[1], 'csv')\n"
        "row = {'a': 'carriage\\rreturn', 'b': '\\r', 'c': 'x' * 200_000}; sink.append(sink.encode([row]))\n"
        "sink.finish(); assert [{**row}] == list(sink.published())"
    )
    subprocess.run([sys.executable, "-c", probe, tmp_path / "o.csv"], check=True)


def test_small_pieces_are_one_row_group(tmp_path: Path) -> None:
    write(tmp_path / "o.parquet", *([{"a": i}] for i in range(100)))
    assert pq.ParquetFile(tmp_path / "o.parquet").num_row_groups == 1


def test_a_file_without_rows_has_the_inputs_columns(tmp_path: Path) -> None:
    sink = open_sink(str(tmp_path / "o.parquet"), "parquet", pa.schema({"a": pa.int8()}))
    assert sink.partial
    sink.partial.open()
    sink.finish()
    assert stored(tmp_path / "o.parquet").schema.names == ["a", "error"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "out.jsonl")
    sink = open_sink(str(tmp_path / "link.jsonl"), "jsonl")
    sink.append(sink.encode([{"a": 1}]))
    sink.finish()
    assert (tmp_path / "link.jsonl").is_symlink()
    assert (tmp_path / "out.jsonl").read_text() == '{"a":1}\n'


def test_a_device_is_written_and_not_replaced() -> None:
    sink = open_sink("/dev/null", "jsonl")
    sink.append(sink.encode([{"a": 1}]))
    sink.finish()
    assert Path("/dev/null").is_char_device()
    with pytest.raises(ConfigError, match="only jsonl can be written to a pipe"):
        open_sink("/dev/null", "parquet")


def test_a_pipe_has_a_row_as_soon_as_it_is_written(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    sink = open_sink(str(tmp_path / "pipe"), "jsonl")
    sink.append(sink.encode([{"a": 1}]))
    assert os.read(reader, 100) == b'{"a":1}\n'
    sink.finish()
    os.close(reader)


def test_the_standard_output_goes_on_where_it_is(tmp_path: Path) -> None:
    """In a file that others write, too; and it may be a socket."""
    probe = (
        "from headway.batch.sinks import open_sink; sink = open_sink('-', 'jsonl')\n"
        "sink.append(sink.encode([{'a': 1}])); sink.finish()"
    )
    (tmp_path / "o").write_text("before\n")
    with (tmp_path / "o").open("a") as file:
        subprocess.run([sys.executable, "-c", probe], stdout=file, check=True)
    assert (tmp_path / "o").read_text() == 'before\n{"a":1}\n'
    here, there = socket.socketpair()
    with here, there:
        subprocess.run([sys.executable, "-c", probe], stdout=there.fileno(), check=True)
        assert here.recv(100) == b'{"a":1}\n'


def test_a_file_in_memory_is_a_file() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        write(Path(folder) / "o.jsonl", [{"a": 1}])


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written: No such file or directory"):
        open_sink(str(tmp_path / "missing" / "out.jsonl"), "jsonl")
    with pytest.raises(ConfigError, match="is a directory"):
        open_sink(str(tmp_path), "jsonl")
