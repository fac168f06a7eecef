"""What a caller may give as a prompt, brought to one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec

from headway.errors import RequestError


class PromptInput(msgspec.Struct, frozen=True, kw_only=True):
    """Either text or token_ids is set.

    add_special_tokens: put the tokenizer's own (BOS, [CLS], ...) around text; a chat template has written them out.
    token_type_ids: segments of a pair. cache_salt: requests with different salts share no cached blocks.
    """

    text: str | None = None
    token_ids: list[int] | None = None
    token_type_ids: list[int] | None = None
    add_special_tokens: bool = True
    cache_salt: str = ""


Prompt = str | Sequence[int] | Mapping[str, Any] | PromptInput
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids} (these may add cache_salt), or a PromptInput."""

_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list. A list of integers is one prompt of token ids."""
    if isinstance(prompts, (str, Mapping, PromptInput)):
        return [prompts]
    many = list(prompts)
    return cast("list[Prompt]", [many] if many and isinstance(many[0], int) else many)


def as_input(prompt: Prompt) -> PromptInput:
    """RequestError if it is none of what Prompt says."""
    if isinstance(prompt, PromptInput):
        return _checked(prompt)
    if isinstance(prompt, str):
        return PromptInput(text=prompt)
    if isinstance(prompt, Mapping):
        return _from_mapping(prompt)
    _check_sequence("prompt", prompt)
    return PromptInput(token_ids=list(prompt))


def _checked(prompt: PromptInput) -> PromptInput:
    if (prompt.text is None) == (prompt.token_ids is None):
        raise RequestError("prompt", prompt, "give exactly one of text and token_ids")
    texts: list[Any] = [prompt.text or "", prompt.cache_salt]
    if not all(isinstance(text, str) for text in texts):
        raise RequestError("prompt", prompt, "text and cache_salt must be strings")
    if prompt.token_ids is not None:
        _check_sequence("prompt", prompt.token_ids)
    return prompt


def _from_mapping(prompt: Mapping[str, Any]) -> PromptInput:
    unknown = [key for key in prompt if key not in _KEYS]
    text, ids, salt = (prompt.get(key) for key in _KEYS)
    if unknown or (text is None) == (ids is None):
        raise RequestError("prompt", dict(prompt), "give exactly one of prompt, prompt_token_ids, and maybe cache_salt")
    if not isinstance(salt or "", str):
        raise RequestError("cache_salt", salt, "must be a string")
    if ids is not None:
        _check_sequence("prompt_token_ids", ids)
        return PromptInput(token_ids=list(ids), cache_salt=salt or "")
    if not isinstance(text, str):
        raise RequestError("prompt", text, "must be a string")
    return PromptInput(text=text, cache_salt=salt or "")


def _check_sequence(field: str, ids: Any) -> None:
    """What is in it is looked at beside the vocabulary."""
    if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
        raise RequestError(
            field, ids, "must be text, a list of token ids, or an object with prompt or prompt_token_ids"
        )
