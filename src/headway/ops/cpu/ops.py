"""The Ops port on the C++ kernels, one operation at a time (models with a program use headway.ops.cpu.program)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headway.errors import ConfigError
from headway.ops.cpu import abi
from headway.ops.cpu.comm import SharedComm
from headway.ops.cpu.linear import CODE, CpuLinear
from headway.ops.cpu.memory import Arena, huge_memory
from headway.ops.cpu.program import CpuProgramBuilder
from headway.ops.port import Activation, AttentionMetadata
from headway.ops.program import LinearMode, NormKind
from headway.ops.reference import ReferenceOps

_QUANTISATIONS = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 8}  # csrc/abi.h, Quant: blocks of 32


@dataclass(slots=True)
class CpuKVCache:
    """All layers in one allocation; ``layout`` is what C++ reads."""

    num_blocks: int
    block_size: int
    storage: Tensor
    layout: abi.KvLayout

    @property
    def nbytes(self) -> int:
        return self.storage.numel()

    def tensors(self) -> list[Tensor]:
        return [self.storage]


class CpuOps(ReferenceOps):
    """What is not overridden here runs in plain torch (encoder attention, rotary in op-by-op models)."""

    name = "cpu"

    def __init__(self, threads: int, isa: str = "auto") -> None:
        kernels = abi.find_kernels(isa)
        if kernels is None:
            raise ConfigError("isa", isa, "this CPU or this build has no such kernels")
        self.kernels, self.threads = kernels, threads
        self.isa: str = kernels.name.decode()
        self._arena = Arena()

    @property
    def description(self) -> str:
        return f"{self.name} ({self.isa})"

    def pack_linear(
        self,
        weight_NK: Tensor,
        bias_N: Tensor | None = None,
        *,
        dtype: torch.dtype,
        quantization: str | None = None,
        gated: bool = False,
    ) -> CpuLinear:
        return CpuLinear(self.kernels, self.threads, self._arena, weight_NK, bias_N, dtype, quantization, gated)

    def dequantise(self, quantisation: str, blocks: NDArray[np.uint8], out: Tensor) -> bool:
        if quantisation not in _QUANTISATIONS or out.dtype not in (torch.bfloat16, torch.float32):
            return False
        kind = _QUANTISATIONS[quantisation]
        self.kernels.dequantise(
            blocks.ctypes.data, kind, out.numel() // 32, CODE[out.dtype], out.data_ptr(), self.threads
        )
        return True

    def linear(self, x_TK: Tensor, weight: CpuLinear, *, activation: Activation | None = None) -> Tensor:
        out = x_TK.new_empty(len(x_TK), weight.struct.panels * 32)
        self._linear(x_TK, weight, LinearMode.STORE, activation, out)
        return out[:, : weight.out_features]

    def linear_add(self, x_TK: Tensor, weight: CpuLinear, residual_TN: Tensor) -> None:
        if weight.out_features % 32 or not residual_TN.is_contiguous():
            whole = residual_TN.new_empty(len(x_TK), weight.struct.panels * 32)  # float32: not rounded on the way
            self._linear(x_TK, weight, LinearMode.SET, None, whole)
            residual_TN += whole[:, : weight.out_features]
        else:
            self._linear(x_TK, weight, LinearMode.ADD, None, residual_TN)

    def gated_linear(self, x_TK: Tensor, weight: CpuLinear, activation: Activation) -> Tensor:
        out = x_TK.new_empty(len(x_TK), weight.struct.panels * 16)
        self._linear(x_TK, weight, LinearMode.GATED, activation, out)
        return out[:, : weight.out_features // 2]

    def _linear(self, x: Tensor, w: CpuLinear, mode: int, activation: Activation | None, out: Tensor) -> None:
        x = _padded(x, w)
        self.kernels.linear(
            ctypes.byref(w.struct), x.data_ptr(), x.stride(0), len(x), CODE[x.dtype], mode,
            abi.ACTIVATIONS[activation], out.data_ptr(), out.stride(0), self.threads,
        )  # fmt: skip

    def rms_norm(self, x_TK: Tensor, weight_K: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        return self._norm(x_TK, NormKind.RMS, weight_K, None, eps, dtype)

    def layer_norm(self, x_TK: Tensor, weight_K: Tensor, bias_K: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        return self._norm(x_TK, NormKind.LAYER, weight_K, bias_K, eps, dtype)

    def _norm(
        self, x: Tensor, kind: int, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> Tensor:
        x = x.float().contiguous()
        out = torch.empty(x.shape, dtype=dtype)
        bias_ptr = None if bias is None else bias.data_ptr()
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        self.kernels.norm(
            x.data_ptr(), width, rows, width, kind, weight.data_ptr(), bias_ptr, eps, CODE[dtype], out.data_ptr(),
            width, self.threads,
        )  # fmt: skip
        return out

    def allocate_kv(
        self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> CpuKVCache:
        if not supports_paged(block_size, head_dim, dtype):
            return super().allocate_kv(num_layers, num_blocks, block_size, num_kv_heads, head_dim, dtype)  # type: ignore[return-value]
        layer_stride = num_blocks * block_size * num_kv_heads * head_dim * 2 * dtype.itemsize
        storage = huge_memory(num_layers * layer_stride)
        layout = abi.KvLayout(
            storage.data_ptr(), layer_stride, num_blocks, block_size, num_kv_heads, head_dim, CODE[dtype]
        )
        return CpuKVCache(num_blocks, block_size, storage, layout)

    def write_kv(self, kv: CpuKVCache, layer: int, k_TGD: Tensor, v_TGD: Tensor, slot_mapping_T: Tensor) -> None:
        if not isinstance(kv, CpuKVCache):
            super().write_kv(kv, layer, k_TGD, v_TGD, slot_mapping_T)
            return
        k, v = _rows(k_TGD), _rows(v_TGD)
        self.kernels.write_kv(
            ctypes.byref(kv.layout), layer, k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0),
            slot_mapping_T.data_ptr(), len(k),
        )  # fmt: skip

    def attention(
        self, kv: CpuKVCache, layer: int, q_THD: Tensor, meta: AttentionMetadata, *, scale: float, window: int | None
    ) -> Tensor:
        if not isinstance(kv, CpuKVCache):
            return super().attention(kv, layer, q_THD, meta, scale=scale, window=window)
        q = _rows(q_THD)
        out = torch.empty(q_THD.shape, dtype=q.dtype)
        runs = abi.Runs(
            len(meta.context_len), len(q), meta.query_start.data_ptr(), meta.context_len.data_ptr(),
            meta.block_table.data_ptr(), None, meta.block_table.stride(0),
        )  # fmt: skip
        self.kernels.attention(
            ctypes.byref(kv.layout), layer, ctypes.byref(runs), q_THD.shape[1], q.data_ptr(), q.stride(0),
            out.data_ptr(), q_THD.shape[1] * q_THD.shape[2], scale, window or 0, self.threads,
        )  # fmt: skip
        return out

    def program_builder(self, kv: object, comm: object = None) -> CpuProgramBuilder | None:
        if not isinstance(kv, CpuKVCache) or not isinstance(comm, SharedComm | None):
            return None
        return CpuProgramBuilder(self.kernels, self.threads, self._arena, kv, comm)


def supports_paged(block_size: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the paged kernels take this geometry; plain torch does otherwise."""
    return block_size % 16 == 0 and head_dim % 16 == 0 and head_dim <= 256 and dtype in (torch.float32, torch.bfloat16)


def _rows(x_THD: Tensor) -> Tensor:
    """Heads and dimensions contiguous, whatever the stride between tokens."""
    _, heads, dim = x_THD.shape
    if x_THD.stride(2) == 1 and x_THD.stride(1) == dim and heads * dim <= x_THD.stride(0):
        return x_THD
    return x_THD.contiguous()


def _padded(x_TK: Tensor, w: CpuLinear) -> Tensor:
    """Rows as the kernel reads them: whole words."""
    if x_TK.stride(1) == 1 and x_TK.shape[1] % 2 == 0 and x_TK.stride(0) % 2 == 0 and x_TK.stride(0) >= x_TK.shape[1]:
        return x_TK
    padded = x_TK.new_zeros(len(x_TK), -(-x_TK.shape[1] // 2) * 2)
    padded[:, : x_TK.shape[1]] = x_TK
    return padded
