"""One request as the front end hands it to an engine: tokenised, checked, defaults filled in."""

from __future__ import annotations

import msgspec

from headway.messages.params import PoolingParams, SamplingParams


class Request(msgspec.Struct, array_like=True, tag=True, kw_only=True):
    """Either ``sampling`` or ``pooling`` is set. One request is one sequence: the front end fans ``n`` out.

    stop_token_ids: every id that ends it (the model's end-of-sequence ids included, unless ignore_eos).
    max_tokens: how many tokens it may generate; the front end has cut it to what max_model_len leaves.
    seed: 64 bits, always set: the n-th token's uniform is a function of (seed, n) alone.
    stream: deliver tokens step by step; otherwise one EngineOutput when it ends.
    priority: lower runs first, under the priority policy.
    token_type_ids: for encoders with segments (BERT pairs); None is all zero.
    cache_salt: requests with different salts share no cached blocks.
    data_parallel_rank: the replica that runs it; None: any.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams | None = None
    pooling: PoolingParams | None = None
    max_tokens: int = 1
    seed: int = 0
    stop_token_ids: list[int] = []
    bad_words_ids: list[list[int]] = []
    priority: int = 0
    stream: bool = False
    token_type_ids: list[int] | None = None
    cache_salt: str = ""
    data_parallel_rank: int | None = None
