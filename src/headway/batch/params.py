"""A row's sampling_params and pooling_params, checked."""

from __future__ import annotations

from typing import Any, TypeVar, cast, get_type_hints

import msgspec

from headway.config.args import suggestion
from headway.errors import RequestError
from headway.messages import PoolingParams, SamplingParams, StructuredOutput

P = TypeVar("P", SamplingParams, PoolingParams)

_REMEMBERED = 1024
_ALIASES = {"structured_outputs": "structured"}


class ParamsReader:
    """Builds the params of many rows, of which most have equal ones. defaults: what rows do not say."""

    def __init__(self, kind: type[P], defaults: dict[str, Any]) -> None:
        self._kind: type[Any] = kind
        self._defaults = defaults
        self._known: dict[bytes, Any] = {}

    def read(self, field: str, given: Any) -> Any:
        """RequestError names a parameter that is unknown, of the wrong type or out of range."""
        try:
            key = msgspec.msgpack.encode(given)
        except (TypeError, OverflowError):
            key = b""
        params = self._known.get(key)
        if params is None:
            params = _build(self._kind, field, given, self._defaults)
            if key and len(self._known) < _REMEMBERED:
                self._known[key] = params
        return params


def sampling_params(given: Any, defaults: dict[str, Any]) -> SamplingParams:
    return _build(SamplingParams, "sampling_params", given, defaults)


def _build(kind: type[P], field: str, given: Any, defaults: dict[str, Any]) -> P:
    if not isinstance(given or {}, dict):
        raise RequestError(field, given, "must be an object")
    types = get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in {**defaults, **cast("dict[str, Any]", given or {})}.items():
        name = _ALIASES.get(name, name)
        if name not in types:
            raise RequestError(f"{field}.{name}", value, "unknown" + suggestion(name, list(types)))
        values[name] = value
    for name, value in values.items():
        if name != "structured":
            values[name] = convert(f"{field}.{name}", value, types[name])
        elif isinstance(value, dict):
            values[name] = _structured(cast("dict[str, Any]", value))
        elif value is not None and not isinstance(value, StructuredOutput):
            raise RequestError(f"{field}.structured", value, "must be an object")
    return kind(**values)


def _structured(given: dict[str, Any]) -> StructuredOutput:
    accepted = get_type_hints(StructuredOutput)
    for name, value in given.items():
        if name not in accepted:
            raise RequestError(f"structured.{name}", value, "must be one of json, regex, choice, grammar")
        convert(f"structured.{name}", value, accepted[name])
    return StructuredOutput(**given)


def convert(name: str, value: Any, kind: Any) -> Any:
    """RequestError if value is not of that kind."""
    try:
        return msgspec.convert(value, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise RequestError(name, value, str(error)[:1].lower() + str(error)[1:]) from None
