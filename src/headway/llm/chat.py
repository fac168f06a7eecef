"""Chat messages to prompt text, by the template a model brings (jinja2, sandboxed: a template is somebody's code)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn, cast

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headway.errors import RequestError
from headway.tokenizers import Tokenizer

Message = Mapping[str, Any]
"""role and content (a string, or parts {"type": "text", "text": ...}); what else it has, the template sees."""

_CONTINUE_HERE = "<<continue this message>>"


class ChatRenderer:
    """Renders conversations for one model. Templates are compiled once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._templates = tokenizer.chat_templates
        self._special_tokens = tokenizer.special_tokens
        self._compiled = lru_cache(16)(_environment().from_string)  # requests may bring theirs

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, special tokens written out. RequestError on messages the template or this function refuses.

        add_generation_prompt: end where the assistant's answer starts. continue_final_message: end inside the last
        message instead, so that the answer continues it. template_kwargs: further variables of the template.
        """
        conversation = check_messages(messages)
        if continue_final_message:
            conversation[-1]["content"] = (conversation[-1]["content"] or "") + _CONTINUE_HERE
        template = self._template(chat_template or self._choose(tools))
        variables = {
            "messages": conversation,
            "tools": _plain("tools", tools),
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        more = _plain("chat_template_kwargs", template_kwargs or {})
        if taken := sorted(variables.keys() & more):
            raise RequestError("chat_template_kwargs", taken, "must be others than what has fields of its own")
        try:
            text = template.render({**self._special_tokens, **more, **variables})
        except Exception as error:  # a template is a program: it may fail in any way, and so refuse the messages
            raise RequestError("messages", messages, f"the chat template refuses them: {error}") from error
        return _cut_at_marker(text) if continue_final_message else text

    def _choose(self, tools: object) -> str:
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise RequestError("chat_template", None, "this model brings no chat template: give one, or send a prompt")
        return self._templates[name]

    def _template(self, source: str) -> jinja2.Template:
        try:
            return self._compiled(source)
        except jinja2.TemplateSyntaxError as error:
            raise RequestError("chat_template", source, f"{error.message} in line {error.lineno}") from error


def is_begun(messages: Any) -> bool:
    """Whether the assistant has begun the answer, which is to be continued."""
    last: Any = messages[-1] if isinstance(messages, Sequence) and messages else None
    return isinstance(last, Mapping) and cast("Mapping[str, Any]", last).get("role") == "assistant"


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A plain copy in the form templates expect: text content as one string, tool arguments as objects."""
    plain = _plain("messages", messages)
    if not isinstance(plain, list) or not plain:
        raise RequestError("messages", messages, "must be a list of at least one message")
    return [_check_message(f"messages[{i}]", message) for i, message in enumerate(plain)]


def _check_message(field: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RequestError(field, message, "must be an object with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{field}.role", role, "must be a string such as system, user, assistant or tool")
    if content is None and not message.get("tool_calls"):
        raise RequestError(f"{field}.content", content, "must be a string or a list of text parts")
    given = {name: value for name, value in message.items() if value is not None}  # a file of columns has them all
    checked = {**given, "content": _text(f"{field}.content", content)}
    if message.get("tool_calls"):
        checked["tool_calls"] = _parse_arguments(f"{field}.tool_calls", message["tool_calls"])
    return checked


def _text(field: str, content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(field, content, "must be a string or a list of text parts")
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f"{field}[{i}]", part, 'only parts {"type": "text", "text": "..."} are accepted')
    return "\n".join(part["text"] for part in content)


def _parse_arguments(field: str, calls: Any) -> list[dict[str, Any]]:
    """OpenAI's messages carry a call's arguments as JSON text; templates want the object."""
    try:
        return [_parse_call(call) for call in calls]
    except (TypeError, KeyError, ValueError) as error:
        raise RequestError(field, calls, f"each needs function.name and function.arguments ({error!r})") from error


def _parse_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    return {**call, "function": {**function, "arguments": arguments}}


def _plain(field: str, value: Any) -> Any:
    """JSON types only: whatever methods the caller's objects have stay out of the template's reach."""
    try:
        return msgspec.to_builtins(value)
    except TypeError as error:
        raise RequestError(field, value, f"must be made of JSON types ({error})") from error


def _cut_at_marker(text: str) -> str:
    end = text.rfind(_CONTINUE_HERE)
    if end < 0:
        raise RequestError("continue_final_message", True, "the chat template leaves the last message out")
    return text[:end]


class _Generation(Extension):
    """{% generation %} marks answers for training; here its body is rendered and the tag ignored."""

    tags = {"generation"}  # noqa: RUF012 (as the base class declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(functions)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja's own escapes HTML, which a prompt must not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
