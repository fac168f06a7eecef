"""Tool calls in the notations of chat templates."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.llm.tools import ToolParser

TAGGED, LISTED, BARE = (ToolParser(f"... {mark} ...") for mark in ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>"))
WEATHER = {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}
LLAMA = {"name": "weather", "parameters": {"city": "Oslo", "days": 2}}
ONE, TWO = json.dumps(WEATHER), json.dumps([WEATHER, WEATHER])


@pytest.mark.parametrize(
    ("parser", "text", "content", "count"),
    [
        (TAGGED, f"I look.\n<tool_call>\n{ONE}\n</tool_call>", "I look.", 1),
        (TAGGED, f"<tool_call>{ONE}</tool_call>\n<tool_call>{ONE}</tool_call>", "", 2),
        (TAGGED, f"<tool_call>{TWO}</tool_call>", "", 2),
        (TAGGED, f"<tool_call>{ONE}", "", 1),
        (LISTED, f"[TOOL_CALLS] {TWO}", "", 2),
        (LISTED, TWO, "", 2),
        (BARE, f"<|python_tag|>{json.dumps(LLAMA)}; {json.dumps(LLAMA)}", "", 2),
        (BARE, json.dumps(LLAMA), "", 1),
    ],
)
def test_calls_are_found_in_each_notation(parser: ToolParser, text: str, content: str, count: int) -> None:
    left, calls = parser.parse(text)
    assert left == content and len({call["id"] for call in calls}) == count
    for call in calls:
        assert (call["type"], call["function"]["name"]) == ("function", "weather")
        assert json.loads(call["function"]["arguments"]) == WEATHER["arguments"]


@pytest.mark.parametrize("parser", [TAGGED, LISTED, BARE, ToolParser("no tools here")])
@pytest.mark.parametrize("text", ["Plain words.", '<tool_call>{"name": </tool_call>', '{"a": 1}', "[1, 2]", "7", ""])
def test_what_is_no_call_stays_text(parser: ToolParser, text: str) -> None:
    assert parser.parse(text) == (text, [])


@given(st.text())
def test_no_text_breaks_a_parser(text: str) -> None:
    for parser in (TAGGED, LISTED, BARE):
        assert parser.parse(text)[1] == [] or "{" in text


def test_which_notation_is_known() -> None:
    assert TAGGED.known and not ToolParser("plain").known
