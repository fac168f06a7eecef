"""Ranks that hold parts of a model compute what one rank with all of it does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headway.models.spec import DecoderSpec, Shard

Make = Callable[..., Any]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


class ThreadComm:
    """Ranks that are threads of this process, meeting at a barrier."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self._rank, self._board, self._barrier = rank, board, barrier

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._board[self._rank] = x.clone()
        self._barrier.wait(20)
        everyone = list(self._board)
        self._barrier.wait(20)
        return everyone

    def all_reduce(self, x: torch.Tensor) -> None:
        x.copy_(torch.stack(self._exchange(x)).sum(0))


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("llama", 2), ("llama", 5), ("llama", 6), ("llama-tied-biased", 4), ("qwen2", 2), ("qwen3", 2), ("opt", 3),
        ("opt-350m", 2), ("gpt2", 4),
    ],
)  # fmt: skip
def test_tensor_parallel_ranks_agree_with_one(
    name: str, ranks: int, checkpoint: Make, load: Make, paged: Make, prompts: list[list[int]]
) -> None:
    _, path = checkpoint(name)
    assert_ranks_agree_with_one(path, ranks, load, paged, prompts)


def assert_ranks_agree_with_one(path: Path, ranks: int, load: Make, paged: Make, prompts: list[list[int]]) -> None:
    counts = {seq: len(tokens) for seq, tokens in enumerate(prompts)}
    board: list[Any] = [None] * ranks
    barrier = threading.Barrier(ranks)

    def one(rank: int) -> dict[int, torch.Tensor]:
        shard = Shard(tensor_rank=rank, tensor_size=ranks)
        return paged(load(path, shard, ThreadComm(rank, board, barrier)), prompts).logits(counts)

    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(one, range(ranks)))
    whole = paged(load(path), prompts).logits(counts)
    for logits in found:
        for seq in counts:
            torch.testing.assert_close(logits[seq], whole[seq], **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "ranks", "changes"),
    [
        ("opt", 2, {"hidden_size": 96, "num_attention_heads": 3}),
        ("qwen3", 4, {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 16}),
    ],
)
def test_ranks_that_own_half_a_head_agree_with_one(
    name: str, ranks: int, changes: dict[str, int], checkpoint: Make, load: Make, paged: Make, prompts: list[list[int]]
) -> None:
    _, path = checkpoint(name, **changes)
    assert_ranks_agree_with_one(path, ranks, load, paged, prompts)


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt-350m", "gpt2"])
def test_pipeline_stages_in_turn_are_the_whole(
    name: str, checkpoint: Make, load: Make, paged: Make, prompts: list[list[int]]
) -> None:
    _, path = checkpoint(name)

    class Stages:
        """The stages of one process in turn, in the shape of a model."""

        def __init__(self) -> None:
            self.stages = [load(path, Shard(pipeline_rank=rank, pipeline_size=2)) for rank in range(2)]
            self.logits = self.stages[-1].logits

        def allocate_kv(self, num_blocks: int, block_size: int) -> list[Any]:
            return [stage.allocate_kv(num_blocks, block_size) for stage in self.stages]

        def forward(self, ids: torch.Tensor, meta: Any, kv: list[Any]) -> torch.Tensor:
            x = self.stages[0].embed_tokens(ids, meta.positions)
            for stage, cache in zip(self.stages, kv, strict=True):
                stage.run_layers(x, meta, cache)
            return self.stages[-1].finish(x)

    stages = Stages()
    assert [len(stage.layers) for stage in stages.stages] == [2, 1]
    assert stages.stages[0].head is None
    assert stages.stages[1].embed is None
    counts = {seq: len(tokens) for seq, tokens in enumerate(prompts)}
    found, whole = paged(stages, prompts).logits(counts), paged(load(path), prompts).logits(counts)
    for seq in counts:
        torch.testing.assert_close(found[seq], whole[seq], **TOLERANCE)


def test_ranks_share_the_weights(checkpoint: Make, load: Make) -> None:
    _, path = checkpoint("llama")
    comm = ThreadComm(0, [None], threading.Barrier(1))
    part = load(path, Shard(tensor_rank=0, tensor_size=2), comm)
    assert part.weights_bytes < 0.55 * load(path).weights_bytes


@given(num_kv_heads=st.integers(1, 12), group=st.integers(1, 8), ranks=st.integers(1, 16), width=st.integers(16, 3000))
def test_every_query_head_and_column_is_on_one_rank(num_kv_heads: int, group: int, ranks: int, width: int) -> None:
    num_heads = num_kv_heads * group
    ranks = min(ranks, num_heads)
    shards = [Shard(tensor_rank=rank, tensor_size=ranks) for rank in range(ranks)]
    assert [h for s in shards for h in s.heads(num_heads, num_kv_heads)] == list(range(num_heads))
    assert [c for s in shards for c in s.width(width)] == list(range(width))
    for shard in shards:
        heads, kv_heads = shard.heads(num_heads, num_kv_heads), shard.kv_heads(num_kv_heads)
        assert {h // group for h in heads} == set(kv_heads)
        assert len(heads) % len(kv_heads) == 0


@given(pairs=st.integers(1, 3), odd=st.integers(1, 5), group=st.integers(1, 8), head_dim=st.sampled_from([32, 64, 96]))
def test_half_a_head_makes_shares_equal(pairs: int, odd: int, group: int, head_dim: int) -> None:
    ranks, num_kv_heads = 2 * pairs, pairs * (2 * odd + 1)
    spec = DecoderSpec(
        vocab_size=1,
        hidden_size=1,
        num_layers=1,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=1,
    )
    columns, inputs = (num_kv_heads * (group + 2)) * head_dim, num_kv_heads * group * head_dim
    shards = [Shard(tensor_rank=rank, tensor_size=ranks) for rank in range(ranks)]
    assert [c for s in shards for c in s.qkv_columns(spec)] == list(range(columns))
    for shard in shards:
        mine, heads = shard.width(inputs), shard.attended_heads(spec)
        assert shard.halves_heads(spec)
        assert len(mine) * ranks == inputs
        assert abs(len(shard.qkv_columns(spec)) - columns / ranks) <= 32
        assert len(shard.cached_heads(spec)) == -(-num_kv_heads // ranks)
        assert {column // head_dim for column in mine} <= set(heads)
        assert {h // group for h in heads} == set(shard.cached_heads(spec))


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_encoders_on_several_ranks_agree_with_one(name: str, checkpoint: Make, load: Make) -> None:
    _, path = checkpoint(name, "Model")
    board: list[Any] = [None] * 3
    barrier = threading.Barrier(3)
    ids, types = torch.arange(5, 30), torch.zeros(25, dtype=torch.int64)
    starts = torch.tensor([0, 7, 25], dtype=torch.int32)

    def one(rank: int) -> torch.Tensor:
        model = load(path, Shard(tensor_rank=rank, tensor_size=3), ThreadComm(rank, board, barrier))
        return model.forward(ids, types, starts, 18)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(one, range(3)))
    whole = load(path).forward(ids, types, starts, 18)
    for hidden in found:
        torch.testing.assert_close(hidden, whole, **TOLERANCE)
