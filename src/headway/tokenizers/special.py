"""Beginning- and end-of-sequence tokens around a text."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing


def add_bos_and_eos(backend: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Puts them (None: nothing) around every text encoded with add_special_tokens."""

    def around(name: str, kind: int) -> list[str]:
        return [f"{t}:{kind}" for t in (bos, f"${name}", eos) if t is not None]

    special = [(token, backend.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token is not None]
    backend.post_processor = TemplateProcessing(
        single=around("A", 0), pair=around("A", 0) + around("B", 1), special_tokens=special
    )
