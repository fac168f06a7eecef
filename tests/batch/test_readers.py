from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headway.batch.readers import InputRow, count_lines, open_reader
from headway.errors import ConfigError


def read(path: Path, kind: str | None = None) -> list[InputRow]:
    return list(open_reader(path, kind))


def written(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"prompt": "hi"', "not JSON"),
        (b'{"prompt": "\x80"}', "not JSON"),
        (b'{"x": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "not JSON: maximum recursion depth"),
        (b"[1, 2]", "must be a JSON object, not list"),
    ],
)
def test_a_bad_line_is_a_row_that_says_its_line_and_what_is_wrong(text: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"a": 1}\n\n' + text + b'\n{"a": 2}\n')
    first, bad, last = read(tmp_path / "in.jsonl")
    assert bad.error and bad.error.message.startswith(f"line 3: {problem}")
    assert (bad.error.type, bad.error.stage, bad.place) == ("InvalidRow", "read", "line 3")
    assert (first.source, last.source, last.index) == ({"a": 1}, {"a": 2}, 2)


def test_rows_are_numbered_by_line_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n  \n{"prompt": "b"}')
    assert [(row.index, row.number, row.data) for row in read(path)] == [
        (0, 1, {"prompt": "a"}),
        (1, 4, {"prompt": "b"}),
    ]


def test_stages_change_a_rows_data_and_not_its_source(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "hi"}], "error": "of an earlier job"}'
    )
    (row,) = read(tmp_path / "in.jsonl")
    row.data["prompt"] = "x"
    assert row.source == {"messages": [{"role": "user", "content": "hi"}]}


def test_csv_rows_are_texts_by_column(tmp_path: Path) -> None:
    text = '\ufeffid,text\n1,"two\nlines, ""quoted"""\n\n2,plain\n3\n4,' + "x" * 200_000 + "\n"
    (tmp_path / "in.csv").write_text(text)
    rows = read(tmp_path / "in.csv")
    assert [row.data for row in rows[:2]] == [{"id": "1", "text": 'two\nlines, "quoted"'}, {"id": "2", "text": "plain"}]
    assert rows[2].error and rows[2].error.message == "line 6: has 1 cells, the first row 2"
    assert len(rows[3].data["text"]) == 200_000


@pytest.mark.parametrize(
    ("content", "problem"), [(b"a,a\n", "different names"), (b"a\n\xff\n", "no CSV"), (b'a\n"b', "")]
)
def test_what_is_no_csv_is_refused(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(content)
    if not problem:  # the last quote may be missing
        assert [row.data for row in read(tmp_path / "in.csv")] == [{"a": "b"}]
        return
    with pytest.raises(ConfigError, match=problem):
        read(tmp_path / "in.csv")


@pytest.mark.parametrize("name", ["in.parquet", "in.arrow"])
def test_stored_rows_keep_their_types(name: str, tmp_path: Path) -> None:
    table = pa.table({"id": pa.array(range(5), pa.int8()), "m": [[{"role": "user"}]] * 5, "error": [None] * 5})
    reader = open_reader(written(tmp_path / name, table))
    rows = list(reader)
    assert [row.data for row in rows] == [{"id": i, "m": [{"role": "user"}]} for i in range(5)]
    assert (reader.count(), reader.types.field("id").type, rows[4].place) == (5, pa.int8(), "row 5")


ROWS: list[dict[str, Any]] = [{"a": i, "b": f"{i}"} for i in range(40)]
FILES = ["in.jsonl", "in.csv", "in.parquet", "in.arrow"]


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(f'{{"a": {row["a"]}, "b": "{row["b"]}"}}\n' for row in rows))
    elif path.suffix == ".csv":
        path.write_text("a,b\n" + "".join(f"{row['a']},{row['b']}\n" for row in rows))
    else:
        written(path, pa.Table.from_pylist(rows))
    return path


@pytest.mark.parametrize("name", FILES)
def test_a_digest_is_of_all_rows_up_to_its_own(name: str, tmp_path: Path) -> None:
    before = [row.digest for row in read(save(tmp_path / name, ROWS))]
    changed = [*ROWS[:10], {"a": 10, "b": "other"}, *ROWS[11:]]
    after = [row.digest for row in read(save(tmp_path / name, changed))]
    assert after[:10] == before[:10]
    assert all(one != other for one, other in zip(after[10:], before[10:], strict=True))
    longer = [row.digest for row in read(save(tmp_path / name, [*ROWS, *ROWS]))]
    assert longer[:40] == before


