"""Short ways to write plans."""

from __future__ import annotations

import numpy as np

from headway.messages import PoolingParams, SamplingParams, SlotStart, StepPlan, StepResult


def as_bytes(values: list[int]) -> bytes:
    return np.array(values, np.int32).tobytes()


def start(
    slot: int,
    token_ids: list[int],
    block_ids: list[int] | None = None,
    *,
    sampling: SamplingParams | None = None,
    pooling: PoolingParams | None = None,
    prompt_len: int | None = None,
    num_computed: int = 0,
    seed: int = 0,
    stop_token_ids: list[int] | None = None,
    bad_words_ids: list[list[int]] | None = None,
    token_type_ids: list[int] | None = None,
) -> SlotStart:
    """A request that enters a slot; greedy unless it says otherwise."""
    if sampling is None and pooling is None:
        sampling = SamplingParams(temperature=0)
    return SlotStart(
        slot=slot,
        token_ids=as_bytes(token_ids),
        prompt_len=len(token_ids) if prompt_len is None else prompt_len,
        num_computed=num_computed,
        block_ids=block_ids or [],
        sampling=sampling,
        pooling=pooling,
        seed=seed,
        stop_token_ids=stop_token_ids or [],
        bad_words_ids=bad_words_ids or [],
        token_type_ids=token_type_ids,
    )


def plan(
    step: int = 0,
    *,
    runs: list[tuple[int, int]] | None = None,
    starts: list[SlotStart] | None = None,
    releases: list[int] | None = None,
    blocks: list[int] | None = None,
    masked_slots: list[int] | None = None,
) -> StepPlan:
    """runs: (slot, tokens) pairs; None repeats the last slots."""
    return StepPlan(
        step=step,
        runs=None if runs is None else as_bytes([n for run in runs for n in run]),
        starts=starts or [],
        releases=releases or [],
        blocks=blocks or [],
        masked_slots=masked_slots or [],
    )


def tokens_of(result: StepResult) -> list[int]:
    return np.frombuffer(result.tokens, np.int32).tolist()
