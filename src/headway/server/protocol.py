"""What clients send. Every field that is accepted is honoured; one that is not known is an error that names it.

Names are OpenAI's, and vLLM's for what OpenAI does not have.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any, Literal, TypeVar

import msgspec

from headway.messages import SamplingParams, StructuredOutput
from headway.server.errors import ApiError

T = TypeVar("T")

Messages = list[dict[str, Any]]
TokenIds = list[int]


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """include_usage: a last chunk with the usage. continuous_usage_stats: it is in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Sampling(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What every request that generates may say; what it does not say is the model's default.

    user, metadata, store, service_tier, safety_identifier, prompt_cache_key: labels; nothing depends on them.
    """

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | str | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: dict[str, Any] | None = None
    priority: int = 0
    cache_salt: str = ""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def params(self, defaults: SamplingParams, **more: Any) -> SamplingParams:
        """Raises RequestError. more: fields that requests of one kind say in their own way."""
        given: dict[str, Any] = {name: v for name in _SAMPLING if (v := getattr(self, name)) is not None}
        if self.logit_bias is not None:
            given["logit_bias"] = {_token_id(key): bias for key, bias in self.logit_bias.items()}
        if self.structured_outputs is not None:
            given["structured"] = _convert(self.structured_outputs, StructuredOutput, "structured_outputs")
        given |= {name: value for name, value in more.items() if value is not None}
        return msgspec.structs.replace(defaults, **given)


_SAMPLING = [
    name for name in SamplingParams.__struct_fields__ if name in Sampling.__struct_fields__ and name != "logit_bias"
]


class JsonSchema(msgspec.Struct, kw_only=True):
    """name, description and strict: labels; the schema always holds."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """json_schema: with type "json_schema"."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def structured(self) -> StructuredOutput | None:
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutput(json={})
        if self.json_schema is None:
            raise ApiError(HTTPStatus.BAD_REQUEST, "response_format.json_schema: is needed", param="response_format")
        return StructuredOutput(json=self.json_schema.schema)


class ChatRequest(Sampling, kw_only=True):
    """/v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class CompletionRequest(Sampling, kw_only=True):
    """/v1/completions. prompt: a text, token ids, or a list of either."""

    prompt: str | list[int | str | TokenIds]
    echo: bool = False
    logprobs: int | None = None
    response_format: ResponseFormat | None = None


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """Raises ApiError, which names the field."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        message = str(error)
        raise ApiError(HTTPStatus.BAD_REQUEST, message, param=_field(message)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {error}") from None


_UNKNOWN = re.compile(r"unknown field `(.*?)`")
_MISSING = re.compile(r"missing required field `(.*?)`")
_PATH = re.compile(r" - at `\$\.?(.*)`$")


def _field(message: str) -> str | None:
    """Of msgspec's message."""
    path = _PATH.search(message)
    name = _UNKNOWN.search(message) or _MISSING.search(message)
    return ".".join(found.group(1) for found in (path, name) if found and found.group(1)) or None


def _token_id(key: str) -> int:
    try:
        return int(key)
    except ValueError:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"logit_bias[{key}]: must be a token id", param="logit_bias") from None


def _convert(value: dict[str, Any], kind: type[T], field: str) -> T:
    known = getattr(kind, "__struct_fields__")  # noqa: B009
    if unknown := [name for name in value if name not in known]:
        message = f"{field}.{unknown[0]}: must be one of {', '.join(known)}"
        raise ApiError(HTTPStatus.BAD_REQUEST, message, param=f"{field}.{unknown[0]}")
    return kind(**value)
