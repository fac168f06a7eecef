"""What tools and tool_choice mean: what the prompt shows, what the text must be, how it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from headway.errors import RequestError
from headway.llm.tools import ToolParser
from headway.server.protocol import ChatRequest, converted
from headway.server.reading import Content, NamedCall, Reader, calls_in, required_calls

Schema = dict[str, Any]


class Function(msgspec.Struct):
    """parameters: a JSON schema; without one the function has none."""

    name: str
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None

    def schema(self) -> Schema:
        return {"type": "object", **(self.parameters or {"properties": {}, "additionalProperties": False})}


class Tool(msgspec.Struct):
    type: Literal["function"]
    function: Function


@dataclass(frozen=True, slots=True)
class ToolUse:
    """shown: tools that the template gets. schema: that the text must follow. reader: for each sample."""

    shown: list[dict[str, Any]] | None = None
    schema: Schema | None = None
    reader: Callable[[], Reader] = Content


def tool_use(request: ChatRequest, parser: ToolParser) -> ToolUse:
    """Raises RequestError."""
    tools, choice = request.tools or [], request.tool_choice
    functions = [converted(f"tools[{i}]", tool, Tool).function for i, tool in enumerate(tools)]
    if choice is None:
        choice = "auto" if tools else "none"
    if choice == "none" or (choice == "auto" and not tools):
        return ToolUse()
    single = not request.parallel_tool_calls
    if choice == "auto":
        if not parser.known:
            accepted = "this model's template teaches no known tool notation: tool_choice may be required or a function"
            raise RequestError("tools", tools, accepted)
        if request.response_format and request.response_format.type != "text":
            raise RequestError("response_format", request.response_format.type, 'not beside tools with "auto"')
        return ToolUse(tools, None, lambda: calls_in(parser, single))
    if request.structured_outputs is not None:
        raise RequestError("structured_outputs", request.structured_outputs, "not beside a call that is made sure of")
    if choice == "required":
        if not functions:
            raise RequestError("tool_choice", choice, "there are no tools")
        return ToolUse(tools, _calls_schema(functions, single), required_calls)
    if isinstance(choice, str):
        raise RequestError("tool_choice", choice, "must be auto, none, required or a function")
    name = converted("tool_choice", choice, Tool).function.name
    named = next((function for function in functions if function.name == name), None)
    if named is None:
        accepted = f"must be one of tools: {', '.join(function.name for function in functions)}"
        raise RequestError("tool_choice.function.name", name, accepted)
    return ToolUse(tools, named.schema(), lambda: NamedCall(name))


def _calls_schema(functions: list[Function], single: bool) -> Schema:
    """A list of name and arguments. Functions' schemas move under $defs, and what they refer to with them."""
    names = [{"const": function.name} for function in functions]
    call = [
        {
            "type": "object",
            "properties": {"name": name, "arguments": {"$ref": f"#/$defs/{i}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, name in enumerate(names)
    ]
    moved = {str(i): _moved(function.schema(), f"#/$defs/{i}") for i, function in enumerate(functions)}
    most = {"maxItems": 1} if single else {}
    return {"type": "array", "minItems": 1, **most, "items": {"anyOf": call}, "$defs": moved}


def _moved(schema: Schema, to: str) -> Schema:
    text = msgspec.json.encode(schema)  # inside strings, quotes are escaped: what looks like a reference is one
    return msgspec.json.decode(text.replace(b'"$ref":"#', b'"$ref":"' + to.encode()))
