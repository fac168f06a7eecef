"""The block ids of every slot, in the order of the tokens they hold."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class BlockTable:
    """rows: [slots, blocks] int32. capacity: [slots] int64, tokens that a slot's blocks can hold."""

    def __init__(self, num_slots: int, max_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.rows = np.zeros((num_slots, max_blocks), np.int32)
        self.capacity = np.zeros(num_slots, np.int64)

    def set(self, slot: int, blocks: list[int]) -> None:
        assert self.capacity[slot] == 0, f"slot {slot} still holds blocks"
        self.rows[slot, : len(blocks)] = blocks
        self.capacity[slot] = len(blocks) * self.block_size

    def append(self, slots: npt.NDArray[np.int64], blocks: list[int]) -> None:
        """One block to each slot."""
        self.rows[slots, self.capacity[slots] // self.block_size] = blocks
        self.capacity[slots] += self.block_size

    def get(self, slot: int) -> list[int]:
        return self.rows[slot, : self.capacity[slot] // self.block_size].tolist()

    def clear(self, slot: int) -> list[int]:
        """Empties the row; returns what it held."""
        blocks = self.get(slot)
        self.capacity[slot] = 0
        return blocks
