"""JSONL rows: read one at a time, checked, and turned into requests. A bad row is a value, not an exception."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_type_hints

import msgspec

from headway.config.args import suggestion
from headway.errors import RequestError
from headway.messages import SamplingParams, StructuredOutput

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PARAMS_TYPES = get_type_hints(SamplingParams)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """line: counts from 1. fields: the whole row, passed on to the output. Exactly one of prompt, messages is set."""

    line: int
    fields: dict[str, Any]
    params: SamplingParams
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that cannot be answered, and why. fields: what could be read of it."""

    line: int
    error: str
    fields: dict[str, Any] = field(default_factory=dict)


def read_rows(path: Path, defaults: dict[str, Any]) -> Iterator[Row | BadRow]:
    """The rows of a file in order, holding one at a time; blank lines are skipped.

    defaults: sampling parameters of rows that do not give them.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if text.strip():
                yield parse_row(number, text, defaults)


def parse_row(number: int, text: bytes, defaults: dict[str, Any]) -> Row | BadRow:
    try:
        fields = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return BadRow(line=number, error=f"line {number}: not JSON: {error}")
    if not isinstance(fields, dict):
        return BadRow(line=number, error=f"line {number}: must be a JSON object, not {type(fields).__name__}")
    known = cast("dict[str, Any]", fields)
    try:
        params = sampling_params(known.get("sampling_params"), defaults)
        prompt, messages = _question(known)
    except RequestError as error:
        return BadRow(line=number, error=f"line {number}: {error}", fields=known)
    return Row(line=number, fields=known, params=params, prompt=prompt, messages=messages)


def _question(fields: dict[str, Any]) -> tuple[str | list[int] | None, list[dict[str, Any]] | None]:
    given = [name for name in ("prompt", "messages") if fields.get(name) is not None]
    if len(given) != 1:
        raise RequestError("row", sorted(fields), "must have exactly one of prompt, messages")
    if given == ["prompt"]:
        return _convert("prompt", fields["prompt"], str | list[int]), None
    messages = _convert("messages", fields["messages"], list[dict[str, Any]])
    if not messages or any("role" not in m or "content" not in m for m in messages):
        raise RequestError("messages", messages, "must be a list of objects with role and content")
    return None, messages


def sampling_params(given: Any, defaults: dict[str, Any]) -> SamplingParams:
    """Raises RequestError naming a parameter that is unknown, of the wrong type or out of range."""
    if not isinstance(given or {}, dict):
        raise RequestError("sampling_params", given, "must be an object")
    values = {**defaults, **cast("dict[str, Any]", given or {})}
    for name, value in values.items():
        if name not in PARAMS_TYPES:
            raise RequestError(f"sampling_params.{name}", value, "unknown" + suggestion(name, list(PARAMS_TYPES)))
        if name != "structured":
            values[name] = _convert(f"sampling_params.{name}", value, PARAMS_TYPES[name])
        elif isinstance(value, dict):
            values[name] = _structured(cast("dict[str, Any]", value))
        elif value is not None:
            raise RequestError("sampling_params.structured", value, "must be an object")
    return SamplingParams(**values)


def _structured(given: dict[str, Any]) -> StructuredOutput:
    accepted = get_type_hints(StructuredOutput)
    for name, value in given.items():
        if name not in accepted:
            raise RequestError(f"structured.{name}", value, "must be one of json, regex, choice, grammar")
        _convert(f"structured.{name}", value, accepted[name])
    return StructuredOutput(**given)


def _convert(name: str, value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise RequestError(name, value, str(error)[:1].lower() + str(error)[1:]) from None


def count_lines(path: Path) -> int | None:
    """Lines of a file; None for a pipe, which can be read only once."""
    if not path.is_file():
        return None
    with path.open("rb") as data:
        count, last = 0, b"\n"
        while chunk := data.read(1 << 20):
            count, last = count + chunk.count(b"\n"), chunk[-1:]
    return count + (last != b"\n")
