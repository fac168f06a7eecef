"""The prefix cache over a real pool: what is found is what was computed."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headway.cache import KvCache, extend_digests

BLOCK = 2
tokens = st.lists(st.integers(0, 1), min_size=1, max_size=9).map(lambda t: np.array(t, np.int32))
salts = st.sampled_from(["", "a"])


class CacheMachine(RuleBasedStateMachine):
    """Blocks carry, in ``content``, the salted prefix that was written up to their end."""

    @initialize(num_blocks=st.integers(2, 10))
    def build(self, num_blocks: int) -> None:
        self.kv = KvCache(num_blocks=num_blocks, block_size=BLOCK, num_slots=4, max_model_len=10, prefix_caching=True)
        self.content: dict[int, tuple[str, bytes]] = {}
        self.running: dict[int, tuple[str, np.ndarray, list[bytes]]] = {}

    @precondition(lambda self: len(self.running) < 4)
    @rule(tokens=tokens, salt=salts)
    def claim(self, tokens: np.ndarray, salt: str) -> None:
        slot = next(s for s in range(4) if s not in self.running)
        digests: list[bytes] = []
        extend_digests(digests, tokens, BLOCK, salt)
        hits = self.kv.find(digests, len(tokens))
        assert len(hits) * BLOCK < len(tokens), "the last token is always left to compute"
        for index, block in enumerate(hits):
            assert self.content[block] == (salt, tokens[: (index + 1) * BLOCK].tobytes())
        before = self.kv.pool.available
        blocks = self.kv.claim(slot, hits, len(tokens), spare=0)
        if blocks is None:
            assert self.kv.pool.available == before
            return
        assert blocks[: len(hits)] == hits and len(blocks) == self.kv.blocks_for(len(tokens))
        for index in range(len(hits), len(blocks)):
            self.content[blocks[index]] = (salt, tokens[: (index + 1) * BLOCK].tobytes())
        self.running[slot] = (salt, tokens, digests)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(list(self.running)))
        digests = self.running[slot][2]
        self.kv.register(slot, digests, 0, data.draw(st.integers(0, len(digests))))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(list(self.running)))
        del self.running[slot]
        self.kv.release(slot)

    @invariant()
    def nothing_is_lost(self) -> None:
        pool = self.kv.pool
        assert pool.free + pool.cached + pool.referenced == pool.total
        assert self.kv.prefix is not None and pool.cached <= self.kv.prefix.size
        if not self.running:
            assert pool.referenced == 0 and pool.cached == self.kv.prefix.size


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@given(tokens=tokens, split=st.integers(0, 9), salt=salts)
@settings(deadline=None)
def test_digests_do_not_depend_on_how_often_they_are_extended(tokens: np.ndarray, split: int, salt: str) -> None:
    whole: list[bytes] = []
    extend_digests(whole, tokens, BLOCK, salt)
    parts: list[bytes] = []
    extend_digests(parts, tokens[:split], BLOCK, salt)
    extend_digests(parts, tokens, BLOCK, salt)
    assert parts == whole and len(whole) == len(tokens) // BLOCK


def test_salts_and_predecessors_change_the_digest() -> None:
    seen: list[bytes] = []
    for salt, ids in (("", [1, 2, 3, 4]), ("a", [1, 2, 3, 4]), ("", [9, 9, 3, 4])):
        digests: list[bytes] = []
        extend_digests(digests, np.array(ids, np.int32), BLOCK, salt)
        seen.append(digests[1])
    assert len(set(seen)) == 3
