"""The port of whole-step programs: a model describes its step to a builder, which compiles it for its device.

A step's activations live in named buffers of T rows. X is the float32 residual stream; the others are in the compute
dtype. See headway.models.compile for the one description there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from headway.ops.port import Activation, PackedLinear


class Buffer(IntEnum):
    X = 0
    H = 1
    QKV = 2
    ATTN = 3
    ACT = 4


class LinearMode(IntEnum):
    """STORE: dst = activation(src @ W.T + b). GATED: the weight is gate and up. ADD and SET: into float32 X.

    What is added is the sum of the tensor parallel ranks' products, where there are several.
    """

    STORE = 0
    ADD = 1
    GATED = 2
    SET = 3


class NormKind(IntEnum):
    """NONE only casts."""

    NONE = 0
    RMS = 1
    LAYER = 2


@dataclass(frozen=True, slots=True)
class SharedHeads:
    """Of a rank whose linears to QKV give only some columns of its heads, and other ranks' heads too.

    It attends to key/value heads from kv_head on, of num_kv_heads. Its linears give columns from qkv_column on of all
    heads' QKV, and take those from attn_column on of its own ATTN.
    """

    kv_head: int
    num_kv_heads: int
    qkv_column: int
    attn_column: int


class ProgramBuilder(Protocol):
    """Takes the operations of a step in order; widths are in elements."""

    def embed(self, source: PackedLinear | Tensor, tokens: range) -> None:
        """Rows of a tied head, or of a table [vocab, width] in the compute dtype, to X.

        tokens: those that the source has rows of.
        """
        ...

    def add_positions(self, positions: Tensor, offset: int) -> None:
        """Learned positions [positions, width] float32, to X."""
        ...

    def norm(
        self,
        kind: NormKind,
        width: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 0.0,
        *,
        keep: bool = False,
    ) -> None:
        """X to H; keep also replaces X."""
        ...

    def linear(
        self, src: Buffer, dst: Buffer, weight: PackedLinear, mode: LinearMode, activation: Activation | None = None
    ) -> None: ...

    def share_heads(self, shared: SharedHeads) -> None:
        """Comes first, where ranks share heads."""
        ...

    def rotary_kv(self, layer: int, q_norm: Tensor | None, k_norm: Tensor | None, eps: float) -> None:
        """Norms and rotates queries and keys of QKV, and writes keys and values to the cache."""
        ...

    def attention(self, layer: int) -> None:
        """QKV to ATTN over the paged cache."""
        ...

    def keep_sampled_rows(self) -> None:
        """From here on X and ATTN hold only the rows that want a token: nothing else of the last layer is needed."""
        ...

    def head(self, src: Buffer, weight: PackedLinear, first_columns: list[int]) -> None:
        """Logits of the sampled rows, and their tokens. first_columns: of each rank, and the size of the vocabulary."""
        ...

    def finish(
        self,
        *,
        num_heads: int,
        cos_sin: Tensor | None,
        scale: float,
        window: int | None,
        dtype: torch.dtype,
        max_tokens: int,
        max_runs: int,
    ) -> Any:
        """A headway.worker.program.Program for steps of at most max_tokens tokens in max_runs runs.

        Without embed it begins with X as it stands, without head it ends with X.
        """
        ...
