"""Plain torch: the truth that other kernels are tested against, and what runs where none of them can.

Shape suffixes as in headway.ops.port.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from headway.ops.port import Activation, AttentionMetadata, KVCache, PackedLinear


@dataclass(slots=True)
class ReferenceLinear:
    """weight: [N, K], in the compute dtype or int8. scale: float32 [N, 1], for int8 only."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def rows(self, ids_T: Tensor) -> Tensor:
        if self.scale is None:
            return self.weight[ids_T]
        return self.weight[ids_T] * self.scale[ids_T]

    def fill(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        if self.scale is None:
            self.weight.copy_(weight_NK)
        else:
            weight, scale = _to_int8(weight_NK)
            self.weight.copy_(weight)
            self.scale.copy_(scale)
        if self.bias is not None and bias_N is not None:
            self.bias.copy_(bias_N)

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.weight, self.bias, self.scale) if t is not None]

    def apply(self, x_TK: Tensor) -> Tensor:
        weight = self.weight if self.scale is None else (self.weight * self.scale).to(x_TK.dtype)
        return F.linear(x_TK, weight, self.bias)


@dataclass(slots=True)
class ReferenceKV:
    """keys, values: [layers, B, S, G, D]."""

    keys: Tensor
    values: Tensor

    @property
    def num_blocks(self) -> int:
        return self.keys.shape[1]

    @property
    def block_size(self) -> int:
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values]


class ReferenceOps:
    """Every operation in torch. int8 weights are symmetric per output row."""

    name = "reference"

    def __init__(self, *, threads: int = 1) -> None:
        torch.set_num_threads(threads)

    @property
    def description(self) -> str:
        return self.name

    def pack_linear(
        self,
        weight_NK: Tensor,
        bias_N: Tensor | None = None,
        *,
        dtype: torch.dtype,
        quantization: str | None = None,
        gated: bool = False,
    ) -> PackedLinear:
        del gated  # gate and up stay one after the other
        bias = None if bias_N is None else bias_N.to(dtype, copy=True)
        if quantization is None:
            return ReferenceLinear(weight_NK.to(dtype, copy=True).contiguous(), bias, None)
        assert quantization == "int8", quantization
        weight, scale = _to_int8(weight_NK)
        return ReferenceLinear(weight, bias, scale)

    def dequantise(self, quantisation: str, blocks: NDArray[np.uint8], out: Tensor) -> bool:
        return False

    def linear(self, x_TK: Tensor, weight: PackedLinear, *, activation: Activation | None = None) -> Tensor:
        y = cast(ReferenceLinear, weight).apply(x_TK)
        return y if activation is None else activate(y, activation)

    def linear_add(self, x_TK: Tensor, weight: PackedLinear, residual_TN: Tensor) -> None:
        residual_TN.add_(cast(ReferenceLinear, weight).apply(x_TK))

    def gated_linear(self, x_TK: Tensor, weight: PackedLinear, activation: Activation) -> Tensor:
        gate, up = cast(ReferenceLinear, weight).apply(x_TK).chunk(2, dim=-1)
        return activate(gate, activation) * up

    def rms_norm(self, x_TK: Tensor, weight_K: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x = x_TK.float()
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_K).to(dtype)

    def layer_norm(self, x_TK: Tensor, weight_K: Tensor, bias_K: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        return F.layer_norm(x_TK.float(), weight_K.shape, weight_K, bias_K, eps).to(dtype)

    def allocate_kv(
        self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> KVCache:
        shape = (num_layers, num_blocks, block_size, num_kv_heads, head_dim)
        return ReferenceKV(torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype))

    def rotary_(self, q_THD: Tensor, k_TGD: Tensor, positions_T: Tensor, cos_sin_PD: Tensor) -> None:
        cos, sin = cos_sin_PD[positions_T].unsqueeze(1).chunk(2, dim=-1)
        for x in (q_THD, k_TGD):
            rotated = x[..., : cos_sin_PD.shape[1]]
            low, high = rotated.float().chunk(2, dim=-1)
            rotated.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1))

    def write_kv(self, kv: KVCache, layer: int, k_TGD: Tensor, v_TGD: Tensor, slot_mapping_T: Tensor) -> None:
        cache = cast(ReferenceKV, kv)
        slots = slot_mapping_T.long()
        cache.keys[layer].flatten(0, 1)[slots] = k_TGD
        cache.values[layer].flatten(0, 1)[slots] = v_TGD

    def attention(
        self, kv: KVCache, layer: int, q_THD: Tensor, meta: AttentionMetadata, *, scale: float, window: int | None
    ) -> Tensor:
        """A query at position p sees keys at positions max(0, p - window + 1) .. p."""
        cache = cast(ReferenceKV, kv)
        out = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        starts, contexts = meta.query_start.tolist(), meta.context_len.tolist()
        for run, (start, end, context) in enumerate(zip(starts, starts[1:], contexts)):
            blocks = meta.block_table[run, : -(-context // cache.block_size)].long()
            keys = cache.keys[layer, blocks].flatten(0, 1)[:context]
            values = cache.values[layer, blocks].flatten(0, 1)[:context]
            mask = _causal_mask(end - start, context, window, q_THD.device)
            out[start:end] = _grouped_attention(q_THD[start:end], keys, values, mask, scale)
        return out

    def encoder_attention(
        self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, query_start: Tensor, max_query: int, *, scale: float
    ) -> Tensor:
        out = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        starts = query_start.tolist()
        for start, end in pairwise(starts):
            rows = slice(start, end)
            out[rows] = _grouped_attention(q_THD[rows], k_THD[rows], v_THD[rows], None, scale)
        return out

    def program_builder(self, kv: object, comm: object = None) -> None:
        return None


def activate(x: Tensor, activation: Activation) -> Tensor:
    match activation:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)


def _causal_mask(queries: int, context: int, window: int | None, device: torch.device) -> Tensor | None:
    """[queries, context] booleans, True where seen; None where everything is."""
    if queries == 1 and (window is None or context <= window):
        return None
    q = torch.arange(context - queries, context, device=device)[:, None]
    k = torch.arange(context, device=device)[None, :]
    return (k <= q) if window is None else (k <= q) & (k > q - window)


def _grouped_attention(q_QHD: Tensor, k_CGD: Tensor, v_CGD: Tensor, mask_QC: Tensor | None, scale: float) -> Tensor:
    """The heads of a group are folded into the query axis: bfloat16 attention of one query row is slow on CPU."""
    queries, heads, dim = q_QHD.shape
    groups = k_CGD.shape[1]
    folded = q_QHD.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).reshape(1, groups, -1, dim)
    mask = None if mask_QC is None else mask_QC.repeat(heads // groups, 1)
    keys, values = k_CGD.transpose(0, 1)[None], v_CGD.transpose(0, 1)[None]
    out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    return out.view(groups, heads // groups, queries, dim).permute(2, 0, 1, 3).reshape(queries, heads, dim)


def _to_int8(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight_NK.float()
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale).round().to(torch.int8), scale
