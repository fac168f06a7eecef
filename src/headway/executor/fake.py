"""A deterministic stand-in for a model, without torch: for tests of everything above the executor.

It runs on ``UniExecutor``'s thread and keeps books of its own: every plan is checked against the plan's contract, and
each KV position holds a hash of all tokens up to it, read back through the block table. A scheduling mistake (a block
given twice, a prefix shared that was never computed, a token skipped) fails an assertion or changes the tokens.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import numpy as np
import numpy.typing as npt

from headway.config import EngineConfig
from headway.executor.port import WorkerInfo
from headway.executor.uni import Masks, UniExecutor
from headway.messages import RowLogprobs, SlotStart, StepPlan, StepResult

_WORD = (1 << 64) - 1
_STATE = 8  # bytes
DEFAULT_BLOCKS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeModel:
    """What the fake generates. eos_probability: chance, per token, of ``eos_token_id``. latency_s: of every step.

    fail_at_step: that step raises RuntimeError.
    """

    vocab_size: int = 256
    eos_token_id: int = 0
    eos_probability: float = 0.0
    latency_s: float = 0.0
    fail_at_step: int | None = None

    def next_token(self, state: int, seed: int) -> int:
        """A pure function of the hash of the whole prefix and the seed."""
        word = _mix(state, seed)
        if (word >> 40) / (1 << 24) < self.eos_probability:
            return self.eos_token_id
        return word % self.vocab_size


def prefix_state(tokens: list[int], state: int = 0) -> int:
    """The hash of a prefix, continued from ``state``."""
    for token in tokens:
        state = _mix(state, token)
    return state


class FakeExecutor(UniExecutor):
    """See ``headway.executor.port.Executor``."""

    def __init__(self, config: EngineConfig, model: FakeModel | None = None) -> None:
        super().__init__(config, partial(FakeWorker, model=model or FakeModel()))


@dataclass(slots=True)
class _Sequence:
    """One slot. states[p]: hash of tokens 0 .. p, for every known token."""

    start: SlotStart
    tokens: list[int]
    computed: int
    blocks: list[int]
    states: array[int] = field(default_factory=partial(array, "Q"))

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.states.append(_mix(self.states[-1] if self.states else 0, token))


class FakeWorker:
    def __init__(self, config: EngineConfig, model: FakeModel) -> None:
        self._config, self._model = config, model
        self._encoder = config.model.runner == "pooling"
        self._block_size = config.cache.block_size
        self._num_blocks = config.cache.num_blocks or DEFAULT_BLOCKS
        self._kv: npt.NDArray[np.uint64] = np.zeros((self._num_blocks, self._block_size), np.uint64)
        self._holders = [0] * self._num_blocks
        self._sequences: dict[int, _Sequence] = {}
        self._last_slots: deque[list[int]] = deque(maxlen=config.parallel.pipeline_parallel_size)
        self._next_step = 0

    def load(self) -> WorkerInfo:
        return WorkerInfo(
            executor="fake",
            num_blocks=self._num_blocks,
            block_size=self._block_size,
            vocab_size=self._model.vocab_size,
            threads=1,
            kernels="fake",
            program=False,
            weights_bytes=0,
            kv_bytes=self._kv.nbytes,
            startup_s={"load": 0.0},
        )

    def step(self, plan: StepPlan, masks: Callable[[int], Masks]) -> StepResult:
        assert plan.step == self._next_step, f"step {plan.step}, expected {self._next_step}"
        self._next_step += 1
        began = time.perf_counter_ns()
        if self._model.latency_s:
            time.sleep(self._model.latency_s)
        if plan.step == self._model.fail_at_step:
            raise RuntimeError(f"injected at step {plan.step}")
        for slot in plan.releases:
            self._release(slot)
        for start in plan.starts:
            self._start(start)
        for slot, block in zip(plan.blocks[::2], plan.blocks[1::2]):
            self._hold(self._sequences[slot], block)
        runs = self._runs(plan)
        for slot, count in runs:
            self._compute(self._sequences[slot], count)
        result = self._results(plan, runs, masks(plan.step) if plan.masked_slots else {})
        end = time.perf_counter_ns()
        result.times_ns = {"model": end - began, "start": began, "end": end}
        return result

    def close(self) -> None:
        self._sequences.clear()

    def _release(self, slot: int) -> None:
        sequence = self._sequences.pop(slot)
        self._check_kv(sequence)
        for block in sequence.blocks:
            self._holders[block] -= 1

    def _start(self, start: SlotStart) -> None:
        assert start.slot not in self._sequences, f"slot {start.slot} starts while it is taken"
        assert 0 <= start.slot < self._config.scheduler.max_num_seqs
        tokens: list[int] = np.frombuffer(start.token_ids, np.int32).tolist()
        assert start.prompt_len <= len(tokens), "a prompt longer than its tokens"
        assert 0 <= start.num_computed < len(tokens), "nothing left to compute"
        assert start.num_computed % self._block_size == 0, "a hit of part of a block"
        sequence = _Sequence(start, [], start.num_computed, [])
        for token in tokens:
            sequence.append(token)
        self._sequences[start.slot] = sequence
        for block in start.block_ids:
            self._hold(sequence, block)
        self._check_kv(sequence)

    def _hold(self, sequence: _Sequence, block: int) -> None:
        shared = len(sequence.blocks) < sequence.start.num_computed // self._block_size
        assert 0 < block < self._num_blocks, f"block {block} of {self._num_blocks}"
        assert shared or self._holders[block] == 0, f"block {block} is held by another slot"
        sequence.blocks.append(block)
        self._holders[block] += 1

    def _runs(self, plan: StepPlan) -> list[tuple[int, int]]:
        if plan.runs is None:
            assert len(self._last_slots) == self._last_slots.maxlen, "the first plans must say what they run"
            self._last_slots.append(self._last_slots[0])
            return [(slot, 1) for slot in self._last_slots[-1]]
        pairs = np.frombuffer(plan.runs, np.int32).reshape(-1, 2).tolist()
        slots = [slot for slot, _ in pairs]
        self._last_slots.append(slots)
        total = sum(count for _, count in pairs)
        assert 0 < total <= self._config.scheduler.max_num_batched_tokens, f"{total} tokens in a step"
        assert len(set(slots)) == len(pairs), "a slot runs twice"
        return [(slot, count) for slot, count in pairs]

    def _compute(self, sequence: _Sequence, count: int) -> None:
        end = sequence.computed + count
        assert count > 0 and end <= len(sequence.tokens), f"run to {end} of {len(sequence.tokens)} tokens"
        if self._encoder:
            assert sequence.computed == 0 and end == len(sequence.tokens), "an encoder's prompt was cut"
        else:
            for position in range(sequence.computed, end):
                block = sequence.blocks[position // self._block_size]
                assert self._holders[block] == 1, f"write to block {block}, which is shared"
                self._kv[block, position % self._block_size] = sequence.states[position]
        sequence.computed = end

    def _check_kv(self, sequence: _Sequence) -> None:
        """Everything counted as computed is really in the blocks."""
        count = sequence.computed
        if not self._encoder and count:
            held = self._kv[sequence.blocks[: -(-count // self._block_size)]].tobytes()
            same = held[: count * _STATE] == sequence.states.tobytes()[: count * _STATE]
            assert same, "the blocks hold another sequence's tokens"

    def _results(self, plan: StepPlan, runs: list[tuple[int, int]], masks: Masks) -> StepResult:
        sampling = [s for s, _ in runs if self._samples(self._sequences[s])]
        assert not set(plan.masked_slots) - set(sampling), "a masked slot does not sample"
        assert sorted(masks) == sorted(plan.masked_slots), "each masked slot gets a mask"
        result = StepResult(step=plan.step, logprobs={}, prompt_logprobs={}, pooled={})
        tokens: list[int] = []
        for slot, count in runs:
            sequence = self._sequences[slot]
            if sequence.computed % self._block_size == 0:
                self._check_kv(sequence)
            self._add_prompt_logprobs(slot, count, result)
            complete = sequence.computed == len(sequence.tokens)
            if sequence.start.pooling is not None:
                if complete:
                    result.pooled[slot] = pooled_state(sequence.states[-1])
                tokens.append(-1)
            elif complete:
                tokens.append(self._sample(sequence, masks.get(slot)))
                params = sequence.start.sampling
                if params is not None and params.logprobs is not None:
                    result.logprobs[slot] = _row(tokens[-1], params.logprobs)
            else:
                tokens.append(-1)
        result.tokens = np.array(tokens, np.int32).tobytes()
        return result

    def _samples(self, sequence: _Sequence) -> bool:
        return sequence.start.pooling is None and sequence.computed == len(sequence.tokens)

    def _sample(self, sequence: _Sequence, mask: bytes | None) -> int:
        token = self._model.next_token(sequence.states[-1], sequence.start.seed)
        params = sequence.start.sampling
        short = params is not None and len(sequence.tokens) - sequence.start.prompt_len < params.min_tokens
        forbidden = sequence.start.stop_token_ids if short else []
        token = self.first_allowed(token, forbidden, mask, self._model.vocab_size)
        sequence.append(token)
        return token

    @staticmethod
    def first_allowed(token: int, forbidden: list[int], mask: bytes | None, vocab_size: int) -> int:
        """The first token from ``token`` on, wrapping around, that may come next."""
        for candidate in chain(range(token, vocab_size), range(token)):
            if candidate not in forbidden and (mask is None or mask[candidate // 8] >> (candidate % 8) & 1):
                return candidate
        raise AssertionError("no token is allowed")

    def _add_prompt_logprobs(self, slot: int, count: int, result: StepResult) -> None:
        sequence = self._sequences[slot]
        params = sequence.start.sampling
        if params is None or params.prompt_logprobs is None:
            return
        last = min(sequence.computed, sequence.start.prompt_len - 1)
        positions = range(sequence.computed - count, last)
        if positions:
            result.prompt_logprobs[slot] = [_row(sequence.tokens[p + 1], params.prompt_logprobs) for p in positions]


def pooled_state(state: int) -> bytes:
    """Four float32 numbers that tell prefixes apart."""
    return np.array([state >> shift & 0xFFFF for shift in (0, 16, 32, 48)], np.float32).tobytes()


def _row(token: int, count: int) -> RowLogprobs:
    return RowLogprobs(token_ids=[token, *range(count)], logprobs=[-float(token), *[-1.0] * count], rank=1)


def _mix(state: int, value: int) -> int:
    word = (state ^ (value + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 29) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 32
