"""What a caller may ask of one request, validated where it is built."""

from __future__ import annotations

import math
from typing import Any, Literal, cast, get_args

import msgspec

from headway.errors import RequestError

PoolingTask = Literal["embed", "classify", "score"]


class StructuredOutput(msgspec.Struct, array_like=True, tag=True, kw_only=True):
    """A constraint on the generated text; exactly one field is set.

    json: a JSON schema (dict or its text); ``{}`` means any JSON object.
    regex: a regular expression the whole text matches.
    choice: the text is one of these.
    grammar: a context-free grammar in Lark's notation.
    """

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [f for f in self.__struct_fields__ if getattr(self, f) is not None]
        if len(given) != 1:
            raise RequestError("structured", given, "give exactly one of json, regex, choice, grammar")
        for field in ("regex", "grammar"):
            if not isinstance(getattr(self, field) or "", str):
                raise RequestError(f"structured.{field}", getattr(self, field), "must be a string")
        _check_list(self, "choice", str, "structured.choice")


class SamplingParams(msgspec.Struct, array_like=True, tag=True, kw_only=True):
    """How to generate. Raises RequestError naming the field when a value is out of range.

    n: samples per prompt. temperature: 0 is greedy. top_k: 0 or -1 keeps all. min_p: relative to the most likely
    token. max_tokens: None means up to max_model_len. seed: same seed, same tokens, whatever else is in the batch;
    None draws one per request. logprobs: how many of the most likely tokens to report besides the sampled one.
    prompt_logprobs: the same for each prompt token. stop: strings that end the text (and are cut from it unless
    include_stop_str_in_output). bad_words: strings whose tokens never complete. logit_bias: token id to added logit.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    bad_words: list[str] | None = None
    logit_bias: dict[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured: StructuredOutput | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _check_range(self, "n", 1, 1024)
        _check_range(self, "temperature", 0.0, 100.0)
        _check_range(self, "top_p", 0.0, 1.0, open_low=True)
        _check_range(self, "top_k", -1, 1 << 31)
        _check_range(self, "min_p", 0.0, 1.0)
        _check_range(self, "presence_penalty", -2.0, 2.0)
        _check_range(self, "frequency_penalty", -2.0, 2.0)
        _check_range(self, "repetition_penalty", 0.0, 100.0, open_low=True)
        _check_range(self, "max_tokens", 1, 1 << 31)
        _check_range(self, "min_tokens", 0, 1 << 31)
        _check_range(self, "logprobs", 0, 1 << 20)
        _check_range(self, "prompt_logprobs", 0, 1 << 20)
        _check_range(self, "seed", -(1 << 63), (1 << 64) - 1)
        _check_list(self, "stop_token_ids", int)
        _check_list(self, "bad_words", str)
        if type(self.stop) is str:
            check_text(self.stop, "stop")
        else:
            _check_list(self, "stop", str)
        _check_flags(self, "ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError("min_tokens", self.min_tokens, f"must be at most max_tokens={self.max_tokens}")
        if self.stop is not None and any(not s for s in self.stop_strings):
            raise RequestError("stop", self.stop, "an empty stop string would stop at once")
        biases = cast("dict[Any, Any]", self.logit_bias or {})
        for token, bias in biases.items():
            if type(token) is not int or not isinstance(bias, (int, float)) or not -100.0 <= bias <= 100.0:
                raise RequestError(f"logit_bias[{token}]", bias, "must be a token id and a number from -100 to 100")
        if self.logit_bias is not None:
            self.logit_bias = {token: float(bias) for token, bias in biases.items()}

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5


class PoolingParams(msgspec.Struct, array_like=True, tag=True, kw_only=True):
    """What to compute from one prompt. normalize and activation: None takes what the model declares.

    dimensions: keep that many leading dimensions of an embedding (Matryoshka), before normalisation.
    """

    task: PoolingTask = "embed"
    normalize: bool | None = None
    activation: bool | None = None
    dimensions: int | None = None

    def __post_init__(self) -> None:
        if self.task not in get_args(PoolingTask):
            raise RequestError("task", self.task, f"must be one of {', '.join(get_args(PoolingTask))}")
        _check_range(self, "dimensions", 1, 1 << 20)
        _check_flags(self, *(flag for flag in ("normalize", "activation") if getattr(self, flag) is not None))


def _check_flags(params: msgspec.Struct, *fields: str) -> None:
    for field in fields:
        if type(value := getattr(params, field)) is not bool:
            raise RequestError(field, value, "must be true or false")


def _check_list(params: msgspec.Struct, field: str, item: type, name: str = "") -> None:
    value = getattr(params, field)
    if value is not None and not (isinstance(value, (list, tuple)) and all(type(x) is item for x in value)):
        accepted = f"must be a list of {'integers' if item is int else 'strings'}"
        raise RequestError(name or field, value, accepted)
    for text in (value or ()) if item is str else ():
        check_text(text, name or field)


def check_text(text: str, field: str = "prompt") -> None:
    """RequestError if it cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(field, text, f"must be valid Unicode; {error.reason} at {error.start}") from None


def _check_range(params: msgspec.Struct, field: str, low: float, high: float, *, open_low: bool = False) -> None:
    value, kind = getattr(params, field), type(low)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        raise RequestError(field, value, f"must be {'an integer' if kind is int else 'a number'}")
    if type(value) not in (int, float):  # such as numpy's, which no message holds
        setattr(params, field, value := kind(value))
    inside = (low < value if open_low else low <= value) and value <= high
    if not inside or math.isnan(value):
        raise RequestError(field, value, f"must be {'above' if open_low else 'at least'} {low} and at most {high}")
