"""What the endpoints that generate have in common: what is refused, how prompts run, how they end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from http import HTTPStatus
from typing import Any

import msgspec

from headway.engine.port import Pause
from headway.errors import RequestError
from headway.llm.async_llm import INLINE_CHARS, together
from headway.llm.prompts import PromptInput
from headway.messages import Completion, RequestOutput, SamplingParams, StructuredOutput
from headway.server.errors import ApiError, named
from headway.server.protocol import ChatRequest, Sampling
from headway.server.state import State

Take = Callable[[RequestOutput], Pause | None]

MAX_LOGPROBS = 2_000_000
"""Of an answer that is whole: 5 millions held the event loop for 3.5 s, and took a gigabyte."""


def check(state: State, request: Sampling) -> None:
    """ApiError or RequestError for what this server, or any, cannot honour."""
    state.check_model(request.model)
    if request.priority and state.llm.config.scheduler.policy != "priority":
        raise RequestError("priority", request.priority, "the server was not started with --scheduling-policy priority")
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options", request.stream_options, "only with stream=true")
    if request.stream and request.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs", request.prompt_logprobs, "not with stream=true")
    if request.store:
        raise RequestError("store", True, "nothing is stored here")


def sampling(request: Sampling, defaults: SamplingParams, **more: object) -> SamplingParams:
    """more: in place of what the request says. Raises RequestError."""
    given: dict[str, Any] = {**request.given(), **more}
    with named(_names(request)):
        if "structured" in given:
            given["structured"] = StructuredOutput(**given["structured"])
        return msgspec.structs.replace(defaults, **given)


async def chat_prompt(state: State, request: ChatRequest, tools: list[dict[str, Any]] | None) -> PromptInput:
    if request.chat_template is not None and not state.options.trust_request_chat_template:
        accepted = "the server was not started with --trust-request-chat-template"
        raise RequestError("chat_template", request.chat_template, accepted)
    render = partial(
        state.llm.chat_prompt,
        request.messages,
        tools=tools,
        chat_template=request.chat_template or state.chat_template,
        template_kwargs=request.chat_template_kwargs,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
    )
    is_quick = len(msgspec.json.encode((request.messages, tools, request.chat_template_kwargs))) <= INLINE_CHARS
    return render() if is_quick else await asyncio.to_thread(render)


async def run(state: State, prompts: list[PromptInput], params: SamplingParams, request: Sampling, take: Take) -> None:
    """Calls take with the prompts' outputs as they come; samples are numbered through all prompts."""
    stream = bool(request.stream)
    _check_size(state, prompts, params, stream)

    async def follow(first: int, prompt: PromptInput) -> None:
        if request.cache_salt:
            prompt = msgspec.structs.replace(prompt, cache_salt=request.cache_salt)
        with state.stats.watch(stream) as count:

            def seen(output: RequestOutput) -> Pause | None:
                count(output)
                for sample in output.outputs:
                    sample.index += first
                trace(output)
                return take(output)

            routing: dict[str, Any] = {"priority": request.priority, "data_parallel_rank": state.data_parallel_rank}
            await state.llm.follow(prompt, seen, params, stream=stream, **routing)

    with named(_names(request)), ExitStack() as entered:
        trace = _ignore if state.traces is None else entered.enter_context(state.traces.watch(params, stream))
        if len(prompts) == 1:
            await follow(0, prompts[0])
        else:
            await together(follow(i * params.n, prompt) for i, prompt in enumerate(prompts))


def _ignore(_: RequestOutput) -> None:
    """Nobody traces."""


async def whole(
    state: State, prompts: list[PromptInput], params: SamplingParams, request: Sampling
) -> list[RequestOutput]:
    """One of each prompt, in their order."""
    done: list[RequestOutput] = []

    def take(output: RequestOutput) -> None:
        for sample in output.outputs:
            check_end(sample)
        done.append(output)

    await run(state, prompts, params, request, take)
    return sorted(done, key=lambda output: output.outputs[0].index)


def check_end(sample: Completion) -> None:
    """Raises for an answer that is not whole: none is cut in silence."""
    if sample.finish_reason == "error":
        raise RequestError("structured", sample.error, "the model could not follow it to the end")
    if sample.finish_reason == "abort":
        raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the request was aborted")


def _check_size(state: State, prompts: list[PromptInput], params: SamplingParams, stream: bool) -> None:
    n, samples, limit = params.n, len(prompts) * params.n, state.llm.config.model.max_model_len
    if samples > state.most:
        accepted = f"at most {state.most} samples, of all prompts together, may run or wait"
        raise RequestError("prompt" if len(prompts) > 1 else "n", f"{len(prompts)} prompts, n={n}", accepted)
    length = sum(len(prompt.token_ids or prompt.text or "") for prompt in prompts)
    _check_logprobs("prompt_logprobs", params.prompt_logprobs, n * length)
    if samples > 1 and not stream:
        _check_logprobs("logprobs", params.logprobs, samples * min(params.max_tokens or limit, limit))


def _check_logprobs(field: str, count: int | None, tokens: int) -> None:
    if count is not None and tokens * (1 + count) > MAX_LOGPROBS:
        accepted = f"an answer of up to {tokens} tokens would have more than {MAX_LOGPROBS} candidates"
        raise RequestError(field, count, accepted)


def _names(request: Sampling) -> dict[str, str]:
    """What the client calls what it has given."""
    structured = (name for name in ("structured_outputs", "response_format") if getattr(request, name) is not None)
    prompt = "messages" if isinstance(request, ChatRequest) else "prompt"
    known = "logprobs" if request.prompt_logprobs is None else "prompt_logprobs"  # of a completion with echo
    return {
        "structured": next(structured, "tools"),
        "prompt": prompt,
        "prompt_token_ids": prompt,
        "prompt_logprobs": known,
    }
