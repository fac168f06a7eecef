"""/v1/chat/completions and /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from http import HTTPStatus
from typing import Any, cast

from headway.llm.prompts import PromptInput
from headway.messages import Completion, RequestOutput, SamplingParams
from headway.server.answers import DONE, Head, Record, Usage, chat_logprobs, encode, text_logprobs, usage_of
from headway.server.endpoint import Answer, Stream
from headway.server.errors import ApiError
from headway.server.protocol import ChatRequest, CompletionRequest, Sampling
from headway.server.state import State

Outputs = AsyncGenerator[RequestOutput, None]


async def chat(state: State, request: ChatRequest) -> Answer:
    state.check_model(request.model)
    params = request.params(
        state.chat_defaults,
        max_tokens=request.max_completion_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        structured=request.response_format and request.response_format.structured(),
    )
    prompt = state.llm.chat_prompt(
        request.messages,
        tools=request.tools,
        template_kwargs=request.chat_template_kwargs,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
    )
    head = Head("chatcmpl", "chat.completion", state.names[0])
    outputs = _run(state, prompt, params, request)
    if request.stream:
        return _chat_chunks(head, outputs, request, params.n)
    (output,) = [one async for one in outputs]
    choices = [_chat_choice(sample) for sample in output.outputs]
    return encode({**head.record(), "choices": choices, "usage": usage_of([output]).record()})


async def completions(state: State, request: CompletionRequest) -> Answer:
    state.check_model(request.model)
    params = request.params(
        state.completion_defaults,
        logprobs=request.logprobs,
        structured=request.response_format and request.response_format.structured(),
    )
    head = Head("cmpl", "text_completion", state.names[0])
    (prompt,) = _prompts(request.prompt)
    outputs = _run(state, prompt, params, request)
    if request.stream:
        return _text_chunks(head, outputs, request)
    (output,) = [one async for one in outputs]
    choices = [_text_choice(sample) for sample in output.outputs]
    return encode({**head.record(), "choices": choices, "usage": usage_of([output]).record()})


def _run(state: State, prompt: PromptInput, params: SamplingParams, request: Sampling) -> Outputs:
    prompt = replace(prompt, cache_salt=request.cache_salt) if request.cache_salt else prompt
    return state.llm.generate(prompt, params, priority=request.priority, stream=request.stream)


def _prompts(given: str | list[int | str | list[int]]) -> list[PromptInput]:
    if isinstance(given, str):
        return [PromptInput(text=given)]
    if all(isinstance(one, int) for one in given):
        return [PromptInput(token_ids=cast("list[int]", given))]
    prompts = [
        PromptInput(text=one) if isinstance(one, str) else PromptInput(token_ids=one)
        for one in given
        if not isinstance(one, int)
    ]
    if len(prompts) < len(given):
        raise ApiError(HTTPStatus.BAD_REQUEST, "prompt: token ids must be one list each", param="prompt")
    return prompts


def _chat_choice(sample: Completion) -> Record:
    message: Record = {"role": "assistant", "content": sample.text}
    return {
        "index": sample.index,
        "message": message,
        "logprobs": chat_logprobs(sample),
        "finish_reason": sample.finish_reason,
    }


def _text_choice(sample: Completion) -> Record:
    return {
        "index": sample.index,
        "text": sample.text,
        "logprobs": text_logprobs(sample),
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
    }


async def _chat_chunks(head: Head, outputs: Outputs, request: ChatRequest, n: int) -> Stream:
    """Text alone is written by hand: it is what nearly every chunk has, tens of thousands of times a second."""
    record = {**head.record("chat.completion.chunk"), "choices": []}
    before = encode(record)[:-3]  # up to the opening bracket of the choices
    options = request.stream_options
    usage = Usage()
    first = set(range(n))
    async for output in outputs:
        usage.prompt, usage.cached = len(output.prompt_token_ids), output.num_cached_tokens
        for sample in output.outputs:
            usage.completion += len(sample.token_ids)
            if sample.index in first:
                first.discard(sample.index)
                yield (
                    b"data: "
                    + before
                    + b"["
                    + encode(_chat_delta(sample.index, {"role": "assistant", "content": ""}))
                    + b"]}\n\n"
                )
            if sample.text or sample.logprobs or sample.finish_reason:
                delta = _chat_delta(sample.index, {"content": sample.text}, chat_logprobs(sample), sample.finish_reason)
                yield b"data: " + before + b"[" + encode(delta) + b"]}\n\n"
    if options is not None and options.include_usage:
        yield b"data: " + encode({**record, "usage": usage.record()}) + b"\n\n"
    yield DONE


def _chat_delta(index: int, delta: Record, logprobs: Any = None, reason: str | None = None) -> Record:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


async def _text_chunks(head: Head, outputs: Outputs, request: CompletionRequest) -> Stream:
    record = {**head.record(), "choices": []}
    usage = Usage()
    options = request.stream_options
    async for output in outputs:
        usage.prompt, usage.cached = len(output.prompt_token_ids), output.num_cached_tokens
        for sample in output.outputs:
            usage.completion += len(sample.token_ids)
            yield b"data: " + encode({**record, "choices": [_text_choice(sample)]}) + b"\n\n"
    if options is not None and options.include_usage:
        yield b"data: " + encode({**record, "usage": usage.record()}) + b"\n\n"
    yield DONE
