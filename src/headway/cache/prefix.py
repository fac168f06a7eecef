"""Finds computed blocks by what they hold: a block's digest covers its tokens and everything before them."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

DIGEST_BYTES = 16


def extend_digests(digests: list[bytes], tokens: npt.NDArray[np.int32], block_size: int, salt: str) -> None:
    """Appends the digests of the full blocks of ``tokens`` (1-d, from the sequence's start) that it lacks.

    digest = blake2b-128(digest of the block before | the block's int32 tokens); the salt stands before the first.
    """
    full = len(tokens) // block_size
    if len(digests) >= full:
        return
    parent = digests[-1] if digests else blake2b(salt.encode(), digest_size=DIGEST_BYTES).digest()
    data, width = tokens.tobytes(), block_size * tokens.itemsize
    for index in range(len(digests), full):
        parent = blake2b(parent + data[index * width : (index + 1) * width], digest_size=DIGEST_BYTES).digest()
        digests.append(parent)


class PrefixCache:
    """Digest to block, one block a digest. Holds no references: a block stays findable until the pool evicts it."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}

    @property
    def size(self) -> int:
        return len(self._blocks)

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """Blocks that hold the longest known prefix of a sequence with these digests."""
        found: list[int] = []
        for digest in digests:
            block = self._blocks.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def register(self, digest: bytes, block: int) -> bool:
        """Makes a computed block findable; False if another block already holds the same."""
        if digest in self._blocks:
            return False
        assert block not in self._digests, f"block {block} is registered with other content"
        self._blocks[digest] = block
        self._digests[block] = digest
        return True

    def forget(self, block: int) -> None:
        """The pool takes the block back."""
        del self._blocks[self._digests.pop(block)]