@pytest.mark.parametrize("name", FILES)
def test_how_many_rows_there_are_is_known_where_that_is_cheap(name: str, tmp_path: Path) -> None:
    assert open_reader(save(tmp_path / name, ROWS)).count() == 40
    assert open_reader(iter(ROWS)).count() is None
    assert open_reader(ROWS).count() == 40
    (tmp_path / "quoted.csv").write_text('a\n"1\n2"\n')
    assert open_reader(tmp_path / "quoted.csv").count() is None


@pytest.mark.parametrize("name", FILES)
def test_an_empty_file_has_no_rows(name: str, tmp_path: Path) -> None:
    if name in ("in.parquet", "in.arrow"):
        written(tmp_path / name, pa.table({"a": pa.array([], pa.int8())}))
    else:
        (tmp_path / name).touch()
    assert (read(tmp_path / name), open_reader(tmp_path / name).count()) == ([], 0)


@pytest.mark.parametrize(("text", "lines"), [("", 0), ("a", 1), ("a\n", 1), ("a\nb", 2), ("\n\n", 2)])
def test_lines_are_counted_with_or_without_a_last_newline(text: str, lines: int, tmp_path: Path) -> None:
    (tmp_path / "in").write_text(text)
    assert count_lines(tmp_path / "in") == lines


def test_a_digest_is_of_a_csv_files_header_too(tmp_path: Path) -> None:
    first, other = (read(save_text(tmp_path / name, f"{name}\n1\n")) for name in ("a.csv", "b.csv"))
    assert first[0].digest != other[0].digest


def save_text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_what_an_earlier_csv_output_says_of_errors_is_dropped(tmp_path: Path) -> None:
    text = "id,error.type,error.message,error.stage\n1,ValueError,m,s\n"
    assert [row.data for row in read(save_text(tmp_path / "in.csv", text))] == [{"id": "1"}]


def test_rows_of_a_program_that_cannot_be_read_say_why() -> None:
    odd: list[Any] = ["text", {"id": 2**70}, {"id": "\ud800"}, {"id": 3}]
    bad, *others = open_reader(odd)
    assert bad.error and bad.error.message == "row 1: must be a mapping, not str"
    assert [row.data for row in others] == odd[1:]
    assert len({row.digest for row in others}) == 3


@pytest.mark.parametrize("name", ["in.parquet", "in.arrow"])
def test_a_stored_row_with_a_value_beyond_pythons_is_one_with_an_error(name: str, tmp_path: Path) -> None:
    table = pa.table({"id": range(3), "day": pa.array([0, 10**7, 1], pa.date32())})
    well, bad, last = read(written(tmp_path / name, table))
    assert bad.error and bad.error.message.startswith("row 2: column 'day': ")
    assert bad.source == {"id": 1}
    assert (well.data["id"], last.data["id"]) == (0, 2)


@pytest.mark.parametrize("name", ["in.parquet", "in.arrow"])
def test_what_is_no_stored_file_is_refused(name: str, tmp_path: Path) -> None:
    for content in (b"", b"id,text\n"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=r"is no (Parquet|Arrow) file"):
            open_reader(tmp_path / name)
    twice = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    with pytest.raises(ConfigError, match="different names"):
        open_reader(written(tmp_path / name, twice))


def test_null_in_parameters_of_a_file_of_columns_is_not_given(tmp_path: Path) -> None:
    rows = [{"sampling_params": {"n": 2}, "tools": [{"a": 1}]}, {"sampling_params": {"seed": 1}, "tools": [{"b": 2}]}]
    table = pa.Table.from_pylist(rows)
    assert [row.data for row in read(written(tmp_path / "in.parquet", table))] == rows


def test_a_socket_may_be_the_standard_input() -> None:
    probe = "from headway.batch.readers import open_reader; print([row.data for row in open_reader('-')])"
    here, there = socket.socketpair()
    with here, there:
        here.sendall(b'{"a": 1}\n')
        here.shutdown(socket.SHUT_WR)
        said = subprocess.check_output([sys.executable, "-c", probe], stdin=there.fileno(), text=True)
    assert said == "[{'a': 1}]\n"
