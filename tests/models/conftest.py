"""Tiny random checkpoints, and a driver that steps a model over a paged cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.checkpoints import make_checkpoint

from headway.config.settings import ModelConfig
from headway.models.registry import load_model
from headway.ops import get_ops
from headway.ops.port import AttentionMetadata


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """checkpoint(name, head="ForCausalLM", **config) -> (transformers model, its directory)."""

    def make(name: str, head: str = "ForCausalLM", **changes: Any) -> tuple[Any, Path]:
        return make_checkpoint(name, head, tmp_path, **changes)

    return make


@pytest.fixture
def load() -> Callable[..., Any]:
    """load(path, **ModelConfig fields) -> the model, float32 on the reference kernels."""

    def load_one(path: Path, shard: Any = None, comm: Any = None, **fields: Any) -> Any:
        settings = {"dtype": "float32", **fields}
        config = ModelConfig(path=str(path), served_model_name="m", **settings)
        return load_model(config, get_ops("reference"), shard, comm)

    return load_one


class PagedRun:
    """Sequences whose blocks lie scattered and interleaved in the cache; step() runs the next tokens of some."""

    def __init__(self, model: Any, sequences: list[list[int]], block_size: int = 4) -> None:
        self.model, self.sequences, self.block_size = model, sequences, block_size
        self.kv = model.allocate_kv(128, block_size)
        self.computed = [0] * len(sequences)
        self.blocks: list[list[int]] = [[] for _ in sequences]
        self.free = list(range(1, 128))[::-1]

    def step(self, counts: dict[int, int]) -> dict[int, torch.Tensor]:
        """{sequence: tokens to run} -> {sequence: hidden states of those tokens}."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for seq, count in counts.items():
            span = range(self.computed[seq], self.computed[seq] + count)
            while len(self.blocks[seq]) * self.block_size < span.stop:
                self.blocks[seq].append(self.free.pop())
            ids += self.sequences[seq][span.start : span.stop]
            positions += span
            slots += [self.blocks[seq][p // self.block_size] * self.block_size + p % self.block_size for p in span]
            self.computed[seq] = span.stop
            starts.append(len(ids))
        meta = self._meta(counts, starts, positions, slots)
        with torch.inference_mode():
            hidden = self.model.forward(torch.tensor(ids, dtype=torch.int32), meta, self.kv)
        return {seq: hidden[a:b] for seq, a, b in zip(counts, starts, starts[1:], strict=False)}

    def _meta(
        self, counts: dict[int, int], starts: list[int], positions: list[int], slots: list[int]
    ) -> AttentionMetadata:
        context = [self.computed[seq] for seq in counts]
        width = max(len(self.blocks[seq]) for seq in counts)
        table = [self.blocks[seq] + [0] * (width - len(self.blocks[seq])) for seq in counts]

        def int32(values: Any) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32)

        return AttentionMetadata(
            query_start=int32(starts),
            context_len=int32(context),
            block_table=int32(table),
            positions=int32(positions),
            slot_mapping=int32(slots),
            max_query=max(counts.values()),
            max_context=max(context),
        )

    def logits(self, counts: dict[int, int]) -> dict[int, torch.Tensor]:
        return {seq: self.model.logits(hidden) for seq, hidden in self.step(counts).items()}

    def greedy(self, num_tokens: int) -> list[list[int]]:
        """All sequences together, a whole prefill and then decode steps; returns what they generated."""
        prompts = [len(tokens) for tokens in self.sequences]
        counts = dict(enumerate(prompts))
        for _ in range(num_tokens):
            for seq, logits in self.logits(counts).items():
                self.sequences[seq].append(int(logits[-1].argmax()))
            counts = dict.fromkeys(counts, 1)
        return [tokens[prompt:] for tokens, prompt in zip(self.sequences, prompts, strict=True)]


@pytest.fixture
def paged() -> type[PagedRun]:
    return PagedRun


@pytest.fixture
def prompts() -> list[list[int]]:
    """Token ids of sequences of different lengths, none a special token."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 131, (n,), generator=generator).tolist() for n in (23, 1, 14, 5)]
