"""Scoring pairs of texts: by a cross-encoder that reads both, or by the cosine of two embeddings."""

from __future__ import annotations

import math

from headway.errors import RequestError
from headway.llm.prompts import PromptInput
from headway.messages import PooledOutput, PoolingParams
from headway.tokenizers import Tokenizer


class Scoring:
    """What to run for some pairs (prompts, params), and what to make of the outputs (results).

    One text against many scores it with each; else both sides have as many. Each distinct text is embedded once.
    segments: whether the model tells the two texts of a pair apart by token types.
    """

    def __init__(
        self,
        text_1: str | list[str],
        text_2: str | list[str],
        tokenizer: Tokenizer,
        *,
        cross_encoder: bool,
        segments: bool,
    ) -> None:
        self._pairs = _pairs(text_1, text_2)
        if cross_encoder:
            encoded = [tokenizer.encode_pair(a, b) for a, b in self._pairs]
            self._places: dict[str, int] | None = None
            self.prompts = [
                PromptInput(token_ids=ids, token_type_ids=types if segments else None) for ids, types in encoded
            ]
            self.params = PoolingParams(task="score")
        else:
            texts = dict.fromkeys(text for pair in self._pairs for text in pair)
            self._places = {text: i for i, text in enumerate(texts)}
            self.prompts = [PromptInput(text=text) for text in texts]
            self.params = PoolingParams(task="embed")

    def results(self, outputs: list[PooledOutput]) -> list[PooledOutput]:
        """One per pair, in order; data holds the score."""
        places = self._places
        if places is None:
            return outputs
        return [_cosine(outputs[places[a]], outputs[places[b]]) for a, b in self._pairs]


def _pairs(text_1: str | list[str], text_2: str | list[str]) -> list[tuple[str, str]]:
    first, second = ([t] if isinstance(t, str) else list(t) for t in (text_1, text_2))
    if len(first) == 1:
        first *= len(second)
    if len(first) != len(second):
        accepted = f"text_1 has {len(first)}: give one text and many, or as many on both sides"
        raise RequestError("text_2", f"{len(second)} texts", accepted)
    return list(zip(first, second, strict=True))


def _cosine(a: PooledOutput, b: PooledOutput) -> PooledOutput:
    norm = math.hypot(*a.data) * math.hypot(*b.data)
    dot = sum(x * y for x, y in zip(a.data, b.data, strict=True))
    return PooledOutput(
        request_id=f"{a.request_id}+{b.request_id}",
        prompt_token_ids=[*a.prompt_token_ids, *b.prompt_token_ids],
        data=[dot / norm if norm else 0.0],
        num_cached_tokens=a.num_cached_tokens + b.num_cached_tokens,
    )
