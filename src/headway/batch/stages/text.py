"""Chat template, tokens and text as stages of their own, for jobs that give them workers beside the engine's.

A row that lacks what a stage reads passes: it may bring what the stage makes, and if not, the engine's stage says so.
"""

from __future__ import annotations

from typing import Any

from headway.batch.row import Row
from headway.batch.stages.functions import OnRows, each
from headway.llm.chat import ChatRenderer, is_begun
from headway.messages.params import check_text
from headway.models.source import resolve_source
from headway.tokenizers import Tokenizer, load_tokenizer


def chat_template(source: str, options: dict[str, Any]) -> OnRows:
    """messages to prompt. options: of ChatRenderer.render."""
    renderer = ChatRenderer(_tokenizer(source))

    def change(row: Row) -> None:
        messages, tools = _plain(row, "messages"), _plain(row, "tools")
        if messages is not None:
            how: dict[str, Any] = {"continue_final_message": is_begun(messages), **options, "tools": tools or None}
            row.data["prompt"] = renderer.render(messages, **how)

    return each("chat_template", change)


def tokenize(source: str) -> OnRows:
    """prompt to tokenized_prompt."""
    tokenizer = _tokenizer(source)
    check = each("tokenize", lambda row: check_text(row.data["prompt"]))

    def run(rows: list[Row]) -> None:
        texts = [row for row in rows if isinstance(row.data.get("prompt"), str)]
        check(texts)
        for special in (True, False):  # a chat template has written the special tokens out
            some = [row for row in texts if row.error is None and (row.data.get("messages") is None) is special]
            encoded = tokenizer.encode_batch([row.data["prompt"] for row in some], special)
            for row, ids in zip(some, encoded, strict=True):
                row.data["tokenized_prompt"] = ids

    return run


def detokenize(source: str) -> OnRows:
    """generated_tokens to generated_text."""
    tokenizer = _tokenizer(source)

    def change(row: Row) -> None:
        if row.data.get("stop_reason") is None and not row.data.get("tool_calls"):  # else the engine has cut it
            prompt, tokens = row.data.get("prompt_token_ids", []), _plain(row, "generated_tokens")
            row.data["generated_text"] = tokenizer.decode_after(prompt, tokens, True)

    return each("detokenize", change)


def _tokenizer(source: str) -> Tokenizer:
    return load_tokenizer(resolve_source(source, setting="model_source"))


def _plain(row: Row, name: str) -> Any:
    """Arrow and numpy give lists as arrays."""
    value: Any = row.data.get(name)
    return value.tolist() if hasattr(value, "tolist") else value
