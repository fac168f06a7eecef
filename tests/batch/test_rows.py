from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headway.batch.rows import BadRow, Row, count_lines, parse_row, read_rows
from headway.messages import StructuredOutput

DEFAULTS = {"max_tokens": 9, "temperature": 0.0}


def parsed(text: str) -> Row | BadRow:
    return parse_row(3, text.encode(), DEFAULTS)


def test_a_prompt_row_takes_the_defaults() -> None:
    row = parsed('{"prompt": "hi", "id": 7}')
    assert isinstance(row, Row)
    assert (row.prompt, row.messages, row.line) == ("hi", None, 3)
    assert (row.params.max_tokens, row.params.temperature) == (9, 0.0)
    assert row.fields == {"prompt": "hi", "id": 7}


def test_a_row_may_give_messages_or_token_ids() -> None:
    row = parsed('{"messages": [{"role": "user", "content": "hi"}]}')
    assert isinstance(row, Row)
    assert row.messages == [{"role": "user", "content": "hi"}]
    row = parsed('{"prompt": [1, 2, 3]}')
    assert isinstance(row, Row)
    assert row.prompt == [1, 2, 3]


def test_sampling_params_of_a_row_win() -> None:
    given = {"max_tokens": 2, "stop": ["a"], "logit_bias": {"5": 1.0}, "structured": {"choice": ["yes", "no"]}}
    row = parsed(json.dumps({"prompt": "hi", "sampling_params": given}))
    assert isinstance(row, Row)
    assert (row.params.max_tokens, row.params.stop, row.params.temperature) == (2, ["a"], 0.0)
    assert row.params.logit_bias == {5: 1.0}
    assert row.params.structured == StructuredOutput(choice=["yes", "no"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"prompt": "hi"', "not JSON"),
        ('{"prompt": "\x80"}', "not JSON"),
        ('{"prompt": "hi", "x": ' + "[" * 20_000 + "]" * 20_000 + "}", "not JSON: maximum recursion depth"),
        ("[1, 2]", "must be a JSON object, not list"),
        ("{}", "exactly one of prompt, messages"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "exactly one of prompt, messages"),
        ('{"prompt": 5}', "prompt=5: expected"),
        ('{"messages": []}', "messages=[]"),
        ('{"messages": [{"role": "user"}]}', "with role and content"),
        ('{"prompt": "a", "sampling_params": [1]}', "sampling_params=[1]: must be an object"),
        ('{"prompt": "a", "sampling_params": {"max_token": 1}}', "sampling_params.max_token=1: unknown; did you mean"),
        ('{"prompt": "a", "sampling_params": {"max_tokens": 0}}', "max_tokens=0: must be at least 1"),
        ('{"prompt": "a", "sampling_params": {"stop": 5}}', "sampling_params.stop=5: expected"),
        ('{"prompt": "a", "sampling_params": {"structured": {"xml": ""}}}', "structured.xml=''"),
        ('{"prompt": "a", "sampling_params": {"structured": {"regex": 1}}}', "structured.regex=1: expected"),
    ],
)
def test_a_bad_row_says_its_line_and_what_is_wrong(text: str, problem: str) -> None:
    row = parse_row(3, text.encode("latin-1"), DEFAULTS)
    assert isinstance(row, BadRow)
    assert row.error.startswith("line 3: ")
    assert problem in row.error


def test_rows_are_numbered_by_line_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n\n  \n{"prompt": "b"}')
    assert [(type(r), r.line) for r in read_rows(path, DEFAULTS)] == [(Row, 1), (Row, 4)]


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.touch()
    assert list(read_rows(path, DEFAULTS)) == []


@pytest.mark.parametrize(("text", "lines"), [("", 0), ("a", 1), ("a\n", 1), ("a\nb", 2), ("\n\n", 2)])
def test_lines_are_counted_with_or_without_a_last_newline(text: str, lines: int, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(text)
    assert count_lines(path) == lines


def test_a_message_of_a_row_is_not_changed() -> None:
    fields: dict[str, Any] = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}
    row = parsed(json.dumps(fields))
    assert isinstance(row, Row)
    assert row.messages == fields["messages"]
