"""What clients get of generated text: whole answers, and the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import msgspec

from headway.messages import Completion, Logprob, RequestOutput
from headway.server.protocol import StreamOptions
from headway.server.reading import Call, Message

DONE = b"data: [DONE]\n\n"
TEXT = "\0"
"""Where a chunk's text goes."""

encode = msgspec.json.encode
Record = dict[str, Any]
Known = Sequence[dict[int, Logprob] | None]
"""Candidates at each token by id; None where nothing precedes it."""


@dataclass(slots=True)
class Usage:
    """prompt: tokens of all prompts. cached: those of them that the prefix cache had. reasoning: of the completion."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0

    def add_prompt(self, output: RequestOutput) -> None:
        self.prompt += len(output.prompt_token_ids)
        self.cached += output.num_cached_tokens

    def record(self) -> Record:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }


def usage_of(outputs: Iterable[RequestOutput], reasoning: int = 0) -> Usage:
    usage = Usage(reasoning=reasoning)
    for output in outputs:
        usage.add_prompt(output)
        usage.completion += sum(len(one.token_ids) for one in output.outputs)
    return usage


def head(prefix: str, object: str, model: str) -> Record:
    """What all parts of an answer have in common. prefix: of its id. object: what a whole answer is called."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": object, "created": int(time.time()), "model": model}


class Chunks:
    """The events of one stream. continuous: each has the usage, so that none is like another."""

    def __init__(self, record: Record, options: StreamOptions | None, usage: Usage) -> None:
        options = options or StreamOptions()
        self._record, self._usage = record, usage
        self._include = options.include_usage
        self.continuous = options.include_usage and options.continuous_usage_stats

    def event(self, choice: Record) -> bytes:
        return self._event([choice], self._usage.record() if self.continuous else None)

    def around(self, choice: Record) -> tuple[bytes, bytes]:
        """The event in two pieces, between which TEXT as JSON belongs."""
        before, after = self.event(choice).split(encode(TEXT))
        return before, after

    def end(self) -> bytes:
        return self._event([], self._usage.record()) + DONE if self._include else DONE

    def _event(self, choices: list[Record], usage: Record | None) -> bytes:
        more = {"usage": usage} if self._include else {}
        return b"data: " + encode({**self._record, "choices": choices, **more}) + b"\n\n"


def chat_choice(sample: Completion, message: Message, top: int) -> Record:
    """top: as chat_logprobs."""
    return {
        "index": sample.index,
        "message": message_record(message),
        "logprobs": chat_logprobs(sample, top),
        "finish_reason": finish_reason(sample, bool(message.calls)),
        "stop_reason": sample.stop_reason,
    }


def message_record(message: Message) -> Record:
    """Content is null only beside calls."""
    record: Record = {"role": "assistant", "content": message.content or (None if message.calls else "")}
    if message.reasoning is not None:
        record["reasoning_content"] = message.reasoning
    if message.calls:
        record["tool_calls"] = [call_record(call) for call in message.calls]
    return record


def call_record(call: Call) -> Record:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def finish_reason(sample: Completion, called: bool) -> str | None:
    return "tool_calls" if called and sample.finish_reason == "stop" else sample.finish_reason


def text_choice(sample: Completion, logprobs: Record | None) -> Record:
    return {
        "index": sample.index,
        "text": sample.text,
        "logprobs": logprobs,
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
    }


def chat_logprobs(sample: Completion, top: int) -> Record | None:
    """top: how many of the most likely tokens are told of, whether the sampled one is among them or not."""
    if sample.logprobs is None:
        return None
    content: list[Record] = []
    for token, known in zip(sample.token_ids, sample.logprobs):
        ranked = sorted(known.values(), key=lambda one: one.rank)[:top]
        content.append({**_candidate(known[token]), "top_logprobs": [_candidate(one) for one in ranked]})
    return {"content": content}


def text_logprobs(token_ids: Sequence[int], known: Known, offset: int = 0, first: str = "") -> Record:
    """offset: of the first token in the text, in characters. first: the text of a token of which nothing is known."""
    chosen = [None if row is None else row[token] for token, row in zip(token_ids, known)]
    tokens = [one.decoded_token if one else first for one in chosen]
    return {
        "tokens": tokens,
        "token_logprobs": [one and one.logprob for one in chosen],
        "top_logprobs": [row and {one.decoded_token: one.logprob for one in row.values()} for row in known],
        "text_offset": list(accumulate(map(len, tokens), initial=offset))[:-1],
    }


def _candidate(one: Logprob) -> Record:
    """bytes: null where the token is a part of a character."""
    text = one.decoded_token
    return {"token": text, "logprob": one.logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
