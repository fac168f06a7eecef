"""/v1/responses, as far as it goes without a store: text and function calls, whole and as events."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, count
from uuid import uuid4

from headway.engine.port import Pause
from headway.errors import RequestError
from headway.messages import RequestOutput
from headway.server.answers import Record, Usage, encode, usage_of
from headway.server.chat import Turn, prepare, thinking_tokens
from headway.server.endpoint import Answer, Write
from headway.server.errors import named
from headway.server.generation import check_end, run, whole
from headway.server.protocol import ChatRequest
from headway.server.reading import Kind, Part, call_id
from headway.server.responses_input import ResponsesRequest, chat_request
from headway.server.state import State


async def responses(state: State, request: ResponsesRequest) -> Answer:
    if request.previous_response_id is not None:
        raise RequestError("previous_response_id", request.previous_response_id, "nothing is stored here")
    chat = chat_request(request)
    with named(_NAMES):
        turn = await prepare(state, chat)
        if request.stream:
            return partial(_stream, state, turn, request, chat)
        (result,) = await whole(state, [turn.prompt], turn.params, chat)
    (sample,) = result.outputs
    reader, output = turn.reader(), Output()
    events = [output.add(part) for part in [*reader.push(sample.text), *reader.end()]]
    deque(chain(*events, output.end(sample.finish_reason)), maxlen=0)
    usage = usage_of([result], _reasoning_tokens(state, output, sample.token_ids))
    return encode(Head(state, request).record(sample.finish_reason, output.items, usage))


def _reasoning_tokens(state: State, output: Output, token_ids: list[int]) -> int:
    reasoned = any(item["type"] == "reasoning" for item in output.items)
    return thinking_tokens(state, token_ids) if reasoned else 0


class Head:
    """What all events of one answer have in common."""

    def __init__(self, state: State, request: ResponsesRequest) -> None:
        self._common: Record = {
            "id": f"resp_{uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": state.names[0],
            "error": None,
            **{name: getattr(request, name) for name in _REPEATED},
        }

    def record(
        self, reason: str | None = None, items: list[Record] | None = None, usage: Usage | None = None
    ) -> Record:
        """reason: why it has ended; None while it goes on."""
        cut = reason == "length"
        return {
            **self._common,
            "status": "in_progress" if reason is None else "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": items or [],
            "usage": usage and _usage(usage),
        }


_REPEATED = (
    *("instructions", "max_output_tokens", "temperature", "top_p", "text", "tools", "tool_choice"),
    *("parallel_tool_calls", "truncation", "store", "previous_response_id", "user", "metadata"),
)


def _usage(usage: Usage) -> Record:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }


class Output:
    """Items of an answer, and the events that tell of them. Each event is good until the next one is asked for."""

    def __init__(self) -> None:
        self.items: list[Record] = []
        self._kind: Kind | None = None
        self._texts: list[str] = []

    def add(self, part: Part) -> Iterator[Record]:
        if part.kind != self._kind or part.name:
            yield from self._close("completed")
            yield from self._open(part)
        if part.text:
            self._texts.append(part.text)
            yield {"type": f"{_EVENTS[part.kind]}.delta", **self._place(), "delta": part.text, **_logprobs(part.kind)}

    def end(self, reason: str | None) -> Iterator[Record]:
        """There is a text at least, be it empty."""
        if not self.items:
            yield from self.add(Part("content", ""))
        yield from self._close("incomplete" if reason == "length" else "completed")

    def _open(self, part: Part) -> Iterator[Record]:
        self._kind, self._texts = part.kind, []
        prefix, item = _ITEMS[part.kind]
        item = {"id": f"{prefix}_{uuid4().hex}", **item, "status": "in_progress"}
        if part.kind == "call":
            item |= {"call_id": call_id(), "name": part.name}
        self.items.append(item)
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": item}
        if part.kind != "call":
            yield {"type": "response.content_part.added", **self._place(), "part": _content(part.kind, "")}

    def _close(self, status: str) -> Iterator[Record]:
        if self._kind is None:
            return
        item, text, done = self.items[-1], "".join(self._texts), f"{_EVENTS[self._kind]}.done"
        if self._kind == "call":
            item["arguments"] = text
            yield {"type": done, **self._place(), "name": item["name"], "arguments": text}
        else:
            content = _content(self._kind, text)
            item["content"] = [content]
            yield {"type": done, **self._place(), "text": text, **_logprobs(self._kind)}
            yield {"type": "response.content_part.done", **self._place(), "part": content}
        item["status"] = status
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}
        self._kind = None

    def _place(self) -> Record:
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return place if self._kind == "call" else {**place, "content_index": 0}


_EVENTS: dict[Kind, str] = {
    "content": "response.output_text",
    "reasoning_content": "response.reasoning_text",
    "call": "response.function_call_arguments",
}
_ITEMS: dict[Kind, tuple[str, Record]] = {
    "content": ("msg", {"type": "message", "role": "assistant", "content": []}),
    "reasoning_content": ("rs", {"type": "reasoning", "summary": [], "content": []}),
    "call": ("fc", {"type": "function_call", "arguments": ""}),
}


def _content(kind: Kind, text: str) -> Record:
    if kind == "content":
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "reasoning_text", "text": text}


def _logprobs(kind: Kind) -> Record:
    return {"logprobs": []} if kind == "content" else {}


async def _stream(state: State, turn: Turn, request: ResponsesRequest, chat: ChatRequest, write: Write) -> bytes:
    reader, output, head, numbers = turn.reader(), Output(), Head(state, request), count()
    usage, token_ids, reasons = Usage(), list[int](), list[str]()

    def told(events: Iterable[Record]) -> bytes:
        return b"".join([_event({**event, "sequence_number": next(numbers)}) for event in events])

    def take(result: RequestOutput) -> Pause | None:
        (sample,) = result.outputs
        check_end(sample)
        news: list[bytes] = []
        if not usage.prompt:
            usage.add_prompt(result)
            kinds, begun = ("response.created", "response.in_progress"), head.record()
            news.append(told({"type": kind, "response": begun} for kind in kinds))
        token_ids.extend(sample.token_ids)
        parts = reader.push(sample.text)
        if sample.finish_reason is not None:
            reasons.append(sample.finish_reason)
            parts += reader.end()
        return write(b"".join([*news, *(told(output.add(part)) for part in parts)]))

    with named(_NAMES):
        await run(state, [turn.prompt], turn.params, chat, take)
    (reason,) = reasons
    last = told(output.end(reason))
    usage.completion, usage.reasoning = len(token_ids), _reasoning_tokens(state, output, token_ids)
    record = head.record(reason, output.items, usage)
    return last + told([{"type": f"response.{record['status']}", "response": record}])


def _event(record: Record) -> bytes:
    return f"event: {record['type']}\ndata: ".encode() + encode(record) + b"\n\n"


_NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}
