"""/v1/responses, driven by OpenAI's client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from tests.server.conftest import Served

from headway.errors import RequestError
from headway.server.reading import Part
from headway.server.responses import Output
from headway.server.responses_input import messages_of

MODEL = "smollm2-135m-instruct"
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
TOOL: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def respond(client: openai.OpenAI, **fields: Any) -> Any:
    create: Any = client.responses.create
    return create(**{"model": MODEL, "input": QUESTION, "temperature": 0, **fields})


def test_a_text_is_the_answer(client: openai.OpenAI) -> None:
    response = respond(client)
    assert (response.output_text, response.status, response.incomplete_details) == (ANSWER, "completed", None)
    assert (response.usage.input_tokens, response.usage.output_tokens) == (37, 8)
    assert (response.tools, response.store, response.temperature) == ([], False, 0)


def test_a_cut_answer_is_incomplete(client: openai.OpenAI) -> None:
    response = respond(client, max_output_tokens=2)
    assert (response.output_text, response.status) == ("The capital", "incomplete")
    assert response.incomplete_details.reason == "max_output_tokens"


def test_events_tell_the_same_as_the_response(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0) as stream:
        assert stream.get_final_response().output_text == ANSWER
    events: list[Any] = list(respond(client, stream=True))
    assert [event.sequence_number for event in events] == [*range(len(events))]
    kinds = [event.type for event in events]
    assert list(dict.fromkeys(kinds)) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    assert events[-1].response.usage.output_tokens == 8
    assert events[0].response.output == []


def test_what_openai_lets_be_null_may_be(client: openai.OpenAI) -> None:
    nulls = dict.fromkeys(["stream", "store", "truncation", "instructions", "metadata"])
    assert respond(client, extra_body=nulls).output_text == ANSWER


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_conversation_with_a_function(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    said = respond(client, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, stream=stream)
    if stream:
        *events, last = said
        said = last.response
        pieces = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
        assert pieces == said.output[0].arguments
    (call,) = said.output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "Oslo"})
    told = {"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}
    history = [{"role": "user", "content": QUESTION}, call.model_dump(exclude_none=True), told]
    with pytest.raises(openai.BadRequestError, match="input"):  # this model's template takes no calls
        respond(client, input=history)


def test_a_format_holds(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "name": "s", "schema": schema, "strict": True}
    assert json.loads(respond(client, text={"format": form}).output_text) == {"a": 1}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("store", True),
        ("previous_response_id", "resp_1"),
        ("foo", 1),
        ("max_output_tokens", 0),
        ("input", []),
        ("input", [{"type": "file"}]),
        ("input", [{"role": "user", "content": [{"type": "input_image"}]}]),
        ("input", [{"role": "user", "content": 5}]),
        ("input", "word " * 20_000),
        ("tools", [{"type": "web_search"}]),
        ("tools", [TOOL]),
        ("text", {"format": {"type": "json_schema", "schema": {"type": 5}, "name": "s"}}),
        ("text", {"format": {"type": "text", "schema": {"type": "object"}, "name": "s"}}),
    ],
)
def test_what_cannot_be_honoured_is_named(client: openai.OpenAI, field: str, value: object) -> None:
    with pytest.raises(openai.BadRequestError, match=field) as caught:
        respond(client, **({} if field == "foo" else {field: value}), extra_body={field: value})
    assert (caught.value.param or "").startswith(field)


def test_items_are_messages_of_a_chat() -> None:
    items: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
    ]
    system, user, assistant, tool = messages_of("Be kind.", items)
    assert system == {"role": "system", "content": "Be kind."}
    assert user == {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    assert [call["function"]["name"] for call in assistant["tool_calls"]] == ["f", "g"]
    assert tool == {"role": "tool", "tool_call_id": "1", "content": "x"}
    with pytest.raises(RequestError, match=r"input\[0\]"):
        messages_of(None, [{"type": "function_call", "name": "f"}])


def test_each_kind_of_part_is_an_item() -> None:
    output = Output()
    parts = [
        Part("reasoning_content", "Hm"),
        Part("reasoning_content", "."),
        Part("content", "Yes."),
        Part("call", "{", "f"),
    ]
    events = [json.loads(json.dumps(event)) for part in [*parts, Part("call", "}")] for event in output.add(part)]
    events += [json.loads(json.dumps(event)) for event in output.end("stop")]
    assert [item["type"] for item in output.items] == ["reasoning", "message", "function_call"]
    assert output.items[0]["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert output.items[2]["arguments"] == "{}"
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == output.items and all(item["status"] == "completed" for item in done)
    added = [event["item"]["status"] for event in events if event["type"] == "response.output_item.added"]
    assert added == ["in_progress"] * 3
