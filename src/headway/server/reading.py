"""A model's text taken apart as it comes: reasoning, content, tool calls.

Whatever pieces the text comes in, their joined parts are the same.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import msgspec

from headway.llm.tools import ToolParser

THINK, ANSWER = "<think>", "</think>"

Kind = Literal["reasoning_content", "content", "call"]
Parsed = tuple[str, list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Part:
    """New text of one kind. name: of a function; such a part begins a call, and text is of its arguments."""

    kind: Kind
    text: str
    name: str = ""


class Reader(Protocol):
    """No text may be pushed after end()."""

    def push(self, text: str) -> list[Part]: ...

    def end(self) -> list[Part]:
        """What has been held back."""
        ...


class Content:
    def push(self, text: str) -> list[Part]:
        return [Part("content", text)] if text else []

    def end(self) -> list[Part]:
        return []


class NamedCall:
    """All text is the arguments of one call."""

    def __init__(self, name: str) -> None:
        self._name = name

    def push(self, text: str) -> list[Part]:
        name, self._name = self._name, ""
        return [Part("call", text, name)] if text or name else []

    def end(self) -> list[Part]:
        return self.push("")


class Calls:
    """Content until a call begins: with mark, or as the first thing with opener. From there on parse decides.

    Without a mark all text is for parse. White space before a call is no part of the content. single: one call counts.
    """

    def __init__(self, mark: str, opener: str, parse: Callable[[str], Parsed], single: bool = False) -> None:
        self._mark, self._opener, self._parse, self._single = mark, opener, parse, single
        self._pending, self._fresh = "", True
        self._held: list[str] = []

    def push(self, text: str) -> list[Part]:
        if self._held:
            self._held.append(text)
            return []
        text = self._pending + text
        at, begins = until(text, self._mark)
        if self._fresh and self._opener and text.lstrip().startswith(self._opener):
            at, begins = 0, True
        if begins:
            self._held.append(text[at:])
        self._pending = text[at:]
        self._fresh = self._fresh and not at
        return [Part("content", text[:at])] if at else []

    def end(self) -> list[Part]:
        if not self._held:
            return [Part("content", self._pending)] if self._pending else []
        text = "".join(self._held)
        content, calls = self._parse(text)
        if not calls:
            return [Part("content", text)] if text else []
        parts = [Part("content", content if self._fresh else f"\n{content}")] if content else []
        for call in calls[:1] if self._single else calls:
            parts.append(Part("call", call["function"]["arguments"], call["function"]["name"]))
        return parts


class Thinking:
    """Reasoning between <think> and </think> comes first, if at all. inside: the prompt has begun it.

    White space around it is dropped.
    """

    def __init__(self, inside: bool, inner: Reader) -> None:
        self._inner = inner
        self._state: Literal["start", "fresh", "inside", "gap", "done"] = "fresh" if inside else "start"
        self._held = ""

    def push(self, text: str) -> list[Part]:
        if self._state == "done":
            return self._inner.push(text)
        text, self._held = self._held + text, ""
        if self._state == "start":
            first = text.lstrip()
            if len(first) < len(THINK) and THINK.startswith(first):
                self._held = text
                return []
            if not first.startswith(THINK):
                self._state = "done"
                return self._inner.push(text)
            self._state, text = "fresh", first[len(THINK) :]
        return self._gap(text) if self._state == "gap" else self._reasoning(text)

    def end(self) -> list[Part]:
        held, self._held = self._held, ""
        parts: list[Part] = []
        if self._state == "start":
            parts = self._inner.push(held)
        elif held.strip():
            parts = [Part("reasoning_content", held.rstrip())]
        return parts + self._inner.end()

    def _reasoning(self, text: str) -> list[Part]:
        if self._state == "fresh":
            text = text.lstrip()
        at, ends = until(text, ANSWER)
        parts = [Part("reasoning_content", text[:at])] if at else []
        if not ends:
            self._state, self._held = "inside" if at else self._state, text[at:]
            return parts
        self._state = "gap"
        return parts + self._gap(text[at:].lstrip()[len(ANSWER) :])

    def _gap(self, text: str) -> list[Part]:
        text = text.lstrip()
        if not text:
            return []
        self._state = "done"
        return self._inner.push(text)


def until(text: str, mark: str) -> tuple[int, bool]:
    """Where the mark, or what may become it, begins with the white space before it; and whether it is whole."""
    found = text.find(mark)
    if found >= 0:
        return len(text[:found].rstrip()), True
    begin = text.find(mark[0], max(0, len(text) - len(mark) + 1))
    while begin >= 0 and not mark.startswith(text[begin:]):
        begin = text.find(mark[0], begin + 1)
    return len((text if begin < 0 else text[:begin]).rstrip()), False


def calls_in(parser: ToolParser, single: bool) -> Calls:
    return Calls(parser.mark, parser.opener, parser.parse, single)


def required_calls() -> Calls:
    return Calls("", "", _listed)


class _Required(msgspec.Struct):
    name: str
    arguments: msgspec.Raw


def _listed(text: str) -> Parsed:
    """A JSON list of name and arguments; none if it has been cut off."""
    try:
        calls = msgspec.json.decode(text, type=list[_Required])
    except (msgspec.DecodeError, RecursionError):
        return text, []
    return "", [{"function": {"name": call.name, "arguments": bytes(call.arguments).decode()}} for call in calls]


def call_id() -> str:
    """Nine letters and digits: what every chat template takes back (Mistral's takes nothing else)."""
    return secrets.token_hex(5)[:9]


@dataclass(slots=True)
class Call:
    """A call of a function, as far as it is there."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class Message:
    """The parts of one answer, joined. reasoning and content: None where there is none."""

    reasoning: str | None = None
    content: str | None = None
    calls: list[Call] = field(default_factory=list[Call])

    @classmethod
    def read(cls, reader: Reader, text: str) -> Message:
        message = cls()
        for part in [*reader.push(text), *reader.end()]:
            message.add(part)
        return message

    def add(self, part: Part) -> None:
        if part.kind == "content":
            self.content = (self.content or "") + part.text
        elif part.kind == "reasoning_content":
            self.reasoning = (self.reasoning or "") + part.text
        elif part.name:
            self.calls.append(Call(call_id(), part.name, part.text))
        else:
            self.calls[-1].arguments += part.text
