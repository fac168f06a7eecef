"""/v1/chat/completions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from headway.engine.port import Pause
from headway.llm.prompts import PromptInput
from headway.messages import Completion, RequestOutput, SamplingParams
from headway.server.answers import (
    TEXT,
    Chunks,
    Record,
    Usage,
    call_record,
    chat_choice,
    chat_logprobs,
    encode,
    finish_reason,
    head,
    usage_of,
)
from headway.server.endpoint import Answer, Write
from headway.server.generation import chat_prompt, check, check_end, run, sampling, whole
from headway.server.protocol import ChatRequest
from headway.server.reading import ANSWER, THINK, Call, Content, Kind, Message, Part, Reader, Thinking, call_id
from headway.server.state import State
from headway.server.tools import tool_use


@dataclass(frozen=True, slots=True)
class Turn:
    """A conversation's next answer. reader: of each sample."""

    prompt: PromptInput
    params: SamplingParams
    reader: Callable[[], Reader]


async def prepare(state: State, request: ChatRequest) -> Turn:
    """ApiError or RequestError for what cannot be honoured."""
    check(state, request)
    tools = tool_use(request, state.tools)
    more = {} if tools.schema is None else {"structured": {"json": tools.schema}}
    params = sampling(request, state.chat_defaults, **more)
    prompt = await chat_prompt(state, request, tools.shown)
    if not state.thinks:
        return Turn(prompt, params, tools.reader)
    # A constraint begins with the text and knows of no reasoning.
    inside = params.structured is None and (prompt.text or "").rstrip().endswith(THINK)
    return Turn(prompt, params, lambda: Thinking(inside, tools.reader()))


async def chat(state: State, request: ChatRequest) -> Answer:
    turn = await prepare(state, request)
    if request.stream:
        return partial(_stream, state, turn, request)
    (output,) = await whole(state, [turn.prompt], turn.params, request)
    messages = [Message.read(turn.reader(), sample.text) for sample in output.outputs]
    top = request.top_logprobs or 0
    told = zip(output.outputs, messages)
    reasoning = sum(thinking_tokens(state, sample.token_ids) for sample, message in told if message.reasoning)
    record = {
        **head("chatcmpl", "chat.completion", state.names[0]),
        "choices": [chat_choice(sample, message, top) for sample, message in zip(output.outputs, messages)],
        "usage": usage_of([output], reasoning).record(),
    }
    if request.prompt_logprobs is not None:
        record["prompt_logprobs"] = output.prompt_logprobs
    return encode(record)


def thinking_tokens(state: State, token_ids: list[int]) -> int:
    """Of the tokens of an answer that has reasoning, those up to its end, with the marks; all if it has no end."""
    pieces = [state.llm.tokenizer.token_to_piece(token) for token in token_ids]
    at = "".join(pieces).find(ANSWER)
    return len(pieces) if at < 0 else 1 + bisect_left(list(accumulate(map(len, pieces))), at + len(ANSWER))


async def _stream(state: State, turn: Turn, request: ChatRequest, write: Write) -> bytes:
    usage = Usage()
    chunks = Chunks(head("chatcmpl", "chat.completion.chunk", state.names[0]), request.stream_options, usage)
    choices: dict[int, _Choice] = {}

    def take(output: RequestOutput) -> Pause | None:
        if not choices:
            usage.add_prompt(output)
        (sample,) = output.outputs
        usage.completion += len(sample.token_ids)
        choice = choices.get(sample.index)
        if choice is not None:
            return write(choice.feed(sample))
        choice = choices[sample.index] = _Choice(sample.index, turn, chunks, request.top_logprobs or 0)
        return write(choice.begin() + choice.feed(sample))

    await run(state, [turn.prompt], turn.params, request, take)
    usage.reasoning = sum(thinking_tokens(state, one.token_ids) for one in choices.values() if one.reasoned)
    return chunks.end()


class _Choice:
    """One sample on its way. token_ids: of what its reader has read."""

    def __init__(self, index: int, turn: Turn, chunks: Chunks, top: int) -> None:
        self._index, self._chunks, self._top = index, chunks, top
        self._reader = turn.reader()
        self.token_ids: list[int] = []
        self.reasoned, self._calls = False, 0
        self._is_bare = turn.params.logprobs is None and not chunks.continuous
        self._is_plain = self._is_bare and turn.reader is Content
        self._around: dict[str, tuple[bytes, bytes]] = {}

    def begin(self) -> bytes:
        return self._chunks.event(self._choice({"role": "assistant", "content": ""}))

    def feed(self, sample: Completion) -> bytes:
        """Empty if there is nothing to tell yet."""
        if self._is_plain and sample.finish_reason is None:  # as most chunks are
            return self._text("content", sample.text) if sample.text else b""
        check_end(sample)
        parts = self._parts(sample)
        if self._is_bare:
            events = [self._event(part) for part in parts]
        else:
            choices = [self._choice(self._delta(part)) for part in parts] or [self._choice({})]
            choices[0]["logprobs"] = chat_logprobs(sample, self._top)
            events = [self._chunks.event(choice) for choice in choices]
        if sample.finish_reason is not None:
            reason = finish_reason(sample, bool(self._calls))
            last = {**self._choice({}), "finish_reason": reason, "stop_reason": sample.stop_reason}
            events.append(self._chunks.event(last))
        return b"".join(events)

    def _parts(self, sample: Completion) -> list[Part]:
        self.token_ids += sample.token_ids
        parts = self._reader.push(sample.text)
        if sample.finish_reason is not None:
            parts += self._reader.end()
        self.reasoned = self.reasoned or any(part.kind == "reasoning_content" for part in parts)
        return parts

    def _event(self, part: Part) -> bytes:
        if part.kind == "call":
            return self._chunks.event(self._choice(self._delta(part)))
        return self._text(part.kind, part.text)

    def _text(self, kind: Kind, text: str) -> bytes:
        """Between bytes that are there already."""
        if kind not in self._around:
            self._around[kind] = self._chunks.around(self._choice({kind: TEXT}))
        before, after = self._around[kind]
        return before + encode(text) + after

    def _delta(self, part: Part) -> Record:
        if part.kind != "call":
            return {part.kind: part.text}
        call: Record = {"function": {"arguments": part.text}}
        if part.name:
            self._calls += 1
            call = call_record(Call(call_id(), part.name, part.text))
        return {"tool_calls": [{"index": self._calls - 1, **call}]}

    def _choice(self, delta: Record) -> Record:
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}
