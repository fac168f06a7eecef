"""The C interface of csrc/abi.h and csrc/kernels.h, field for field. Calls release the GIL (plain CDLL).

Buffers, modes and norms have the numbers of headway.ops.program.
"""

from __future__ import annotations

import ctypes as C
from functools import cache
from pathlib import Path

F32, BF16, INT8, F16 = 0, 1, 2, 3
ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
OP_EMBED, OP_NORM, OP_LINEAR, OP_ROTARY_KV, OP_ATTENTION, OP_HEAD, OP_GATHER, OP_ALL_REDUCE, OP_MEET = range(9)
SAMPLED_X, SAMPLED_ATTN, PART, ALL_QKV, MY_QKV, MY_ATTN, BUFFERS = 5, 6, 7, 8, 9, 10, 11
SAMPLED, NORM_KEEP = 1, 2

_i32, _i64, _f32, _ptr = C.c_int32, C.c_int64, C.c_float, C.c_void_p


class Linear(C.Structure):
    _fields_ = [
        ("words", _ptr), ("bias", _ptr), ("scale", _ptr), ("offset", _ptr),
        ("n", _i64), ("k", _i64), ("panels", _i64), ("groups", _i64), ("dtype", _i32), ("gated", _i32),
    ]  # fmt: skip


class KvLayout(C.Structure):
    _fields_ = [
        ("base", _ptr), ("layer_stride", _i64), ("num_blocks", _i64), ("block_size", _i64), ("kv_heads", _i64),
        ("head_dim", _i64), ("dtype", _i32),
    ]  # fmt: skip


class Runs(C.Structure):
    _fields_ = [
        ("count", _i64), ("tokens", _i64), ("start", _ptr), ("context", _ptr), ("table", _ptr), ("table_row", _ptr),
        ("table_stride", _i64),
    ]  # fmt: skip


class Op(C.Structure):
    _fields_ = [
        ("code", _i32), ("src", _i32), ("dst", _i32), ("mode", _i32), ("act", _i32), ("flags", _i32), ("layer", _i32),
        ("pad", _i32), ("linear", _ptr), ("table", _ptr), ("positions", _ptr), ("weight", _ptr), ("bias", _ptr),
        ("width", _i64), ("position_offset", _i64), ("first", _i64), ("count", _i64), ("eps", _f32), ("pad2", _f32),
    ]  # fmt: skip


class Batch(C.Structure):
    _fields_ = [
        ("tokens", _ptr), ("token_stride", _i64), ("computed", _ptr), ("length", _ptr), ("prompt_len", _ptr),
        ("block_table", _ptr), ("table_stride", _i64), ("temperature", _ptr),
        ("top_p", _ptr), ("min_p", _ptr), ("top_k", _ptr), ("seed", _ptr),
    ]  # fmt: skip


SIGNAL_BYTES, PID_OFFSET, CLOSED_OFFSET = 128, 12, 8  # csrc/collective.h, Signal


class Group(C.Structure):
    _fields_ = [
        ("memory", _ptr), ("first_part", _i64), ("part_bytes", _i64), ("pidfd", _ptr), ("rank", _i32), ("size", _i32),
        ("exchanges", C.c_uint32), ("lost", _i32),
    ]  # fmt: skip


class Program(C.Structure):
    _fields_ = [
        ("ops", C.POINTER(Op)), ("num_ops", _i64), ("kv", KvLayout), ("num_heads", _i64), ("rotary_dim", _i64),
        ("cos_sin", _ptr), ("attention_scale", _f32), ("window", _i32), ("dtype", _i32), ("threads", _i32),
        ("buffers", _ptr * BUFFERS), ("strides", _i64 * BUFFERS), ("logits", _ptr), ("logits_stride", _i64),
        ("vocab", _i64), ("max_tokens", _i64), ("max_rows", _i64), ("scratch", _ptr), ("max_runs", _i64),
        ("group", _ptr), ("vocab_start", _ptr),
    ]  # fmt: skip


class Step(C.Structure):
    _fields_ = [
        ("runs", _i64), ("run_slots", _ptr), ("run_tokens", _ptr), ("rows", _i64), ("row_runs", _ptr), ("want", _ptr),
        ("token", _ptr), ("advance", _i64),
    ]  # fmt: skip


_P = C.POINTER


class Kernels(C.Structure):
    _fields_ = [
        ("name", C.c_char_p),
        ("step", C.CFUNCTYPE(C.c_int, _P(Program), _P(Batch), _P(Step))),
        ("linear", C.CFUNCTYPE(None, _P(Linear), _ptr, _i64, _i64, _i32, _i32, _i32, _ptr, _i64, _i32)),
        ("norm", C.CFUNCTYPE(None, _ptr, _i64, _i64, _i64, _i32, _ptr, _ptr, _f32, _i32, _ptr, _i64, _i32)),
        ("rows", C.CFUNCTYPE(None, _P(Linear), _ptr, _i64, _ptr, _i64)),
        ("write_kv", C.CFUNCTYPE(None, _P(KvLayout), _i64, _ptr, _ptr, _i64, _i64, _ptr, _i64)),
        ("attention", C.CFUNCTYPE(None, _P(KvLayout), _i64, _P(Runs), _i64, _ptr, _i64, _ptr, _i64, _f32, _i64, _i32)),
        ("pack", C.CFUNCTYPE(None, _P(Linear), _ptr, _i32, _i64, _ptr, _ptr, _i32)),
        ("all_reduce", C.CFUNCTYPE(C.c_int, _P(Group), _ptr, _i64, _i32)),
        ("dequantise", C.CFUNCTYPE(None, _ptr, _i32, _i64, _i32, _ptr, _i32)),
    ]


@cache
def library() -> C.CDLL | None:
    """The compiled kernels, or None on a machine where they could not be built."""
    for path in sorted(Path(__file__).parent.glob("_kernels*.so")):
        lib = C.CDLL(str(path))
        lib.headway_kernels.restype = _P(Kernels)
        return lib
    return None


def find_kernels(isa: str = "auto") -> Kernels | None:
    """The kernels of one instruction set, or None where the CPU or the build lacks it."""
    lib = library()
    found = lib.headway_kernels(isa.encode()) if lib else None
    return found.contents if found else None
