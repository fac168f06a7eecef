"""What a worker needs of a model, whatever the architecture. Weights are packed for one Ops at load.

Shape suffixes: T tokens of the step, K hidden size, R rows, V vocabulary, L labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from headway.messages import PoolingParams
    from headway.models.packing import Packer
    from headway.ops.port import AttentionMetadata, KVCache


class Comm(Protocol):
    """What the tensor parallel ranks of one pipeline stage say to each other."""

    def all_reduce(self, x: Tensor) -> None:
        """Sums a contiguous float32 tensor over the ranks, in place, to the same bits on each.

        Raises WorkerDied when another rank is gone.
        """
        ...


class CausalModel(Protocol):
    """A decoder: generates, and pools the last token (embedding, classification head) where asked.

    vocab_size counts the rows of the head; num_labels is 0 without a classification head. packer: puts other weights in
    the places of these; None where nothing can.
    """

    dtype: torch.dtype
    vocab_size: int
    max_positions: int
    num_labels: int
    weights_bytes: int
    packer: Packer | None

    def allocate_kv(self, num_blocks: int, block_size: int) -> KVCache: ...

    def forward(self, token_ids_T: Tensor, meta: AttentionMetadata, kv: KVCache) -> Tensor:
        """Hidden states after the final norm [T, K] in the compute dtype; writes the step's keys and values."""
        ...

    def logits(self, hidden_RK: Tensor) -> Tensor:
        """float32 [R, V]."""
        ...

    def pool(self, hidden_RK: Tensor, params: list[PoolingParams]) -> list[Tensor]:
        """One float32 vector per row: ``hidden`` is each prompt's last token. Normalisation and activation applied."""
        ...


class EncoderModel(Protocol):
    """An encoder: whole prompts in, one vector per prompt out. No cache, no chunking."""

    dtype: torch.dtype
    max_positions: int
    num_labels: int
    weights_bytes: int
    packer: Packer | None

    def forward(self, token_ids_T: Tensor, token_type_ids_T: Tensor, query_start: Tensor, max_query: int) -> Tensor:
        """Hidden states [T, K] of packed prompts; query_start: int32 [R+1]."""
        ...

    def pool(self, hidden_TK: Tensor, query_start: Tensor, params: list[PoolingParams]) -> list[Tensor]:
        """One float32 vector per prompt: pooled and normalised as the checkpoint declares, or class scores."""
        ...
