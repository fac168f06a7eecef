"""The KV cache as the scheduler sees it: claim blocks for a slot, grow, register what is computed, release."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from headway.cache.pool import BlockPool
from headway.cache.prefix import PrefixCache
from headway.cache.table import BlockTable


class KvCache:
    def __init__(
        self, *, num_blocks: int, block_size: int, num_slots: int, max_model_len: int, prefix_caching: bool
    ) -> None:
        self.block_size = block_size
        self.prefix = PrefixCache() if prefix_caching else None
        self.pool = BlockPool(num_blocks, self.prefix.forget if self.prefix is not None else None)
        self.table = BlockTable(num_slots, self.blocks_for(max_model_len), block_size)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def find(self, digests: list[bytes], num_tokens: int) -> list[int]:
        """Computed blocks of a prefix that leaves at least the last of ``num_tokens`` to compute."""
        if self.prefix is None:
            return []
        return self.prefix.find(digests[: (num_tokens - 1) // self.block_size])

    def claim(self, slot: int, hits: list[int], num_tokens: int, spare: int) -> list[int] | None:
        """Gives the slot blocks for ``num_tokens``, the first of them shared; None if under ``spare`` would be left."""
        fresh = self.blocks_for(num_tokens) - len(hits)
        self.pool.retain(hits)
        if self.pool.available < fresh + spare:
            self.pool.release(hits)
            return None
        blocks = hits + self.pool.allocate(fresh)
        self.table.set(slot, blocks)
        return blocks

    def grow(self, slots: npt.NDArray[np.int64]) -> list[int]:
        """One more block to each slot; returns flat (slot, block) pairs. The caller has checked the pool."""
        blocks = self.pool.allocate(slots.size)
        self.table.append(slots, blocks)
        return np.column_stack((slots, blocks)).ravel().tolist()

    def register(self, slot: int, digests: list[bytes], first: int, last: int) -> None:
        """Makes the slot's computed blocks first .. last - 1 findable."""
        assert self.prefix is not None
        row = self.table.rows[slot]
        for index in range(first, last):
            block = int(row[index])
            if self.prefix.register(digests[index], block):
                self.pool.keep(block)

    def release(self, slot: int) -> None:
        self.pool.release(self.table.clear(slot))
