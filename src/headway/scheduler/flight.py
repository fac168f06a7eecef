"""A planned step until its result arrives, and its words in the plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headway.messages import SlotStart
from headway.scheduler.slots import Slots
from headway.scheduler.state import RequestState


@dataclass(slots=True)
class Chunk:
    """A piece of a prompt in one step; ``end``: positions computed after it."""

    state: RequestState
    tokens: int
    end: int


@dataclass(slots=True)
class InFlight:
    """What a planned step runs. Rows: decodes, then chunks. masked: slots whose sampling waits for a mask."""

    step: int
    slots: Slots
    epochs: npt.NDArray[np.int64]
    chunks: list[Chunk]
    masked: list[int]


def encode_runs(slots: Slots, chunks: list[Chunk], last: Slots | None) -> bytes | None:
    """``StepPlan.runs``: None when the ``last`` plan's slots run again, one token each."""
    if last is not None and all(chunk.tokens == 1 for chunk in chunks) and np.array_equal(slots, last):
        return None
    pairs = np.ones((slots.size, 2), np.int32)
    pairs[:, 0] = slots
    pairs[slots.size - len(chunks) :, 1] = [chunk.tokens for chunk in chunks]
    return pairs.tobytes()


def slot_start(state: RequestState, computed: int, blocks: list[int]) -> SlotStart:
    """The request enters its slot with all tokens it has."""
    request = state.request
    return SlotStart(
        slot=state.slot,
        token_ids=state.tokens.tobytes(),
        prompt_len=state.prompt_len,
        num_computed=computed,
        block_ids=blocks,
        sampling=request.sampling,
        pooling=request.pooling,
        seed=request.seed,
        stop_token_ids=request.stop_token_ids,
        bad_words_ids=request.bad_words_ids,
        token_type_ids=request.token_type_ids,
    )
