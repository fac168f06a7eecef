"""A decoder's step as a flat list of kernel calls that C++ walks in one parallel region, without the GIL.

Buffers of a step (csrc/abi.h, Buffer): X float32 residual [T, hidden]; H normed activations; QKV; ATTN; ACT (gated
activations); ROWS (final hidden states of the rows that want a token). Rows are padded to whole vectors, and away from
multiples of 4096 bytes, where a tile's rows would share one set of the cache.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headway.ops.cpu import abi
from headway.ops.cpu.linear import CODE, CpuLinear
from headway.ops.cpu.memory import Arena
from headway.ops.program import Buffer, LinearMode, NormKind

if TYPE_CHECKING:
    from headway.ops.cpu.ops import CpuKVCache
    from headway.ops.port import Activation

ARGMAX, SAMPLE, LOGITS, HIDDEN = 0, 1, 2, 3  # what a row wants (csrc/abi.h, Step)


class CpuProgramBuilder:
    """Collects operations (see headway.ops.program); ``finish`` allocates the buffers."""

    def __init__(self, kernels: abi.Kernels, threads: int, arena: Arena, kv: CpuKVCache) -> None:
        self._kernels, self._threads, self._arena, self._kv = kernels, threads, arena, kv
        self._ops: list[abi.Op] = []
        self._keep: list[object] = []
        self._widths = [0] * 6

    def embed(self, source: CpuLinear | Tensor) -> None:
        tied = isinstance(source, CpuLinear)
        width = source.in_features if tied else source.shape[1]
        op = self._op(abi.OP_EMBED, dst=Buffer.X, width=width)
        op.linear = self._linear(source) if tied else None
        op.table = None if tied else self._tensor(source)
        self._widen(Buffer.X, width)

    def add_positions(self, positions: Tensor, offset: int) -> None:
        op = self._op(abi.OP_EMBED, dst=Buffer.X, width=positions.shape[1], position_offset=offset)
        op.positions = self._tensor(positions)

    def norm(
        self,
        kind: NormKind,
        width: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 0.0,
        *,
        keep: bool = False,
        sampled_rows: bool = False,
    ) -> None:
        flags = abi.NORM_KEEP * keep | abi.NORM_SAMPLED_ROWS * sampled_rows
        dst = Buffer.ROWS if sampled_rows else Buffer.H
        op = self._op(abi.OP_NORM, src=Buffer.X, dst=dst, mode=kind, flags=flags, width=width, eps=eps)
        op.weight, op.bias = self._tensor(weight), self._tensor(bias)
        self._widen(dst, width)

    def linear(
        self, src: Buffer, dst: Buffer, weight: CpuLinear, mode: LinearMode, activation: Activation | None = None
    ) -> None:
        op = self._op(abi.OP_LINEAR, src=src, dst=dst, mode=mode, act=abi.ACTIVATIONS[activation])
        op.linear = self._linear(weight)
        self._widen(dst, weight.struct.panels * (16 if weight.gated else 32))

    def rotary_kv(self, layer: int, q_norm: Tensor | None, k_norm: Tensor | None, eps: float) -> None:
        op = self._op(abi.OP_ROTARY_KV, layer=layer, eps=eps)
        op.weight, op.bias = self._tensor(q_norm), self._tensor(k_norm)

    def attention(self, layer: int) -> None:
        self._op(abi.OP_ATTENTION, layer=layer)

    def head(self, src: Buffer, weight: CpuLinear) -> None:
        self._op(abi.OP_HEAD, src=src).linear = self._linear(weight)
        self._vocab = weight.out_features

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
    ) -> CpuProgram:
        self._widen(Buffer.ATTN, num_heads * self._kv.layout.head_dim)
        self._keep.append(self._kv)
        ops = (abi.Op * len(self._ops))(*self._ops)
        strides = [_stride(w, 4 if i == Buffer.X else dtype.itemsize) for i, w in enumerate(self._widths)]
        rows = [max_runs if i == Buffer.ROWS else max_tokens for i in range(6)]
        types = [torch.float32 if i == Buffer.X else dtype for i in range(6)]
        buffers = [self._arena.take(r * s, t).view(r, s) for r, s, t in zip(rows, strides, types, strict=True)]
        logits = torch.empty(max_runs, -(-self._vocab // 32) * 32)
        scratch = torch.zeros(8 * (max_tokens + max_runs) + 64, dtype=torch.int32)
        program = abi.Program(
            ops=ops, num_ops=len(ops), kv=self._kv.layout, num_heads=num_heads,
            rotary_dim=0 if cos_sin is None else cos_sin.shape[1], cos_sin=self._tensor(cos_sin),
            attention_scale=scale, window=window or 0, dtype=CODE[dtype], threads=self._threads,
            buffers=(ctypes.c_void_p * 6)(*(b.data_ptr() for b in buffers)), strides=(ctypes.c_int64 * 6)(*strides),
            logits=logits.data_ptr(), logits_stride=logits.shape[1], vocab=self._vocab, max_tokens=max_tokens,
            max_rows=max_runs, scratch=scratch.data_ptr(), max_runs=max_runs,
        )  # fmt: skip
        self._keep += [ops, scratch, *buffers]
        return CpuProgram(self._kernels, program, logits, buffers, self._keep)

    def _op(self, code: int, *, src: int = 0, dst: int = 0, **fields: Any) -> abi.Op:
        op = abi.Op(code=code, src=src, dst=dst, **fields)
        self._ops.append(op)
        return op

    def _linear(self, weight: CpuLinear) -> int:
        self._keep.append(weight)
        return ctypes.addressof(weight.struct)

    def _tensor(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        assert tensor.is_contiguous()
        self._keep.append(tensor)
        return tensor.data_ptr()

    def _widen(self, buffer: int, width: int) -> None:
        self._widths[buffer] = max(self._widths[buffer], width)


class CpuProgram:
    """A compiled step over one KV cache (the Program of headway.worker.program)."""

    def __init__(
        self,
        kernels: abi.Kernels,
        struct: abi.Program,
        logits: Tensor,
        buffers: list[Tensor],
        keep: list[object],
    ) -> None:
        self._step, self._struct, self._keep = kernels.step, struct, keep
        self._logits: NDArray[np.float32] = logits.numpy()
        self._hidden, self._logits_tensor = buffers[Buffer.ROWS], logits
        self._token = np.zeros(len(self._logits), np.int32)
        self._batch: abi.Batch | None = None
        self._bound: object = None

    def run(
        self,
        batch: Any,
        run_slots: NDArray[np.int32],
        run_tokens: NDArray[np.int32],
        rows: NDArray[np.int32],
        want: NDArray[np.int32],
    ) -> NDArray[np.int32]:
        """Runs the step. rows: indices into runs; want: int32 per row (ARGMAX, SAMPLE, LOGITS, HIDDEN).

        Returns the chosen token of each row (meaningless for LOGITS and HIDDEN), valid until the next run.
        """
        if self._bound is not batch:
            self._bind(batch)
        token = self._token[: len(rows)]
        step = abi.Step(
            len(run_slots), run_slots.ctypes.data, run_tokens.ctypes.data, len(rows), rows.ctypes.data,
            want.ctypes.data, token.ctypes.data,
        )  # fmt: skip
        self._step(ctypes.byref(self._struct), ctypes.byref(self._batch), ctypes.byref(step))
        return token

    def logits(self, row: int) -> NDArray[np.float32]:
        """float32 [vocab] of a row that wanted LOGITS, valid until the next run."""
        return self._logits[row, : self._struct.vocab]

    def hidden(self, width: int) -> Tensor:
        """Final hidden states of the rows [rows, width], valid until the next run."""
        return self._hidden[:, :width]

    def _bind(self, batch: Any) -> None:
        at = lambda name: getattr(batch, name).ctypes.data  # noqa: E731
        self._batch = abi.Batch(
            at("tokens"), batch.tokens.shape[1], at("computed"), at("length"), at("prompt_len"), at("block_table"),
            batch.block_table.shape[1], at("temperature"), at("top_p"), at("min_p"), at("top_k"), at("seed"),
        )  # fmt: skip
        self._bound = batch


def _stride(width: int, itemsize: int) -> int:
    stride = -(-max(width, 1) // 64) * 64
    return stride + 64 if stride * itemsize % 4096 == 0 else stride
