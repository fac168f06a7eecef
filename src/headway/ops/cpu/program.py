"""A decoder's step as a flat list of kernel calls that C++ walks in one parallel region, without the GIL.

Rows of the buffers are padded to whole vectors, and away from
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
from headway.ops.program import Buffer, LinearMode, NormKind, SharedHeads

if TYPE_CHECKING:
    from headway.ops.cpu.comm import SharedComm
    from headway.ops.cpu.ops import CpuKVCache
    from headway.ops.port import Activation

ARGMAX, SAMPLE, LOGITS = 0, 1, 2  # what a row wants (csrc/abi.h, Step)


class CpuProgramBuilder:
    """Collects operations (see headway.ops.program); ``finish`` allocates the buffers."""

    def __init__(
        self, kernels: abi.Kernels, threads: int, arena: Arena, kv: CpuKVCache, comm: SharedComm | None
    ) -> None:
        self._kernels, self._threads, self._arena, self._kv, self._comm = kernels, threads, arena, kv, comm
        self._ops: list[abi.Op] = []
        self._keep: list[object] = []
        self._widths = [0] * abi.BUFFERS
        self._vocab_start = torch.zeros(1, dtype=torch.int64)  # without a head
        self._sampled: dict[int, int] = {}  # where a buffer's rows went that want a token
        self._shared: SharedHeads | None = None
        self._mine: dict[int, int] = {}  # the columns of a buffer that linears have, where ranks share heads

    def embed(self, source: CpuLinear | Tensor, tokens: range) -> None:
        tied = isinstance(source, CpuLinear)
        width = source.in_features if tied else source.shape[1]
        dst = abi.PART if self._comm else Buffer.X
        op = self._op(abi.OP_EMBED, dst=dst, width=width, first=tokens.start, count=len(tokens))
        op.linear = self._linear(source) if tied else None
        op.table = None if tied else self._tensor(source)
        self._widen(Buffer.X, width)
        self._all_reduce(LinearMode.SET, width)

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
    ) -> None:
        op = self._op(
            abi.OP_NORM, src=Buffer.X, dst=Buffer.H, mode=kind, flags=abi.NORM_KEEP * keep, width=width, eps=eps
        )
        op.weight, op.bias = self._tensor(weight), self._tensor(bias)
        self._widen(Buffer.H, width)

    def share_heads(self, shared: SharedHeads) -> None:
        self._shared, self._mine = shared, {Buffer.QKV: abi.MY_QKV, Buffer.ATTN: abi.MY_ATTN}

    def linear(
        self, src: Buffer, dst: Buffer, weight: CpuLinear, mode: LinearMode, activation: Activation | None = None
    ) -> None:
        shared = mode == LinearMode.ADD and self._comm is not None
        to, how = (abi.PART, LinearMode.SET) if shared else (self._mine.get(dst, dst), mode)
        source = self._mine.get(src, src)
        op = self._op(abi.OP_LINEAR, src=source, dst=to, mode=how, act=abi.ACTIVATIONS[activation])
        op.linear = self._linear(weight)
        self._widen(dst, weight.struct.panels * (16 if weight.gated else 32))
        self._widen(source, weight.in_features)
        if to == abi.MY_QKV:
            self._op(abi.OP_MEET)
        if shared:
            self._all_reduce(LinearMode.ADD, weight.out_features)

    def rotary_kv(self, layer: int, q_norm: Tensor | None, k_norm: Tensor | None, eps: float) -> None:
        op = self._op(abi.OP_ROTARY_KV, src=Buffer.QKV, layer=layer, eps=eps)
        if self._shared:
            op.src, op.first, op.count = abi.ALL_QKV, self._shared.kv_head, self._shared.num_kv_heads
        op.weight, op.bias = self._tensor(q_norm), self._tensor(k_norm)

    def attention(self, layer: int) -> None:
        self._op(abi.OP_ATTENTION, layer=layer)

    def keep_sampled_rows(self) -> None:
        attended = self._mine.get(Buffer.ATTN, Buffer.ATTN)
        for buffer, sampled in ((Buffer.X, abi.SAMPLED_X), (attended, abi.SAMPLED_ATTN)):
            self._op(abi.OP_GATHER, src=buffer, dst=sampled)
        self._sampled = {Buffer.X: abi.SAMPLED_X, attended: abi.SAMPLED_ATTN, Buffer.ATTN: abi.SAMPLED_ATTN}

    def head(self, src: Buffer, weight: CpuLinear, first_columns: list[int]) -> None:
        self._op(abi.OP_HEAD, src=src).linear = self._linear(weight)
        self._vocab_start = torch.tensor(first_columns)

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
        kv_heads, head_dim = self._kv.layout.kv_heads, self._kv.layout.head_dim
        self._widen(Buffer.ATTN, num_heads * head_dim)
        self._widen(Buffer.QKV, (num_heads + 2 * kv_heads) * head_dim)
        if self._shared:
            self._widen(abi.ALL_QKV, (num_heads // kv_heads + 2) * self._shared.num_kv_heads * head_dim)
        for buffer, sampled in self._sampled.items():
            self._widen(sampled, self._widths[buffer])
        self._widths[abi.PART] = self._widths[Buffer.X]
        self._keep.append(self._kv)
        for op in self._ops:
            if op.code == abi.OP_GATHER:
                op.width = self._widths[op.src]
        ops = (abi.Op * len(self._ops))(*self._ops)
        wide = (Buffer.X, abi.SAMPLED_X, abi.PART)
        types = [torch.float32 if i in wide else dtype for i in range(abi.BUFFERS)]
        strides = [_stride(w, t.itemsize) for w, t in zip(self._widths, types, strict=True)]
        buffers = [self._arena.take(max_tokens * s, t) for s, t in zip(strides[: abi.PART], types, strict=False)]
        addresses = [b.data_ptr() for b in buffers] + [0] * (abi.BUFFERS - abi.PART)
        vocab = int(self._vocab_start[-1])
        logits = torch.empty(max_runs, -(-vocab // 32) * 32)
        if self._comm is not None:
            best = -(-max_runs * 8 // 64) * 64
            part_bytes = max(max_tokens * strides[abi.PART] * 4, best + logits.nbytes)
            common = self._comm.reserve(part_bytes, max_tokens * strides[abi.ALL_QKV] * dtype.itemsize)
            if self._shared:
                addresses[abi.ALL_QKV] = common
                addresses[abi.MY_QKV] = common + self._shared.qkv_column * dtype.itemsize
                addresses[abi.MY_ATTN] = addresses[Buffer.ATTN] + self._shared.attn_column * dtype.itemsize
                strides[abi.MY_QKV], strides[abi.MY_ATTN] = strides[abi.ALL_QKV], strides[Buffer.ATTN]
        scratch = torch.zeros(8 * (max_tokens + max_runs) + 64, dtype=torch.int32)
        program = abi.Program(
            ops=ops,
            num_ops=len(ops),
            kv=self._kv.layout,
            num_heads=num_heads,
            rotary_dim=0 if cos_sin is None else cos_sin.shape[1],
            cos_sin=self._tensor(cos_sin),
            attention_scale=scale,
            window=window or 0,
            dtype=CODE[dtype],
            threads=self._threads,
            buffers=(ctypes.c_void_p * abi.BUFFERS)(*addresses),
            strides=(ctypes.c_int64 * abi.BUFFERS)(*strides),
            logits=logits.data_ptr(),
            logits_stride=logits.shape[1],
            vocab=vocab,
            max_tokens=max_tokens,
            max_rows=max_runs,
            scratch=scratch.data_ptr(),
            max_runs=max_runs,
            group=None if self._comm is None else ctypes.addressof(self._comm.struct),
            vocab_start=self._tensor(self._vocab_start),
        )
        self._keep += [ops, scratch, *buffers]
        return CpuProgram(self._kernels, program, logits, self._keep, self._comm)

    def _all_reduce(self, mode: LinearMode, width: int) -> None:
        if self._comm is not None:
            self._op(abi.OP_ALL_REDUCE, dst=Buffer.X, mode=mode, width=width)

    def _op(self, code: int, *, src: int = 0, dst: int = 0, **fields: Any) -> abi.Op:
        sampled = self._sampled if code != abi.OP_GATHER else {}
        op = abi.Op(code=code, src=sampled.get(src, src), dst=sampled.get(dst, dst), **fields)
        op.flags |= abi.SAMPLED * bool(sampled)
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
        keep: list[object],
        comm: SharedComm | None,
    ) -> None:
        self._step, self._struct, self._keep, self._comm = kernels.step, struct, [logits, *keep], comm
        self._logits: NDArray[np.float32] = logits.numpy()
        self._token = np.zeros(len(self._logits), np.int32)
        x = (ctypes.c_float * (struct.max_tokens * struct.strides[Buffer.X])).from_address(struct.buffers[Buffer.X])
        self.x: NDArray[np.float32] = np.frombuffer(x, np.float32).reshape(struct.max_tokens, -1)
        self._batch: abi.Batch | None = None
        self._bound: object = None
        self._last = abi.Step()
        self._arrays: tuple[NDArray[np.int32], ...] = ()

    def run(
        self,
        batch: Any,
        run_slots: NDArray[np.int32],
        run_tokens: NDArray[np.int32],
        rows: NDArray[np.int32],
        want: NDArray[np.int32],
    ) -> NDArray[np.int32]:
        """Runs the step. rows: indices into runs; want: int32 per row (ARGMAX, SAMPLE, LOGITS).

        Returns the chosen token of each row (meaningless for LOGITS), valid until the next run.
        """
        if self._bound is not batch:
            self._bind(batch)
        token = self._token[: len(rows)]
        self._arrays = (run_slots, run_tokens, rows, want, token)
        self._last = abi.Step(
            len(run_slots), run_slots.ctypes.data, run_tokens.ctypes.data, len(rows), rows.ctypes.data,
            want.ctypes.data, token.ctypes.data, 0,
        )  # fmt: skip
        self._call()
        return token

    def repeat(self) -> NDArray[np.int32]:
        self._last.advance = 1
        self._call()
        return self._arrays[-1]

    def _call(self) -> None:
        lost = self._step(ctypes.byref(self._struct), ctypes.byref(self._batch), ctypes.byref(self._last))
        if lost and self._comm is not None:
            raise self._comm.lost()

    def logits(self, row: int) -> NDArray[np.float32]:
        """float32 [vocab] of a row that wanted LOGITS, valid until the next run."""
        return self._logits[row, : self._struct.vocab]

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
