"""Answers taken apart into reasoning, content and tool calls."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.llm.tools import ToolParser
from headway.server.reading import (
    Calls,
    Content,
    Message,
    NamedCall,
    Reader,
    Thinking,
    call_id,
    calls_in,
    required_calls,
)

TAGGED, LISTED, BARE = (ToolParser(f"... {mark} ...") for mark in ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>"))
CALL = '{"name": "f", "arguments": {"a": 1}}'

READERS = {
    "content": Content,
    "thinking": lambda: Thinking(False, Content()),
    "inside": lambda: Thinking(True, Content()),
    "tagged": lambda: calls_in(TAGGED, False),
    "listed": lambda: calls_in(LISTED, False),
    "bare": lambda: calls_in(BARE, True),
    "required": required_calls,
    "named": lambda: NamedCall("f"),
    "both": lambda: Thinking(False, calls_in(TAGGED, False)),
}
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", CALL, f"[{CALL}]"]
PIECES = st.lists(st.sampled_from([*MARKS, "<", "</", "thi", "[", "{", " ", "\n", "x", "Hello world."]))


def read(reader: Reader, *pieces: str) -> dict[str, Any]:
    message = Message()
    for piece in pieces:
        for part in reader.push(piece):
            message.add(part)
    for part in reader.end():
        message.add(part)
    calls = [(call.name, call.arguments) for call in message.calls]
    said = {"reasoning": message.reasoning, "content": message.content, "calls": calls}
    return {name: value for name, value in said.items() if value}


@given(PIECES.map("".join), st.data(), st.sampled_from(sorted(READERS)))
def test_what_is_read_does_not_depend_on_how_the_text_is_cut(text: str, data: st.DataObject, name: str) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])]
    assert read(READERS[name](), *pieces) == read(READERS[name](), text) == read(READERS[name](), *text)


@given(PIECES.map("".join))
def test_a_text_without_marks_is_content_untouched(text: str) -> None:
    assert read(Calls("@@", "", TAGGED.parse), text).get("content", "") == text


@pytest.mark.parametrize(
    ("inside", "text", "said"),
    [
        (False, "<think>\nHm.\nSo.\n</think>\n\nYes.", {"reasoning": "Hm.\nSo.", "content": "Yes."}),
        (True, "Hm.\n</think>\n\nYes.", {"reasoning": "Hm.", "content": "Yes."}),
        (False, "\n<think>\n\n</think>\n\nYes.", {"content": "Yes."}),
        (False, "Yes. <think>no</think>", {"content": "Yes. <think>no</think>"}),
        (True, "Hm. </thin", {"reasoning": "Hm. </thin"}),
        (False, "<think>Hm.", {"reasoning": "Hm."}),
        (False, "<thi", {"content": "<thi"}),
    ],
)
def test_reasoning_is_split_off(inside: bool, text: str, said: dict[str, Any]) -> None:
    assert read(Thinking(inside, Content()), text) == said


@pytest.mark.parametrize(
    ("reader", "text", "said"),
    [
        ("tagged", f"I look.\n<tool_call>{CALL}</tool_call>", {"content": "I look.", "calls": [("f", '{"a": 1}')]}),
        ("tagged", f"<tool_call>{CALL}</tool_call>" * 2, {"calls": [("f", '{"a": 1}')] * 2}),
        ("tagged", "2 < 3 <tool_call>f()</tool_call>", {"content": "2 < 3 <tool_call>f()</tool_call>"}),
        ("listed", f"[{CALL}]", {"calls": [("f", '{"a": 1}')]}),
        ("bare", f"{CALL}; {CALL}", {"calls": [("f", '{"a": 1}')]}),
        ("required", f"[{CALL}, {CALL}]", {"calls": [("f", '{"a": 1}')] * 2}),
        ("required", f"[{CALL}, ", {"content": f"[{CALL}, "}),
        ("named", '{"a": 1}', {"calls": [("f", '{"a": 1}')]}),
        ("both", f"<think>Hm.</think>\n<tool_call>{CALL}", {"reasoning": "Hm.", "calls": [("f", '{"a": 1}')]}),
    ],
)
def test_calls_are_taken_out(reader: str, text: str, said: dict[str, Any]) -> None:
    assert read(READERS[reader](), text) == said


def test_text_is_held_back_only_while_a_call_may_begin() -> None:
    reader = calls_in(TAGGED, False)
    pushed = [[part.text for part in reader.push(piece)] for piece in ("I look", " at <too", "ls.", "<tool_call>{")]
    assert pushed == [["I look"], [" at"], [" <tools."], []]


def test_call_ids_are_what_mistrals_template_takes() -> None:
    ids = {call_id() for _ in range(100)}
    assert len(ids) == 100 and all(len(name) == 9 and name.isalnum() for name in ids)
