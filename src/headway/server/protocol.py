"""What clients send. Every field that is accepted is honoured; one that is not known is an error that names it.

Names are OpenAI's, and vLLM's for what OpenAI does not have.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec

from headway.errors import RequestError
from headway.llm.prompts import PromptInput
from headway.messages import SamplingParams
from headway.server.errors import ApiError

T = TypeVar("T")

MAX_CONTAINERS = 200_000
"""Of a body: decoding 700,000 of them held the event loop for 0.5 s, 2.8 millions (8 MiB) for 7 s."""
MAX_MESSAGE = 500

Messages = list[dict[str, Any]]
TokenIds = list[int]
Word = Annotated[str, msgspec.Meta(max_length=256)]
Count = Annotated[int, msgspec.Meta(ge=0, le=100)]
"""Of candidates at a token: each costs some hundred bytes, at each of what may be millions of tokens."""
Input = str | list[int | str | TokenIds]
"""A text, token ids, or a list of either."""


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """include_usage: a last chunk with the usage. continuous_usage_stats: it is in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """As StructuredOutput; one of them."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class JsonSchema(msgspec.Struct, kw_only=True):
    """name, description and strict: labels; the schema always holds."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """json_schema: with type "json_schema"."""

    type: Annotated[str, msgspec.Meta(extra_json_schema={"enum": ["text", "json_object", "json_schema"]})]
    json_schema: JsonSchema | None = None

    def structured(self) -> dict[str, Any] | None:
        if self.type not in ("text", "json_object", "json_schema"):
            raise RequestError("response_format.type", self.type, "must be text, json_object or json_schema")
        if (self.json_schema is None) is (self.type == "json_schema"):
            raise RequestError("response_format.json_schema", self.json_schema, "belongs to type json_schema")
        if self.json_schema is not None:
            return {"json": self.json_schema.schema}
        return None if self.type == "text" else {"json": {}}


class Sampling(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What every request that generates may say; what it does not say is the model's default.

    user, metadata, service_tier, safety_identifier, prompt_cache_key: labels; nothing depends on them.
    """

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Annotated[list[str], msgspec.Meta(max_length=128)] | str | None = None
    logit_bias: Annotated[dict[str, float], msgspec.Meta(max_length=4096)] | None = None
    max_tokens: int | None = None
    response_format: ResponseFormat | None = None
    store: bool | None = False

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: Annotated[TokenIds, msgspec.Meta(max_length=4096)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    bad_words: Annotated[list[Word], msgspec.Meta(max_length=1024)] | None = None
    prompt_logprobs: Count | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: Annotated[int, msgspec.Meta(ge=-(1 << 31), le=1 << 31)] = 0
    cache_salt: str | None = None

    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def given(self) -> dict[str, Any]:
        """What it says of SamplingParams, under the names there; ``structured`` as a dict. Raises RequestError."""
        given: dict[str, Any] = {name: v for name in _SAMPLING if (v := getattr(self, name)) is not None}
        if self.logit_bias is not None:
            try:
                given["logit_bias"] = {int(key): bias for key, bias in self.logit_bias.items()}
            except ValueError:
                raise RequestError("logit_bias", self.logit_bias, "its keys must be token ids") from None
        structured = self.response_format and self.response_format.structured()
        if self.structured_outputs is not None:
            if structured is not None:
                raise RequestError("structured_outputs", self.structured_outputs, "not beside response_format")
            structured = msgspec.to_builtins(self.structured_outputs)
        if structured is not None:
            given["structured"] = structured
        return given


_SAMPLING = [
    name for name in SamplingParams.__struct_fields__ if name in Sampling.__struct_fields__ and name != "logit_bias"
]


class ChatRequest(Sampling, kw_only=True):
    """/v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: Count | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def given(self) -> dict[str, Any]:
        given = Sampling.given(self)
        if self.max_completion_tokens is not None:
            given["max_tokens"] = self.max_completion_tokens
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        elif self.top_logprobs:
            raise RequestError("top_logprobs", self.top_logprobs, "needs logprobs=true")
        return given


class CompletionRequest(Sampling, kw_only=True):
    """/v1/completions. prompt: a text, token ids, or a list of either. max_tokens: may be 0 with echo."""

    prompt: Input
    echo: bool | None = False
    logprobs: Count | None = None
    best_of: Literal[1] | None = None

    def given(self) -> dict[str, Any]:
        given = Sampling.given(self)
        if self.logprobs is not None:
            given["logprobs"] = self.logprobs
            if self.echo:
                given["prompt_logprobs"] = self.logprobs
        return given


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """Raises ApiError, which names the field."""
    if body.count(b"[") + body.count(b"{") > MAX_CONTAINERS:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"the body has more than {MAX_CONTAINERS} of [ and {{")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        message = str(error)
        if len(message) > MAX_MESSAGE:  # with a name that the client has chosen
            message = f"{message[:MAX_MESSAGE]}…"
        raise ApiError(HTTPStatus.BAD_REQUEST, message, param=field_of(message)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {error}") from None


def converted(field: str, value: Any, kind: type[T]) -> T:
    """RequestError if value is none of that kind."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise RequestError(field, value, str(error)[:1].lower() + str(error)[1:]) from None


def prompts_of(field: str, given: Input, most: int) -> list[PromptInput]:
    """Raises RequestError, also for more of them than ``most``."""
    if isinstance(given, str):
        return [PromptInput(text=given)]
    if len(given) > most and not isinstance(given[0], int):
        raise RequestError(field, f"{len(given)} prompts", f"must be at most {most}")
    kinds = set(map(type, given))
    if not given or (int in kinds and len(kinds) > 1):
        raise RequestError(field, given, "must be a text, token ids, or a list of texts and lists of token ids")
    if int in kinds:
        return [PromptInput(token_ids=cast(TokenIds, given))]
    many = cast("list[str | TokenIds]", given)
    return [PromptInput(text=one) if isinstance(one, str) else PromptInput(token_ids=one) for one in many]


_UNKNOWN = re.compile(r"unknown field `(.*?)`")
_MISSING = re.compile(r"missing required field `(.*?)`")
_PATH = re.compile(r" - at `\$\.?(.*)`$")


def field_of(message: str) -> str | None:
    """The field that a message of msgspec names."""
    path = _PATH.search(message)
    name = _UNKNOWN.search(message) or _MISSING.search(message)
    return ".".join(found.group(1) for found in (path, name) if found and found.group(1)) or None
