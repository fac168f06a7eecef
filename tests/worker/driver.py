"""The least engine that can drive a worker: it keeps lengths and blocks, and writes plans by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.worker.plans import plan, start, tokens_of

from headway.config.settings import CacheConfig, DeviceConfig, EngineConfig, ModelConfig, SchedulerConfig
from headway.messages import RowLogprobs, SlotStart, StepPlan, StepResult
from headway.worker import Worker

BLOCK = 16
NUM_BLOCKS = 1000  # reserved, touched when written; a driver gives each out once


def engine_config(path: Path, *, ops: str = "reference", enforce_eager: bool = True, **model: Any) -> EngineConfig:
    settings = {"dtype": "float32", "max_model_len": 128, **model}
    return EngineConfig(
        model=ModelConfig(path=str(path), served_model_name="m", **settings),
        cache=CacheConfig(block_size=BLOCK, num_blocks=NUM_BLOCKS),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=512),
        device=DeviceConfig(ops=ops, threads=1, enforce_eager=enforce_eager),
    )


@dataclass
class Sequence:
    """A request's state; ``options`` are those of plans.start."""

    tokens: list[int]
    options: dict[str, Any]
    prompt_len: int
    computed: int = 0
    blocks: list[int] = field(default_factory=list[int])
    logprobs: list[RowLogprobs] = field(default_factory=list[RowLogprobs])
    prompt_logprobs: list[RowLogprobs] = field(default_factory=list[RowLogprobs])

    @property
    def left(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]


class Driver:
    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.sequences: dict[int, Sequence] = {}
        self._free = list(range(1, NUM_BLOCKS))
        self._starts: list[SlotStart] = []
        self._releases: list[int] = []
        self._step = 0

    def add(self, slot: int, tokens: list[int], *, prompt_len: int | None = None, **options: Any) -> Sequence:
        sequence = Sequence(list(tokens), options, prompt_len or len(tokens))
        self.sequences[slot] = sequence
        self._starts.append(start(slot, tokens, [], prompt_len=sequence.prompt_len, **options))
        return sequence

    def add_sharing(self, slot: int, tokens: list[int], other: Sequence, blocks: int, **options: Any) -> Sequence:
        """A prefix hit: the first blocks are another sequence's."""
        sequence = Sequence(list(tokens), options, len(tokens), blocks * BLOCK, other.blocks[:blocks])
        self.sequences[slot] = sequence
        entry = start(slot, tokens, list(sequence.blocks), num_computed=sequence.computed, **options)
        self._starts.append(entry)
        return sequence

    def preempt(self, slot: int, new_slot: int) -> None:
        """Out of its slot and blocks, and back in another with what it had generated."""
        old = self.release(slot)
        self.add(new_slot, old.tokens, prompt_len=old.prompt_len, **old.options)

    def release(self, slot: int) -> Sequence:
        self._releases.append(slot)
        return self.sequences.pop(slot)

    def step(self, counts: dict[int, int] | None = None, masks: dict[int, bytes] | None = None) -> StepResult:
        """{slot: tokens}; None repeats the last slots with one token each."""
        runs = counts if counts is not None else dict.fromkeys(self._last, 1)
        self._last = list(runs)
        step_plan = self._plan(runs, explicit=counts is not None, masked=list(masks or {}))
        result = self.worker.step(step_plan, lambda step: masks or {})
        for (slot, count), token in zip(runs.items(), tokens_of(result), strict=True):
            sequence = self.sequences[slot]
            sequence.computed += count
            if token >= 0:
                sequence.tokens.append(token)
        for slot, row in result.logprobs.items():
            self.sequences[slot].logprobs.append(row)
        for slot, rows in result.prompt_logprobs.items():
            self.sequences[slot].prompt_logprobs += rows
        return result

    def _plan(self, runs: dict[int, int], *, explicit: bool, masked: list[int]) -> StepPlan:
        pairs: list[int] = []
        for slot, count in runs.items():
            sequence = self.sequences[slot]
            while len(sequence.blocks) * BLOCK < sequence.computed + count:
                sequence.blocks.append(self._free.pop())
                pairs += [slot, sequence.blocks[-1]]
        self._step += 1
        starts, releases, self._starts, self._releases = self._starts, self._releases, [], []
        return plan(
            self._step,
            runs=list(runs.items()) if explicit else None,
            starts=starts,
            releases=releases,
            blocks=pairs,
            masked_slots=masked,
        )

    def generate(self, num_tokens: int, chunk: int = 512) -> dict[int, list[int]]:
        """Runs every sequence, at most ``chunk`` tokens of one at a time, until each has generated that many."""
        repeated = False
        while active := {s: min(q.left, chunk) for s, q in self.sequences.items() if len(q.output) < num_tokens}:
            steady = repeated and all(n == 1 for n in active.values()) and list(active) == self._last
            self.step(None if steady else active)
            repeated = True
        return {slot: sequence.output for slot, sequence in self.sequences.items()}
