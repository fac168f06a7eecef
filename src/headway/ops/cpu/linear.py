"""Weights in the layout of the dot-product instructions (csrc/abi.h, Linear)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from headway.ops.cpu import abi
from headway.ops.cpu.memory import Arena

ELEMENTS_PER_WORD = {abi.F32: 1, abi.BF16: 2, abi.INT8: 4}
CODE = {torch.float32: abi.F32, torch.bfloat16: abi.BF16, torch.float16: abi.F16}


class CpuLinear:
    """A packed weight; ``struct`` is what C++ reads. Holds one copy of the weight, in its own layout."""

    def __init__(
        self,
        kernels: abi.Kernels,
        threads: int,
        arena: Arena,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        dtype: torch.dtype,
        quantization: str | None,
        gated: bool,
    ) -> None:
        n, k = weight_NK.shape
        self.out_features, self.in_features, self.gated = n, k, gated
        self._kernels, self._threads = kernels, threads
        code = abi.INT8 if quantization == "int8" else CODE[dtype]
        panels = -(-n // 2 // 16) if gated else -(-n // 32)
        # k is padded as activation rows are (headway.ops.cpu.program): to whole groups of 64 for int8.
        groups = -(-k // 64) * 16 if code == abi.INT8 else -(-k // ELEMENTS_PER_WORD[code])
        self._words = arena.take(panels * groups * 32, torch.int32)
        self._scale = torch.zeros(2, panels * 32) if code == abi.INT8 else None
        self._bias = None if bias_N is None else torch.zeros(panels, 32)
        self.struct = abi.Linear(
            self._words.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            None if self._scale is None else self._scale[0].data_ptr(),
            None if self._scale is None else self._scale[1].data_ptr(),
            n, k, panels, groups, code, int(gated),
        )  # fmt: skip
        self.fill(weight_NK, bias_N)

    def fill(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        if self._bias is not None and bias_N is not None:
            self._fill_bias(self._bias, bias_N.float())
        source = weight_NK if weight_NK.dtype in CODE and weight_NK.stride(1) == 1 else weight_NK.float().contiguous()
        scale = (None, None) if self._scale is None else (self._scale[0].data_ptr(), self._scale[1].data_ptr())
        self._kernels.pack(self.struct, source.data_ptr(), CODE[source.dtype], source.stride(0), *scale, self._threads)

    def tensors(self) -> list[Tensor]:
        return [t for t in (self._words, self._scale, self._bias) if t is not None]

    def _fill_bias(self, packed: Tensor, bias_N: Tensor) -> None:
        if not self.gated:
            packed.view(-1)[: len(bias_N)] = bias_N
            return
        for half, values in zip((packed[:, :16], packed[:, 16:]), bias_N.chunk(2), strict=True):
            flat = torch.zeros(half.numel())
            flat[: len(values)] = values
            half.copy_(flat.view(-1, 16))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors())

    def rows(self, ids_T: Tensor) -> Tensor:
        """float32 [T, K]."""
        ids = ids_T.to(torch.int32).contiguous()
        out = torch.empty(len(ids), self.in_features)
        self._kernels.rows(ctypes.byref(self.struct), ids.data_ptr(), len(ids), out.data_ptr(), self.in_features)
        return out
