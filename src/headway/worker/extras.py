"""What a slot asks for beyond plain sampling: kept in a dict by slot, because few requests do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from headway.messages import PoolingParams, SamplingParams, SlotStart

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]
TokenIds = NDArray[np.int64]


class Kind(IntFlag):
    """How a slot ends a run.

    GREEDY: the most likely token. ADJUSTED: its logits are changed first, or reported. PROMPT_LOGPROBS: its prompt
    tokens are reported. POOL: its prompt becomes one vector, it generates nothing.
    """

    GREEDY = 1
    ADJUSTED = 2
    PROMPT_LOGPROBS = 4
    POOL = 8


HAS_EXTRAS = Kind.ADJUSTED | Kind.PROMPT_LOGPROBS | Kind.POOL


@dataclass(slots=True, kw_only=True)
class SlotExtras:
    """Every slot whose kind is in HAS_EXTRAS has one.

    bias_ids, bias: logit bias. bad_words: tokens that complete one, by how many tokens are before them and by which
    (int32 bytes), so that a step looks once for each length. stop_ids: masked until min_tokens are generated. logprobs,
    prompt_logprobs: how many candidates to report, None for no report.
    """

    bias_ids: TokenIds
    bias: Float32Array
    bad_words: dict[int, dict[bytes, list[int]]]
    stop_ids: TokenIds
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    pooling: PoolingParams | None = None
    token_type_ids: list[int] | None = None


def kind_of(start: SlotStart) -> Kind:
    params = start.sampling
    if params is None:
        return Kind.POOL
    kind = Kind(0)
    if params.greedy:
        kind |= Kind.GREEDY
    if _is_adjusted(start, params):
        kind |= Kind.ADJUSTED
    if params.prompt_logprobs is not None:
        kind |= Kind.PROMPT_LOGPROBS
    return kind


def extras_of(start: SlotStart, vocab_size: int) -> SlotExtras:
    """Token ids outside the vocabulary are dropped, with the bad words that hold one: they cannot be generated."""
    params = start.sampling
    bias = {t: b for t, b in ((params and params.logit_bias) or {}).items() if 0 <= t < vocab_size}
    return SlotExtras(
        bias_ids=np.array(list(bias), np.int64),
        bias=np.array(list(bias.values()), np.float32),
        bad_words=_bad_words([w for w in start.bad_words_ids if w and 0 <= min(w) <= max(w) < vocab_size]),
        stop_ids=np.array([t for t in start.stop_token_ids if 0 <= t < vocab_size], np.int64),
        logprobs=params and params.logprobs,
        prompt_logprobs=params and params.prompt_logprobs,
        pooling=start.pooling,
        token_type_ids=start.token_type_ids,
    )


def _bad_words(words: list[list[int]]) -> dict[int, dict[bytes, list[int]]]:
    found: dict[int, dict[bytes, list[int]]] = {}
    for *before, last in words:
        found.setdefault(len(before), {}).setdefault(np.array(before, np.int32).tobytes(), []).append(last)
    return found


def _is_adjusted(start: SlotStart, params: SamplingParams) -> bool:
    return (
        bool(params.logit_bias or start.bad_words_ids)
        or (params.min_tokens > 0 and bool(start.stop_token_ids))
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or params.repetition_penalty != 1
        or params.logprobs is not None
        or params.structured is not None
    )
