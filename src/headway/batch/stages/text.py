"""Chat template, tokens and text as stages of their own, for jobs that give them workers beside the engine's."""

from __future__ import annotations

from typing import Any

from headway.batch.row import Row
from headway.batch.stages.functions import OnRows, each
from headway.errors import RequestError
from headway.llm.chat import ChatRenderer, is_begun
from headway.models.source import resolve_source
from headway.tokenizers import Tokenizer, load_tokenizer


def chat_template(source: str, options: dict[str, Any]) -> OnRows:
    """messages to prompt. options: of ChatRenderer.render."""
    renderer = ChatRenderer(_tokenizer(source))

    def change(row: Row) -> None:
        messages = _column(row, "messages")
        how: dict[str, Any] = {"continue_final_message": is_begun(messages), **options}
        row.data["prompt"] = renderer.render(messages, **how)

    return each("chat_template", change)


def tokenize(source: str) -> OnRows:
    """prompt to tokenized_prompt."""
    tokenizer = _tokenizer(source)

    def run(rows: list[Row]) -> None:
        for special in (True, False):  # a chat template has written the special tokens out
            some = [row for row in rows if _is_text(row) and ("messages" not in row.data) is special]
            encoded = tokenizer.encode_batch([row.data["prompt"] for row in some], special)
            for row, ids in zip(some, encoded, strict=True):
                row.data["tokenized_prompt"] = ids

    return run


def detokenize(source: str) -> OnRows:
    """generated_tokens to generated_text."""
    tokenizer = _tokenizer(source)

    def change(row: Row) -> None:
        prompt = row.data.get("prompt_token_ids", [])
        row.data["generated_text"] = tokenizer.decode_after(prompt, _column(row, "generated_tokens"), True)

    return each("detokenize", change)


def _tokenizer(source: str) -> Tokenizer:
    return load_tokenizer(resolve_source(source, setting="model_source"))


def _is_text(row: Row) -> bool:
    prompt = row.data.get("prompt")
    if not isinstance(prompt, str):
        row.fail(RequestError("prompt", prompt, "must be a string"), "tokenize")
    return row.error is None


def _column(row: Row, name: str) -> Any:
    value = row.data.get(name)
    if value is None:
        raise RequestError(name, None, f"the row has only {', '.join(sorted(row.data))}")
    return value.tolist() if hasattr(value, "tolist") else value
