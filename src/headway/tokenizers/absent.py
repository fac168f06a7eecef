"""What stands in for the tokenizer of a model that has none: random weights of a published shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import tokenizers
from tokenizers import models

from headway.errors import RequestError
from headway.tokenizers.tokenizer import Tokenizer, TokenizerInfo


class NoTokenizer(Tokenizer):
    """Tokens have no text; a text is refused."""

    def __init__(self) -> None:
        super().__init__(tokenizers.Tokenizer(models.BPE()), TokenizerInfo())

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        return [_refuse(text) for text in texts]

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        _refuse(first)


def _refuse(text: str) -> NoReturn:
    raise RequestError("prompt", text, "this model has random weights and no tokenizer: give token ids")
