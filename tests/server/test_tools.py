"""Tool calls and reasoning, driven by OpenAI's client. What the model says is made sure of by a constraint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tests.server.conftest import Served

from headway.llm.tools import ToolParser
from headway.server.protocol import ChatRequest
from headway.server.tools import tool_use

MODEL = "smollm2-135m-instruct"
TEMPLATE = """\
{%- if tools %}<|im_start|>system
Tools: {{ tools | tojson }}. Call them as <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ (message.content or "").split("</think>")[-1] }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if think %}<think>
{% endif %}{% endif %}"""
PLACE = {"enum": ["Oslo", "Rome"]}
WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/Place"}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"Place": PLACE},
    },
}
TOOLS: list[Any] = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "time"}}]
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
ASKED: list[Any] = [{"role": "user", "content": "How is the weather in Oslo?"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    options = ["--chat-template", str(template), "--trust-request-chat-template", "--scheduling-policy", "priority"]
    served = Served(MODEL, "--threads", "1", *options)
    yield openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    assert served.end() == 0, served.log


def ask(client: openai.OpenAI, says: str = "", extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    """says: what the model is made to say."""
    body = {**({"structured_outputs": {"choice": [says]}} if says else {}), **(extra or {})}
    create: Any = client.chat.completions.create
    return create(**{"model": MODEL, "messages": ASKED, "temperature": 0, **fields}, extra_body=body)


def streamed(chunks: Any) -> tuple[str, str, list[dict[str, Any]], str]:
    """Reasoning, content, calls and finish reason, put together as a client does."""
    reasoning, content, calls, reasons = "", "", list[dict[str, Any]](), list[str]()
    for chunk in chunks:
        (choice,) = chunk.choices
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            if call.id:
                assert call.index == len(calls)
                calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
            calls[call.index]["arguments"] += call.function.arguments
        reasons += [choice.finish_reason] if choice.finish_reason else []
    (reason,) = reasons
    return reasoning, content, calls, reason


def test_a_conversation_with_a_tool(client: openai.OpenAI) -> None:
    first = ask(client, f"I look.\n{CALL}", tools=TOOLS)
    (choice,) = first.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    told = {"role": "tool", "tool_call_id": call.id, "content": "It rains."}
    second = ask(client, messages=[*ASKED, choice.message.model_dump(), told], tools=TOOLS, max_tokens=8)
    assert second.choices[0].message.content
    assert second.usage.prompt_tokens > first.usage.prompt_tokens + 10


@pytest.mark.parametrize("parallel", [True, False])
def test_calls_are_streamed(client: openai.OpenAI, parallel: bool) -> None:
    said = ask(client, f"I look.\n{CALL}\n{CALL}", tools=TOOLS, parallel_tool_calls=parallel, stream=True)
    _, content, calls, reason = streamed(said)
    assert (content, reason, len(calls)) == ("I look.", "tool_calls", 2 if parallel else 1)
    assert len({call["id"] for call in calls}) == len(calls)
    for call in calls:
        assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Oslo"})


def test_what_is_no_call_is_text(client: openai.OpenAI) -> None:
    for text in ("Just words.", "<tool_call>weather()</tool_call>"):
        assert streamed(ask(client, text, tools=TOOLS, stream=True)) == ("", text, [], "stop")
    (choice,) = ask(client, CALL, tools=TOOLS, tool_choice="none").choices
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_may_be_made_sure_of(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    said = ask(client, tools=TOOLS[:1], tool_choice=choice, parallel_tool_calls=False, stream=stream, max_tokens=200)
    if stream:
        _, content, calls, reason = streamed(said)
    else:
        message, reason = said.choices[0].message, said.choices[0].finish_reason
        content, calls = message.content, [call.function.model_dump() for call in message.tool_calls]
    (call,) = calls
    assert (call["name"], content or None, reason) == ("weather", None, "tool_calls")
    assert json.loads(call["arguments"])["city"] in PLACE["enum"]


def test_a_call_that_is_cut_off_says_so(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    _, _, calls, reason = streamed(ask(client, tools=TOOLS, tool_choice=named, max_tokens=2, stream=True))
    assert (calls[0]["name"], reason) == ("weather", "length")
    (choice,) = ask(client, tools=TOOLS, tool_choice="required", max_tokens=2).choices
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
    assert choice.message.content.startswith("[")


def test_reasoning_is_told_apart(client: openai.OpenAI) -> None:
    text = f"<think>\nRain?\nSure.\n</think>\n\nIt rains. {CALL}"
    (choice,) = ask(client, text, tools=TOOLS).choices
    assert (choice.message.reasoning_content, choice.message.content) == ("Rain?\nSure.", "It rains.")
    assert choice.message.tool_calls[0].function.name == "weather"
    reasoning, content, (call,), reason = streamed(ask(client, text, tools=TOOLS, stream=True))
    assert (reasoning, content, call["name"], reason) == ("Rain?\nSure.", "It rains.", "weather", "tool_calls")


def test_reasoning_tokens_are_counted_the_same_way_in_a_stream(client: openai.OpenAI) -> None:
    usage = ask(client, "<think>Rain? Sure.</think>It rains.").usage
    count = usage.completion_tokens_details.reasoning_tokens
    assert 6 < count < usage.completion_tokens
    *_, last = ask(client, "<think>Rain? Sure.</think>It rains.", stream=True, stream_options={"include_usage": True})
    assert last.usage.completion_tokens_details.reasoning_tokens == count
    assert ask(client, "It rains.").usage.completion_tokens_details.reasoning_tokens == 0


def test_reasoning_may_have_begun_in_the_prompt(client: openai.OpenAI) -> None:
    (choice,) = ask(client, extra={"chat_template_kwargs": {"think": True}}, max_tokens=4).choices
    assert choice.message.reasoning_content and not choice.message.content


def test_a_request_may_bring_a_template_where_they_are_trusted(client: openai.OpenAI) -> None:
    template = "{{ messages[0].content }} It is"
    usage = ask(client, extra={"chat_template": template}, max_tokens=1).usage
    assert usage.prompt_tokens < ask(client, max_tokens=1).usage.prompt_tokens


def test_a_conversation_is_tokenised_as_the_servers_template_has_it(client: openai.OpenAI) -> None:
    url = str(client.base_url).replace("/v1/", "/tokenize")
    told: Any = client.post(url, body={"messages": ASKED, "tools": TOOLS}, cast_to=object)
    assert told["count"] == ask(client, tools=TOOLS, max_tokens=1).usage.prompt_tokens


def test_priorities_are_taken_where_the_policy_has_them(client: openai.OpenAI) -> None:
    assert ask(client, extra={"priority": 3}, max_tokens=1).choices


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("tool_choice", {"tool_choice": "sometimes"}),
        ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "nobody"}}}),
        ("tool_choice", {"tool_choice": {"type": "allowed_tools"}}),
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("structured_outputs", {"tool_choice": "required", "extra": {"structured_outputs": {"regex": "a"}}}),
        ("tools", {"tools": [{"type": "function", "function": {"name": 5}}]}),
        ("tools", {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}]}),
    ],
)
def test_what_cannot_be_honoured_is_named(client: openai.OpenAI, field: str, fields: dict[str, Any]) -> None:
    if field == "tools":
        fields["tool_choice"] = "required"
    with pytest.raises(openai.BadRequestError, match=field) as caught:
        ask(client, **{"tools": TOOLS, **fields})
    assert (caught.value.param or "").startswith(field)


def test_references_of_a_functions_schema_move_with_it() -> None:
    recursive = {"properties": {"next": {"$ref": "#"}, "text": {"const": '"$ref":"#'}}}
    tools = [*TOOLS, {"type": "function", "function": {"name": "list", "parameters": recursive}}]
    request = ChatRequest(messages=ASKED, tools=tools, tool_choice="required")
    schema = tool_use(request, ToolParser("")).schema
    assert schema is not None
    assert schema["$defs"]["0"]["properties"]["city"] == {"$ref": "#/$defs/0/$defs/Place"}
    assert schema["$defs"]["1"] == {"type": "object", "properties": {}, "additionalProperties": False}
    assert schema["$defs"]["2"]["properties"] == {"next": {"$ref": "#/$defs/2"}, "text": {"const": '"$ref":"#'}}
