"""Turns a step's runs into the tensors a model reads, without a loop over tokens."""

from __future__ import annotations

import numpy as np
import torch

from headway.ops.port import AttentionMetadata
from headway.worker.batch import Batch, Runs
from headway.worker.extras import Int32Array


class InputBuffers:
    """Two sets of buffers in turn, so that a step's tensors stay valid while the next step's are built."""

    def __init__(self, max_tokens: int, num_slots: int, max_blocks: int) -> None:
        self._sets = tuple(_Buffers(max_tokens, num_slots, max_blocks) for _ in range(2))
        self._turn = 0

    def build(self, batch: Batch, runs: Runs) -> tuple[torch.Tensor, AttentionMetadata]:
        """Token ids int32 [T] and where they live; valid until the call after the next."""
        self._turn ^= 1
        return self._sets[self._turn].fill(batch, runs)


class _Buffers:
    def __init__(self, max_tokens: int, num_slots: int, max_blocks: int) -> None:
        self._token_ids = np.zeros(max_tokens, np.int32)
        self._positions = np.zeros(max_tokens, np.int32)
        self._slot_mapping = np.zeros(max_tokens, np.int32)
        self._query_start = np.zeros(num_slots + 1, np.int32)
        self._context_len = np.zeros(num_slots, np.int32)
        self._block_table = np.zeros(num_slots * max_blocks, np.int32)

    def fill(self, batch: Batch, runs: Runs) -> tuple[torch.Tensor, AttentionMetadata]:
        num_runs, slots = len(runs), runs.slots
        start = self._query_start[: num_runs + 1]
        np.cumsum(runs.tokens, out=start[1:])
        context = np.add(batch.computed[slots], runs.tokens, out=self._context_len[:num_runs])
        max_query, max_context = int(runs.tokens.max()), int(context.max())
        num_tokens = int(start[-1])
        positions = self._positions[:num_tokens]
        if max_query == 1:
            slot_T = slots
            np.subtract(context, 1, out=positions)
        else:
            slot_T = np.repeat(slots, runs.tokens)
            np.add(np.arange(num_tokens, dtype=np.int32), np.repeat(context - start[1:], runs.tokens), out=positions)
        self._token_ids[:num_tokens] = batch.tokens[slot_T, positions]
        block, offset = np.divmod(positions, batch.block_size)
        slot_mapping = self._slot_mapping[:num_tokens]
        np.multiply(batch.block_table[slot_T, block], batch.block_size, out=slot_mapping)
        slot_mapping += offset
        meta = AttentionMetadata(
            query_start=torch.from_numpy(start),
            context_len=torch.from_numpy(context),
            block_table=torch.from_numpy(self._fill_block_table(batch, slots, max_context)),
            positions=torch.from_numpy(positions),
            slot_mapping=torch.from_numpy(slot_mapping),
            max_query=max_query,
            max_context=max_context,
        )
        return torch.from_numpy(self._token_ids[:num_tokens]), meta

    def _fill_block_table(self, batch: Batch, slots: Int32Array, max_context: int) -> Int32Array:
        width = -(-max_context // batch.block_size)
        table = self._block_table[: len(slots) * width].reshape(len(slots), width)
        table[:] = batch.block_table[slots, :width]
        return table


def prompt_inputs(batch: Batch, runs: Runs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """An encoder's inputs: token ids and token type ids int32 [T], query_start int32 [R+1], the longest prompt.

    Each run is a whole prompt.
    """
    start = np.zeros(len(runs) + 1, np.int32)
    np.cumsum(runs.tokens, out=start[1:])
    token_ids = np.empty(start[-1], np.int32)
    token_types = np.zeros(start[-1], np.int32)
    for slot, begin, end in zip(runs.slots.tolist(), start[:-1].tolist(), start[1:].tolist(), strict=True):
        token_ids[begin:end] = batch.tokens[slot, : end - begin]
        types = batch.extras[slot].token_type_ids
        if types is not None:
            token_types[begin:end] = types
    tensors = (torch.from_numpy(token_ids), torch.from_numpy(token_types), torch.from_numpy(start))
    return *tensors, int(runs.tokens.max())
