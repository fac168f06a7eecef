"""The batch against a plain model of what plans mean: one dict per slot."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.worker.plans import plan, start

from headway.messages import PoolingParams, SamplingParams, StructuredOutput
from headway.worker.batch import Batch
from headway.worker.extras import Kind
from headway.worker.inputs import InputBuffers, prompt_inputs
from headway.worker.runner import wants_hidden

SLOTS, MAX_LEN, BLOCK = 5, 40, 4
PREFIX_HIT = BLOCK


@dataclass
class Sequence:
    tokens: list[int]
    prompt_len: int
    computed: int
    pools: bool
    blocks: list[int] = field(default_factory=list)


class BatchFollowsPlans(RuleBasedStateMachine):
    @initialize()
    def empty(self) -> None:
        self.batch = Batch(SLOTS, MAX_LEN, BLOCK, vocab_size=1000)
        self.buffers = InputBuffers(SLOTS * MAX_LEN, *self.batch.block_table.shape)
        self.model: dict[int, Sequence] = {}
        self.last_slots: list[int] = []
        self.next_block = 1

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        releases = data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True)) if self.model else []
        for slot in releases:
            del self.model[slot]
        free = [s for s in range(SLOTS) if s not in self.model]
        new = data.draw(st.lists(st.sampled_from(free), unique=True)) if free else []
        starts = [self.start(slot, data) for slot in new]
        runnable = [s for s, q in self.model.items() if q.computed < len(q.tokens) < MAX_LEN]
        slots = data.draw(st.lists(st.sampled_from(runnable), unique=True)) if runnable else []
        runs = [(s, data.draw(st.integers(1, self.left(s)))) for s in slots]
        self.run(data, plan(runs=runs, starts=starts, releases=releases, blocks=self.grow(runs)), runs)

    @precondition(lambda self: self.last_slots)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        if any(
            s not in self.model or not self.left(s) > 0 or len(self.model[s].tokens) == MAX_LEN for s in self.last_slots
        ):
            return
        runs = [(s, 1) for s in self.last_slots]
        self.run(data, plan(runs=None, blocks=self.grow(runs)), runs)

    def left(self, slot: int) -> int:
        return len(self.model[slot].tokens) - self.model[slot].computed

    def start(self, slot: int, data: st.DataObject):
        token_ids = data.draw(st.lists(st.integers(0, 999), min_size=PREFIX_HIT + 1, max_size=MAX_LEN - 10))
        computed = data.draw(st.sampled_from([0, PREFIX_HIT]))
        prompt_len = data.draw(st.integers(1, len(token_ids)))
        pools = data.draw(st.booleans())
        sequence = Sequence(token_ids, prompt_len, computed, pools, self.blocks(-(-computed // BLOCK)))
        self.model[slot] = sequence
        pooling = PoolingParams() if pools else None
        return start(
            slot, token_ids, list(sequence.blocks), prompt_len=prompt_len, num_computed=computed, pooling=pooling
        )

    def blocks(self, count: int) -> list[int]:
        self.next_block += count
        return list(range(self.next_block - count, self.next_block))

    def grow(self, runs: list[tuple[int, int]]) -> list[int]:
        pairs: list[int] = []
        for slot, count in runs:
            sequence = self.model[slot]
            for block in self.blocks(-(-(sequence.computed + count) // BLOCK) - len(sequence.blocks)):
                sequence.blocks.append(block)
                pairs += [slot, block]
        return pairs

    def run(self, data: st.DataObject, step_plan, runs: list[tuple[int, int]]) -> None:
        got = self.batch.apply(step_plan)
        self.last_slots = [s for s, _ in runs]
        done = [i for i, (s, n) in enumerate(runs) if n == self.left(s)]
        assert got.slots.tolist() == self.last_slots
        assert got.tokens.tolist() == [n for _, n in runs]
        assert got.sample_rows.tolist() == [i for i in done if not self.model[runs[i][0]].pools]
        assert got.pool_rows.tolist() == [i for i in done if self.model[runs[i][0]].pools]
        if runs:
            self.check_inputs(got, runs)
        for slot in got.slots[got.sample_rows].tolist():
            token = data.draw(st.integers(0, 999))
            self.batch.tokens[slot, self.batch.length[slot]] = token
            self.model[slot].tokens.append(token)
        self.batch.advance(got)
        for slot, count in runs:
            self.model[slot].computed += count

    def check_inputs(self, got, runs: list[tuple[int, int]]) -> None:
        token_ids, meta = self.buffers.build(self.batch, got)
        spans = [(self.model[s], range(self.model[s].computed, self.model[s].computed + n)) for s, n in runs]
        assert token_ids.tolist() == [q.tokens[p] for q, span in spans for p in span]
        assert meta.positions.tolist() == [p for _, span in spans for p in span]
        expected = [q.blocks[p // BLOCK] * BLOCK + p % BLOCK for q, span in spans for p in span]
        assert meta.slot_mapping.tolist() == expected
        assert meta.context_len.tolist() == [span.stop for _, span in spans]
        assert meta.query_start.tolist() == np.cumsum([0] + [n for _, n in runs]).tolist()
        assert (meta.max_query, meta.max_context) == (max(n for _, n in runs), max(s.stop for _, s in spans))
        for row, (sequence, span) in zip(meta.block_table.tolist(), spans, strict=True):
            used = -(-span.stop // BLOCK)
            assert row[:used] == sequence.blocks[:used]

    @invariant()
    def agrees(self) -> None:
        for slot in range(SLOTS):
            sequence = self.model.get(slot)
            length = int(self.batch.length[slot])
            assert self.batch.tokens[slot, :length].tolist() == (sequence.tokens if sequence else [])
            assert (slot in self.batch.extras) == bool(sequence and sequence.pools)
            if sequence:
                assert self.batch.computed[slot] == sequence.computed
                assert self.batch.block_table[slot, : self.batch.num_blocks[slot]].tolist() == sequence.blocks


TestBatchFollowsPlans = BatchFollowsPlans.TestCase
TestBatchFollowsPlans.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)


def test_a_run_past_the_known_tokens_is_refused() -> None:
    batch = Batch(2, 16, 4, vocab_size=10)
    with pytest.raises(AssertionError, match="past its slot's known tokens"):
        batch.apply(plan(starts=[start(0, [1, 2])], runs=[(0, 3)]))


def test_a_slot_starts_only_after_its_release() -> None:
    batch = Batch(2, 16, 4, vocab_size=10)
    batch.apply(plan(starts=[start(0, [1, 2])], runs=[(0, 2)]))
    with pytest.raises(AssertionError, match="before it was released"):
        batch.apply(plan(starts=[start(0, [3])], runs=[]))
    batch.apply(plan(releases=[0], starts=[start(0, [3])], runs=[]))
    assert batch.length[0] == 1


def test_prompt_reports_keep_a_step_from_its_program_only_until_the_prompt_is_done() -> None:
    batch = Batch(2, 16, 4, vocab_size=10)
    starts = [start(0, [1, 2, 3, 4], sampling=SamplingParams(prompt_logprobs=1)), start(1, [1, 2])]
    found: list[bool] = []
    for counts in ((2, 2), (1, 1), (1, 1), (1, 1)):
        runs = batch.apply(plan(starts=starts, runs=list(enumerate(counts))))
        found.append(wants_hidden(batch, runs))
        batch.advance(runs)
        starts = []
    assert found == [True, True, False, False]  # the prompt's last token has no report


@pytest.mark.parametrize(
    ("params", "extra", "kind"),
    [
        ({}, {}, Kind(0)),
        ({"temperature": 0}, {}, Kind.GREEDY),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.1}, {}, Kind(0)),
        ({"top_k": 5, "temperature": 0}, {}, Kind.GREEDY),
        ({"min_tokens": 2}, {}, Kind(0)),
        ({"min_tokens": 2}, {"stop_token_ids": [7]}, Kind.ADJUSTED),
        ({}, {"bad_words_ids": [[1]]}, Kind.ADJUSTED),
        ({"logit_bias": {1: 2.0}}, {}, Kind.ADJUSTED),
        ({"logprobs": 0}, {}, Kind.ADJUSTED),
        ({"presence_penalty": 0.5}, {}, Kind.ADJUSTED),
        ({"frequency_penalty": 0.5}, {}, Kind.ADJUSTED),
        ({"repetition_penalty": 1.5, "temperature": 0}, {}, Kind.ADJUSTED | Kind.GREEDY),
        ({"structured": StructuredOutput(regex="a")}, {}, Kind.ADJUSTED),
        ({"prompt_logprobs": 1}, {}, Kind.PROMPT_LOGPROBS),
    ],
)
def test_a_slots_kind_says_what_its_rows_need(params: dict, extra: dict, kind: Kind) -> None:
    batch = Batch(1, 16, 4, vocab_size=10)
    batch.apply(plan(starts=[start(0, [1], sampling=SamplingParams(**params), **extra)], runs=[]))
    assert batch.kind[0] == kind


def test_token_ids_outside_the_vocabulary_are_dropped() -> None:
    batch = Batch(1, 16, 4, vocab_size=10)
    sampling = SamplingParams(logit_bias={3: 1.0, 10: 2.0}, min_tokens=1)
    entry = start(0, [1], sampling=sampling, stop_token_ids=[9, 12], bad_words_ids=[[1, 2], [1, 11], []])
    batch.apply(plan(starts=[entry], runs=[]))
    extras = batch.extras[0]
    assert extras.bias_ids.tolist() == [3]
    assert extras.stop_ids.tolist() == [9]
    assert extras.bad_words == {1: {np.array([1], np.int32).tobytes(): [2]}}


def test_an_encoder_reads_whole_prompts_and_their_segments() -> None:
    batch = Batch(3, 16, 4, vocab_size=0)
    starts = [
        start(2, [5, 6, 7], pooling=PoolingParams(), token_type_ids=[0, 1, 1]),
        start(0, [8], pooling=PoolingParams()),
    ]
    runs = batch.apply(plan(starts=starts, runs=[(2, 3), (0, 1)]))
    token_ids, token_types, query_start, longest = prompt_inputs(batch, runs)
    assert token_ids.tolist() == [5, 6, 7, 8]
    assert token_types.tolist() == [0, 1, 1, 0]
    assert query_start.tolist() == [0, 3, 4]
    assert longest == 3


def test_inputs_stay_valid_while_the_next_step_is_built() -> None:
    batch = Batch(1, 16, 4, vocab_size=10)
    buffers = InputBuffers(16, *batch.block_table.shape)
    runs = batch.apply(plan(starts=[start(0, [4, 5, 6], [1])], runs=[(0, 2)]))
    first, first_meta = buffers.build(batch, runs)
    batch.advance(runs)
    second, _ = buffers.build(batch, batch.apply(plan(runs=[(0, 1)])))
    assert (first.tolist(), first_meta.positions.tolist(), second.tolist()) == ([4, 5], [0, 1], [6])
