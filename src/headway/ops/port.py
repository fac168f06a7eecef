"""The port behind which kernels live, and the data they share.

Shape suffixes: T tokens of the step, N output features, K input features, H query heads, G key/value heads,
D head dimension, R sequences (runs) in the step, B blocks in the cache, S tokens a block.

An implementation is stateless but for what it packs and allocates. Linear outputs are in the compute dtype; the
residual stream (x) is float32 between layers, so that bfloat16 errors do not add up over depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from headway.ops.program import ProgramBuilder

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


class PackedLinear(Protocol):
    """A weight in the layout its implementation wants. out_features, in_features: N, K."""

    out_features: int
    in_features: int

    def rows(self, ids_T: Tensor) -> Tensor:
        """Rows of the weight [T, K] (embedding look-up on a tied head)."""
        ...

    def fill(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        """Packs other values, of the shapes that it was made of, into the same memory."""
        ...

    def tensors(self) -> list[Tensor]:
        """Its memory."""
        ...


@dataclass(slots=True)
class AttentionMetadata:
    """Where the step's tokens live. All int32 tensors on the device.

    query_start: [R+1] offsets of each run's tokens in T. context_len: [R] tokens in the cache once this step is
    written (the run's last position + 1). block_table: [R, max blocks]. positions, slot_mapping: [T]; slot_mapping is
    block * S + offset. max_query, max_context: host ints.
    """

    query_start: Tensor
    context_len: Tensor
    block_table: Tensor
    positions: Tensor
    slot_mapping: Tensor
    max_query: int
    max_context: int


class KVCache(Protocol):
    """Keys and values of all layers of this rank, paged. The layout belongs to the implementation."""

    num_blocks: int
    block_size: int
    nbytes: int

    def tensors(self) -> list[Tensor]:
        """Its memory."""
        ...


class Ops(Protocol):
    """One implementation of the kernels.

    description: what runs, for people: the name, and the instruction set where there is a choice.
    """

    name: str

    @property
    def description(self) -> str: ...

    def pack_linear(
        self,
        weight_NK: Tensor,
        bias_N: Tensor | None = None,
        *,
        dtype: torch.dtype,
        quantization: str | None = None,
        gated: bool = False,
    ) -> PackedLinear:
        """Copies a weight (possibly memory-mapped, any float dtype) into its own layout.

        gated: the rows are gate then up, N/2 each; such a weight is used with gated_linear only.
        """
        ...

    def dequantise(self, quantisation: str, blocks: NDArray[np.uint8], out: Tensor) -> bool:
        """uint8 blocks of a GGUF quantisation ("Q4_1", ...) to contiguous bfloat16 or float32; whether it could."""
        ...

    def linear(self, x_TK: Tensor, weight: PackedLinear, *, activation: Activation | None = None) -> Tensor:
        """activation(x @ W.T + b) in x's dtype."""
        ...

    def linear_add(self, x_TK: Tensor, weight: PackedLinear, residual_TN: Tensor) -> None:
        """residual += x @ W.T + b, in place, residual float32."""
        ...

    def gated_linear(self, x_TK: Tensor, weight: PackedLinear, activation: Activation) -> Tensor:
        """activation(gate) * up -> [T, N/2] in x's dtype."""
        ...

    def rms_norm(self, x_TK: Tensor, weight_K: Tensor, eps: float, dtype: torch.dtype) -> Tensor: ...

    def layer_norm(self, x_TK: Tensor, weight_K: Tensor, bias_K: Tensor, eps: float, dtype: torch.dtype) -> Tensor: ...

    def allocate_kv(
        self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> KVCache:
        """Memory is reserved here and touched (made resident) only when blocks are first written."""
        ...

    def rotary_(self, q_THD: Tensor, k_TGD: Tensor, positions_T: Tensor, cos_sin_PD: Tensor) -> None:
        """Rotates in place; cos_sin: [positions, rotary dim] float32, cos then sin, rotary dim/2 each."""
        ...

    def write_kv(self, kv: KVCache, layer: int, k_TGD: Tensor, v_TGD: Tensor, slot_mapping_T: Tensor) -> None: ...

    def attention(
        self, kv: KVCache, layer: int, q_THD: Tensor, meta: AttentionMetadata, *, scale: float, window: int | None
    ) -> Tensor:
        """Causal attention of the step's tokens over the paged cache -> [T, H, D]."""
        ...

    def encoder_attention(
        self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, query_start: Tensor, max_query: int, *, scale: float
    ) -> Tensor:
        """Bidirectional attention inside each of R packed sequences; no cache."""
        ...

    def program_builder(self, kv: KVCache, comm: object = None) -> ProgramBuilder | None:
        """A builder that compiles a whole step over this cache into one native call, or None where there is none.

        comm: the Comm of several tensor parallel ranks.
        """
        ...
