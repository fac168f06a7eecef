"""Requests to /v1/responses, and the chats that they mean."""

from __future__ import annotations

from typing import Any, Literal, cast

import msgspec

from headway.errors import RequestError
from headway.server.protocol import ChatRequest, JsonSchema, Messages, ResponseFormat, converted


class TextFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """As ResponseFormat; schema, name, description, strict: with type "json_schema"."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    schema: dict[str, Any] | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    format: TextFormat = msgspec.field(default_factory=TextFormat)


class ResponsesRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """/v1/responses. store and previous_response_id: nothing is stored here, so that input must have all."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    stream: bool | None = False
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: TextOptions = msgspec.field(default_factory=TextOptions)
    tools: list[dict[str, Any]] = []
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    truncation: Literal["disabled"] | None = "disabled"
    store: bool | None = False
    previous_response_id: str | None = None

    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


def chat_request(request: ResponsesRequest) -> ChatRequest:
    """The same as a chat. Raises RequestError."""
    choice, form = request.tool_choice, request.text.format
    if isinstance(choice, dict) and choice.get("type") == "function":
        choice = {"type": "function", "function": {name: value for name, value in choice.items() if name != "type"}}
    schema = None if form.schema is None else JsonSchema(schema=form.schema)
    return ChatRequest(
        model=request.model,
        messages=messages_of(request.instructions, request.input),
        stream=request.stream,
        max_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        response_format=None if form == TextFormat() else ResponseFormat(type=form.type, json_schema=schema),
        tools=[_tool(tool) for tool in request.tools] or None,
        tool_choice=choice,
        parallel_tool_calls=request.parallel_tool_calls,
        store=request.store,
    )


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": tool.get("type"), "function": {name: value for name, value in tool.items() if name != "type"}}


class _Call(msgspec.Struct):
    call_id: str
    name: str
    arguments: str


class _CallOutput(msgspec.Struct):
    call_id: str
    output: str | list[dict[str, Any]]


def messages_of(instructions: str | None, given: str | list[dict[str, Any]]) -> Messages:
    """Reasoning of earlier answers is left out, as chat templates do. Raises RequestError."""
    messages: Messages = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    for i, item in enumerate(given):
        field, kind = f"input[{i}]", item.get("type", "message")
        if kind == "message":
            messages.append({"role": item.get("role"), "content": _text(f"{field}.content", item.get("content"))})
        elif kind == "function_call":
            call = converted(field, item, _Call)
            function = {"name": call.name, "arguments": call.arguments}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(
                {"id": call.call_id, "type": "function", "function": function}
            )
        elif kind == "function_call_output":
            output = converted(field, item, _CallOutput)
            content = _text(f"{field}.output", output.output)
            messages.append({"role": "tool", "tool_call_id": output.call_id, "content": content})
        elif kind != "reasoning":
            raise RequestError(f"{field}.type", kind, "must be message, function_call or function_call_output")
    return messages


def _text(field: str, content: Any) -> Any:
    """Parts under the names that chats have for them."""
    if not isinstance(content, list):
        return content
    for i, part in enumerate(cast("list[Any]", content)):
        if not isinstance(part, dict) or part.get("type") not in ("input_text", "output_text", "text"):
            raise RequestError(f"{field}[{i}]", part, "only text is accepted")
    return [{"type": "text", "text": part.get("text")} for part in cast("list[dict[str, Any]]", content)]
