"""What models are made of: packed linears and norms with their weights, no forward pass of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from headway.models.port import Comm
    from headway.models.spec import RotarySpec
    from headway.ops.port import Ops, PackedLinear


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm, or with a bias a layer norm. weight, bias: float32 [K]."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, ops: Ops, x_TK: Tensor, dtype: torch.dtype) -> Tensor:
        if self.bias is None:
            return ops.rms_norm(x_TK, self.weight, self.eps, dtype)
        return ops.layer_norm(x_TK, self.weight, self.bias, self.eps, dtype)


@dataclass(frozen=True, slots=True)
class EmbeddingTable:
    """An embedding that is no head. weight: [V, K] in the compute dtype."""

    weight: Tensor

    def rows(self, ids_T: Tensor) -> Tensor:
        return self.weight[ids_T]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """qkv: rows of queries, keys, values. Either gate_up (gate rows, then up rows) or up is set."""

    attn_norm: Norm
    qkv: PackedLinear
    q_norm: Norm | None
    k_norm: Norm | None
    o: PackedLinear
    mlp_norm: Norm
    gate_up: PackedLinear | None
    up: PackedLinear | None
    down: PackedLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """One rank's weights. The embedding is on the first pipeline rank, final norm, head and score on the last.

    embed: the head itself where they are tied. positions: float32 [positions, K]. score: the classification head.
    """

    layers: tuple[DecoderLayer, ...]
    embed: PackedLinear | EmbeddingTable | None
    positions: Tensor | None
    project_in: PackedLinear | None
    project_out: PackedLinear | None
    final_norm: Norm | None
    head: PackedLinear | None
    score: PackedLinear | None
    nbytes: int


def add_linear(ops: Ops, comm: Comm | None, y: Tensor, weight: PackedLinear, x_TK: Tensor) -> None:
    """x += y @ W.T + b, summed over the tensor parallel ranks."""
    if comm is None:
        ops.linear_add(y, weight, x_TK)
        return
    part = torch.zeros_like(x_TK)  # float32: rounded partial sums would differ from a single rank's
    ops.linear_add(y, weight, part)
    comm.all_reduce(part)
    x_TK += part


def cos_sin_table(rotary: RotarySpec, positions: int) -> Tensor:
    """float32 [positions, dim]: cosines, then sines."""
    inv_freq = torch.tensor(rotary.inv_freq, dtype=torch.float32)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * inv_freq
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * rotary.attention_scale
