"""/tokenize and /detokenize."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from headway.errors import RequestError
from headway.server.answers import Record, encode
from headway.server.protocol import Messages
from headway.server.state import State


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Either a prompt or messages. add_special_tokens: None is as a generation does it."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    tokens: list[int]


async def tokenize(state: State, request: TokenizeRequest) -> bytes:
    state.check_model(request.model)
    return await asyncio.to_thread(_tokenized, state, request)


async def detokenize(state: State, request: DetokenizeRequest) -> bytes:
    state.check_model(request.model)
    return await asyncio.to_thread(_detokenized, state, request.tokens)


def _detokenized(state: State, tokens: list[int]) -> bytes:
    size = state.llm.facts.vocab_size
    wrong = next((token for token in tokens if not 0 <= token < size), None)
    if wrong is not None:
        raise RequestError("tokens", wrong, f"token ids of this model are 0 to {size - 1}")
    return encode({"prompt": state.llm.tokenizer.decode(tokens, skip_special_tokens=False)})


def _tokenized(state: State, request: TokenizeRequest) -> bytes:
    tokens = _tokens(state, request)
    answer: Record = {"count": len(tokens), "max_model_len": state.llm.config.model.max_model_len, "tokens": tokens}
    if request.return_token_strs:
        answer["token_strs"] = [state.llm.tokenizer.token_to_piece(token) for token in tokens]
    return encode(answer)


def _tokens(state: State, request: TokenizeRequest) -> list[int]:
    if (request.prompt is None) is (request.messages is None):
        raise RequestError("prompt", request.prompt, "give either prompt or messages")
    text, special = request.prompt or "", True
    if request.messages is not None:
        prompt = state.llm.chat_prompt(
            request.messages,
            tools=request.tools,
            chat_template=state.chat_template,
            template_kwargs=request.chat_template_kwargs,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
        )
        text, special = prompt.text or "", prompt.add_special_tokens
    given = request.add_special_tokens
    return state.llm.tokenizer.encode(text, special if given is None else given)
