"""What comes back: from the engine to the front end (EngineOutput), from the front end to the user (the rest)."""

from __future__ import annotations

from typing import Literal

import msgspec

from headway.messages.step import RowLogprobs

FinishReason = Literal["stop", "length", "abort", "error"]


class EngineOutput(msgspec.Struct, array_like=True, tag=True, kw_only=True):
    """New tokens of one request since its last EngineOutput; the last one has finish_reason.

    stop_reason: the stop token id that ended it, if it was one the caller named. num_cached_tokens: prompt tokens
    found in the prefix cache. pooled: float32 bytes. error: set with finish_reason "error".
    """

    request_id: str
    token_ids: list[int] = []
    logprobs: list[RowLogprobs] | None = None
    prompt_logprobs: list[RowLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    pooled: bytes | None = None
    error: str | None = None


class Logprob(msgspec.Struct):
    """One candidate token at one position. rank counts from 1."""

    logprob: float
    rank: int
    decoded_token: str


class Completion(msgspec.Struct, kw_only=True):
    """One of a request's n samples. In a streamed delta, text and token_ids are what is new.

    stop_reason: the stop string or the named stop token id that ended it. error: why, with finish_reason "error".
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    logprobs: list[dict[int, Logprob]] | None = None


class RequestOutput(msgspec.Struct, kw_only=True):
    """A request's result, or one streamed delta of it. prompt_logprobs[0] is None: nothing precedes the first token."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion]
    finished: bool
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def usage(self) -> dict[str, int]:
        """Token counts under OpenAI's names, plus cached_tokens."""
        out = sum(len(o.token_ids) for o in self.outputs)
        prompt = len(self.prompt_token_ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": out,
            "total_tokens": prompt + out,
            "cached_tokens": self.num_cached_tokens,
        }


class PooledOutput(msgspec.Struct, kw_only=True):
    """An embedding, class probabilities, or a score (a list of one)."""

    request_id: str
    prompt_token_ids: list[int]
    data: list[float]
    num_cached_tokens: int = 0
