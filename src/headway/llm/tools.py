"""Tool calls in what a model wrote, in the notations that chat templates teach: which one, the template itself shows.

<tool_call> JSON </tool_call>       Qwen, Hermes, SmolLM; the JSON is a call or a list of calls
[TOOL_CALLS] JSON list              Mistral (its mark is a special token, so it may be missing from the text)
<|python_tag|> JSON; JSON           Llama 3 (likewise); "parameters" for "arguments"
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_Parse = Callable[[str], tuple[str, list[Any]]]


class ToolParser:
    """For the models of one chat template. known: whether the template teaches a notation that is known.

    mark: what calls begin with. opener: what a text that is all calls may begin with instead; empty if nothing.
    """

    def __init__(self, chat_template: str) -> None:
        self.mark = next((mark for mark in _NOTATIONS if mark in chat_template), "")
        self.opener, self._parse = _NOTATIONS.get(self.mark, ("", None))

    @property
    def known(self) -> bool:
        return self._parse is not None

    def parse(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """The text without its calls, and the calls in OpenAI's form; the whole text and none if one is malformed."""
        if self._parse is None:
            return text, []
        try:
            content, calls = self._parse(text)
            return content.strip() if calls else text, [_call(text, i, call) for i, call in enumerate(calls)]
        except (ValueError, KeyError, TypeError, RecursionError):
            return text, []


def _tagged(text: str) -> tuple[str, list[Any]]:
    found = [json.loads(match) for match in _TAGGED.findall(text)]
    return _TAGGED.sub("", text), [call for calls in found for call in (calls if isinstance(calls, list) else [calls])]


def _listed(text: str) -> tuple[str, list[Any]]:
    before, mark, after = text.partition("[TOOL_CALLS]")
    if not mark:
        before, after = "", text
    calls = json.loads(after)
    return (before, calls) if isinstance(calls, list) else (text, [])


def _bare(text: str) -> tuple[str, list[Any]]:
    before, mark, after = text.partition("<|python_tag|>")
    if not mark:
        before, after = "", text
    decoder, calls, rest = json.JSONDecoder(), list[Any](), after.strip()
    while rest:
        call, end = decoder.raw_decode(rest)
        calls.append(call)
        rest = rest[end:].lstrip("; \n")
    return before, calls


_NOTATIONS: dict[str, tuple[str, _Parse]] = {
    "<tool_call>": ("", _tagged),
    "[TOOL_CALLS]": ("[", _listed),
    "<|python_tag|>": ("{", _bare),
}


def _call(text: str, place: int, call: Any) -> dict[str, Any]:
    """The id is the same whenever the text is."""
    arguments = call["arguments"] if "arguments" in call else call["parameters"]
    function = {
        "name": str(call["name"]),
        "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
    }
    name = blake2b(f"{place} {text}".encode(), digest_size=12).hexdigest()
    return {"id": f"call_{name}", "type": "function", "function": function}
