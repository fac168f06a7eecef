"""The persistent batch: everything a worker knows of its requests, as a structure of arrays indexed by slot.

Every array is C-contiguous and never moves, so that native code can hold pointers to it. A plan's deltas are applied
here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from headway.worker.extras import HAS_EXTRAS, Int32Array, Kind, SlotExtras, extras_of, kind_of

if TYPE_CHECKING:
    from headway.messages import SamplingParams, SlotStart, StepPlan


@dataclass(slots=True)
class Runs:
    """A step's runs in batch order: slots and tokens int32 [R]; rows (int32) index into them.

    sample_rows: runs that reach their slot's last known token and generate the next one. pool_rows: runs that
    complete the prompt of a pooling slot.
    """

    slots: Int32Array
    tokens: Int32Array
    sample_rows: Int32Array
    pool_rows: Int32Array

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.sum())


class Batch:
    """State of ``num_slots`` slots.

    tokens: int32 [slots, max_model_len + 1], prompt then output. length: tokens known; computed: of them in the cache.
    block_table: int32 [slots, max_blocks], block 0 where unused. kind: ``Kind``. top_k: 0 keeps all. min_tokens: 0
    where no stop id is to be masked. seed: uint64; the other sampling parameters float32; everything else int32.
    stages: of the pipeline. In all but the last, the first ``length`` tokens include some that are not known there.
    """

    def __init__(self, num_slots: int, max_model_len: int, block_size: int, vocab_size: int, stages: int = 1) -> None:
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.tokens = np.zeros((num_slots, max_model_len + 1), np.int32)
        self.length = np.zeros(num_slots, np.int32)
        self.computed = np.zeros(num_slots, np.int32)
        self.prompt_len = np.zeros(num_slots, np.int32)
        self.block_table = np.zeros((num_slots, -(-(max_model_len + 1) // block_size)), np.int32)
        self.num_blocks = np.zeros(num_slots, np.int32)
        self.kind = np.zeros(num_slots, np.int32)
        self.temperature = np.zeros(num_slots, np.float32)
        self.top_p = np.zeros(num_slots, np.float32)
        self.top_k = np.zeros(num_slots, np.int32)
        self.min_p = np.zeros(num_slots, np.float32)
        self.seed = np.zeros(num_slots, np.uint64)
        self.presence = np.zeros(num_slots, np.float32)
        self.frequency = np.zeros(num_slots, np.float32)
        self.repetition = np.zeros(num_slots, np.float32)
        self.min_tokens = np.zeros(num_slots, np.int32)
        self.extras: dict[int, SlotExtras] = {}
        self._turns = [(np.zeros(num_slots, np.int32), np.zeros(num_slots, np.int32)) for _ in range(stages)]
        self._turn_sizes = [0] * stages
        self._turn = 0

    def apply(self, plan: StepPlan) -> Runs:
        """Takes in a plan's deltas and returns what it runs; the arrays are valid until the next call."""
        for slot in plan.releases:
            self._release(slot)
        for start in plan.starts:
            self._start(start)
        self.append_blocks(plan.blocks)
        return self._next_runs(plan.runs)

    def append_blocks(self, blocks: list[int]) -> None:
        """Flat (slot, block) pairs."""
        for slot, block in zip(blocks[::2], blocks[1::2], strict=True):
            self.block_table[slot, self.num_blocks[slot]] = block
            self.num_blocks[slot] += 1

    def advance(self, runs: Runs) -> None:
        """The step is over: its tokens are in the cache, and each sampled token, at tokens[slot, length], is known."""
        self.computed[runs.slots] += runs.tokens
        self.length[runs.slots[runs.sample_rows]] += 1

    def output_index(self, slots: Int32Array) -> Int32Array:
        """How many tokens each slot has generated: the index of the next one."""
        return self.length[slots] - self.prompt_len[slots]

    def _next_runs(self, runs: bytes | None) -> Runs:
        self._turn = (self._turn + 1) % len(self._turns)
        slots, tokens = self._turns[self._turn]
        if runs is not None:
            pairs = np.frombuffer(runs, np.int32).reshape(-1, 2)
            self._turn_sizes[self._turn] = len(pairs)
            slots[: len(pairs)], tokens[: len(pairs)] = pairs.T
        size = self._turn_sizes[self._turn]
        slots, tokens = slots[:size], tokens[:size]
        if runs is None:
            tokens[:] = 1
        left = self.length[slots] - self.computed[slots] - tokens
        assert (left >= 0).all(), "a run goes past its slot's known tokens"
        done, pools = left == 0, (self.kind[slots] & Kind.POOL) != 0
        return Runs(slots, tokens, _rows(done & ~pools), _rows(done & pools))

    def _release(self, slot: int) -> None:
        self.length[slot] = self.computed[slot] = self.num_blocks[slot] = self.kind[slot] = 0
        self.extras.pop(slot, None)

    def _start(self, start: SlotStart) -> None:
        slot = start.slot
        assert not self.length[slot], f"slot {slot} starts before it was released"
        token_ids = np.frombuffer(start.token_ids, np.int32)
        self.tokens[slot, : len(token_ids)] = token_ids
        self.length[slot] = len(token_ids)
        self.computed[slot] = start.num_computed
        self.prompt_len[slot] = start.prompt_len
        self.block_table[slot, : len(start.block_ids)] = start.block_ids
        self.num_blocks[slot] = len(start.block_ids)
        kind = kind_of(start)
        self.kind[slot] = kind
        if kind & HAS_EXTRAS:
            self.extras[slot] = extras_of(start, self.vocab_size)
        if start.sampling is not None:
            self._start_sampling(start, start.sampling)

    def _start_sampling(self, start: SlotStart, params: SamplingParams) -> None:
        slot = start.slot
        self.seed[slot] = start.seed & 0xFFFF_FFFF_FFFF_FFFF
        self.temperature[slot] = params.temperature
        self.top_p[slot] = params.top_p
        self.top_k[slot] = params.top_k if 0 < params.top_k < self.vocab_size else 0
        self.min_p[slot] = params.min_p
        self.presence[slot] = params.presence_penalty
        self.frequency[slot] = params.frequency_penalty
        self.repetition[slot] = params.repetition_penalty
        self.min_tokens[slot] = params.min_tokens if start.stop_token_ids else 0


def _rows(flags: NDArray[np.bool_]) -> Int32Array:
    return np.flatnonzero(flags).astype(np.int32)
