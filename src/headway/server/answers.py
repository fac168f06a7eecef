"""What clients get of generated text: whole answers, and the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import msgspec

from headway.messages import Completion, Logprob, RequestOutput

DONE = b"data: [DONE]\n\n"

encode = msgspec.json.encode
Record = dict[str, Any]


@dataclass(slots=True)
class Usage:
    """prompt: tokens of all prompts. cached: those of them that the prefix cache had."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def record(self) -> Record:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


def usage_of(outputs: list[RequestOutput]) -> Usage:
    return Usage(
        sum(len(output.prompt_token_ids) for output in outputs),
        sum(len(one.token_ids) for output in outputs for one in output.outputs),
        sum(output.num_cached_tokens for output in outputs),
    )


@dataclass(slots=True)
class Head:
    """What all parts of an answer have in common. prefix: of its id. object: what a whole answer is called."""

    prefix: str
    object: str
    model: str
    id: str = field(init=False)
    created: int = field(init=False)

    def __post_init__(self) -> None:
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def record(self, object_: str | None = None) -> Record:
        return {"id": self.id, "object": object_ or self.object, "created": self.created, "model": self.model}


def chosen(sample: Completion) -> list[tuple[Logprob, list[Logprob]]]:
    """Each token of a sample, and the candidates that are known; only if logprobs were asked for."""
    known = sample.logprobs or []
    return [(candidates[token], list(candidates.values())) for token, candidates in zip(sample.token_ids, known)]


def chat_logprobs(sample: Completion) -> Record | None:
    if sample.logprobs is None:
        return None
    return {
        "content": [
            {**_candidate(token), "top_logprobs": [_candidate(c) for c in all_[1:]]} for token, all_ in chosen(sample)
        ]
    }


def text_logprobs(sample: Completion, offset: int = 0) -> Record | None:
    """offset: of the first token in the text, in characters."""
    if sample.logprobs is None:
        return None
    tokens = chosen(sample)
    offsets: list[int] = []
    for token, _ in tokens:
        offsets.append(offset)
        offset += len(token.decoded_token)
    return {
        "tokens": [token.decoded_token for token, _ in tokens],
        "token_logprobs": [token.logprob for token, _ in tokens],
        "top_logprobs": [{one.decoded_token: one.logprob for one in all_} for _, all_ in tokens],
        "text_offset": offsets,
    }


def _candidate(one: Logprob) -> Record:
    return {"token": one.decoded_token, "logprob": one.logprob, "bytes": list(one.decoded_token.encode())}
