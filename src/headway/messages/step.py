"""The executor's wire: plans are deltas, workers keep the batch.

A worker's view of slot s: ``length`` tokens known, ``computed`` of them in the KV cache. Running s with n tokens
computes positions computed .. computed + n - 1. When that reaches ``length`` (and the slot samples), the worker samples
the next token, appends it, and length grows by one: so step N+1 can be planned before N's tokens are known. The stages
of a pipeline all apply every plan; the last one samples and sends the tokens to the first.
"""

from __future__ import annotations

import msgspec

from headway.messages.params import PoolingParams, SamplingParams


class SlotStart(msgspec.Struct, array_like=True, kw_only=True):
    """A request enters a slot, for the first time or again after preemption.

    token_ids: int32 bytes: the prompt and, after preemption, what it had generated.
    prompt_len: how many of them are the prompt. num_computed: tokens already in the blocks (prefix cache hit).
    block_ids: every block it holds now. bad_words_ids, min_tokens, stop ids are applied by the sampler.
    """

    slot: int
    token_ids: bytes
    prompt_len: int
    num_computed: int
    block_ids: list[int]
    sampling: SamplingParams | None = None
    pooling: PoolingParams | None = None
    seed: int = 0
    stop_token_ids: list[int] = []
    bad_words_ids: list[list[int]] = []
    token_type_ids: list[int] | None = None


class StepPlan(msgspec.Struct, array_like=True, tag=True, kw_only=True):
    """What changed since the last plan; applied in the order releases, starts, blocks, runs.

    releases: slots to forget. blocks: flat (slot, block id) pairs to append to block tables.
    runs: int32 bytes, flat (slot, number of tokens) pairs in batch order; None runs the same slots as the last plan, in
    a pipeline as the plan so many steps back as there are stages, one token each. masked_slots: slots whose sampling
    waits for a token mask sent with Executor.mask(step, ...).
    """

    step: int
    releases: list[int] = []
    starts: list[SlotStart] = []
    blocks: list[int] = []
    runs: bytes | None = None
    masked_slots: list[int] = []


class RowLogprobs(msgspec.Struct, array_like=True, kw_only=True):
    """Log probabilities of one position, from the raw logits (before temperature, penalties and masks).

    token_ids[0] is the sampled (or prompt) token, then the most likely ones in order; rank: of token_ids[0], from 1.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


class StepResult(msgspec.Struct, array_like=True, tag=True, kw_only=True):
    """What one step produced.

    tokens: int32 bytes, one per run in the plan's order; -1 where the run did not sample.
    logprobs: slot to the sampled token's row. prompt_logprobs: slot to rows for positions computed in this step
    (position p's row describes prompt token p + 1). pooled: slot to float32 bytes.
    times_ns: durations by name (see worker).
    """

    step: int
    tokens: bytes = b""
    logprobs: dict[int, RowLogprobs] = {}
    prompt_logprobs: dict[int, list[RowLogprobs]] = {}
    pooled: dict[int, bytes] = {}
    times_ns: dict[str, int] = {}
