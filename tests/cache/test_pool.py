"""The pool against a model of it: random allocation, sharing, caching and release."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headway.cache import BlockPool


class PoolMachine(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(1, 12))
    def build(self, num_blocks: int) -> None:
        self.evicted: list[int] = []
        self.pool = BlockPool(num_blocks, self.evicted.append)
        self.held: list[list[int]] = []
        self.kept: list[int] = []

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.pool.available))
        free, cached = self.pool.free, list(self.pool._cached)
        blocks = self.pool.allocate(count)
        assert len(blocks) == count and 0 not in blocks
        assert not [b for b in blocks for holder in self.held if b in holder]
        oldest = cached[: max(count - free, 0)]
        assert self.evicted == oldest, "least recently used first, and only when nothing is free"
        self.kept = [b for b in self.kept if b not in oldest]
        self.evicted.clear()
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.held))
        self.pool.retain(blocks)
        self.held.append(list(blocks))

    @precondition(lambda self: self.pool.cached)
    @rule(data=st.data())
    def revive(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(list(self.pool._cached)))
        self.pool.retain([block])
        self.held.append([block])

    @precondition(lambda self: any(self.held))
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([b for blocks in self.held for b in blocks]))
        self.pool.keep(block)
        self.kept.append(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        held = {b for blocks in self.held for b in blocks}
        assert self.pool.referenced == len(held)
        assert self.pool.free + self.pool.cached + self.pool.referenced == self.pool.total
        assert set(self.pool._cached) == set(self.kept) - held


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_releasing_a_block_nobody_holds_is_caught() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(blocks)
