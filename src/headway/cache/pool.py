"""Reference-counted KV blocks. Block 0 is the padding that kernels may read and write: it is never given out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence


class BlockPool:
    """Each block is free, cached (nobody holds it, but what it holds is worth keeping) or referenced.

    ``free + cached + referenced == total`` always. Cached blocks are taken back least recently used first, once no
    free ones are left; ``on_evict`` hears of each.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None] | None = None) -> None:
        self.total = max(num_blocks - 1, 0)
        self._free = list(range(num_blocks - 1, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._references = [0] * num_blocks
        self._keep = bytearray(num_blocks)
        self._on_evict = on_evict

    @property
    def available(self) -> int:
        """Blocks that ``allocate`` could hand out now."""
        return len(self._free) + len(self._cached)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def referenced(self) -> int:
        return self.total - self.available

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks, each with one reference. The caller has checked ``available``."""
        assert count <= self.available, f"{count} blocks asked for, {self.available} available"
        while len(self._free) < count:
            self._evict()
        split = len(self._free) - count
        blocks = self._free[split:]
        del self._free[split:]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def retain(self, blocks: Sequence[int]) -> None:
        """One more reference to blocks that are cached or referenced."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each; the only way back. Last blocks first: a prefix outlives its tail."""
        for block in reversed(blocks):
            left = self._references[block] - 1
            assert left >= 0, f"block {block} released more often than held"
            self._references[block] = left
            if left:
                continue
            if self._keep[block]:
                self._cached[block] = None
            else:
                self._free.append(block)

    def keep(self, block: int) -> None:
        """Marks a referenced block's content as worth keeping once nobody references it."""
        assert self._references[block] > 0, f"block {block} is not referenced"
        self._keep[block] = 1

    def drop_cached(self) -> None:
        """What cached blocks hold is worth nothing any more."""
        while self._cached:
            self._evict()

    def _evict(self) -> None:
        block, _ = self._cached.popitem(last=False)
        self._keep[block] = 0
        self._free.append(block)
        if self._on_evict is not None:
            self._on_evict(block)
