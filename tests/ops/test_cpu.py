"""The C++ kernels of every instruction set this machine has, against the reference kernels."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ConfigError
from headway.ops.cpu import abi
from headway.ops.port import AttentionMetadata
from headway.ops.reference import ReferenceKV, ReferenceOps

pytestmark = pytest.mark.skipif(abi.library() is None, reason="the kernels were not built on this machine")

SETS = [s for s in ("avx512bf16", "avx512", "avx2", "portable") if abi.library() and abi.find_kernels(s)]
DTYPES = [torch.float32, torch.bfloat16]
REFERENCE = ReferenceOps(threads=1)


@pytest.fixture(params=SETS)
def ops(request: pytest.FixtureRequest):
    from headway.ops.cpu import CpuOps

    return CpuOps(threads=2, isa=request.param)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in the Frobenius norm."""
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / expected.norm().clamp_min(1e-30)).item()


TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows,n,k", [(1, 32, 64), (3, 96, 70), (12, 33, 48), (13, 64, 130), (97, 160, 64), (200, 40, 36)]
)
def test_products_equal_the_reference_for_any_shape(ops, dtype, rows, n, k):
    x, w, bias = torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n)
    ours, theirs = (o.pack_linear(w, bias, dtype=dtype) for o in (ops, REFERENCE))
    for activation in (None, "silu", "gelu", "gelu_tanh", "relu"):
        exact = REFERENCE.linear(x.float(), REFERENCE.pack_linear(w, bias, dtype=torch.float32), activation=activation)
        assert error(ops.linear(x, ours, activation=activation), exact) < TOLERANCE[dtype]
    residual = torch.randn(rows, n)
    expected = residual.clone()
    REFERENCE.linear_add(x, theirs, expected)
    ops.linear_add(x, ours, residual)
    assert error(residual, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("n", [64, 50])
def test_sums_in_float32_are_not_rounded_on_the_way(ops, n):
    """Logits of bfloat16 models: rounded, they would tie where they do not."""
    x, w = torch.randn(5, 96).bfloat16(), torch.randn(n, 96).bfloat16()
    logits = torch.zeros(5, n)
    ops.linear_add(x, ops.pack_linear(w, dtype=torch.bfloat16), logits)
    assert error(logits, x.double() @ w.double().T) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_products_equal_the_reference(ops, dtype, activation):
    x, w = torch.randn(29, 64).to(dtype), torch.randn(2 * 88, 64).to(dtype) * 0.1
    exact = REFERENCE.gated_linear(x.float(), REFERENCE.pack_linear(w, dtype=torch.float32, gated=True), activation)
    assert error(ops.gated_linear(x, ops.pack_linear(w, dtype=dtype, gated=True), activation), exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_products_are_those_of_a_weight_rounded_by_column(ops, dtype, source):
    """Activations keep 16 bits, so that nothing is lost but the weight's rounding."""
    x, w = torch.randn(31, 100).to(dtype), torch.randn(70, 100).to(source)
    packed = ops.pack_linear(w, dtype=dtype, quantization="int8")
    rounded = packed.rows(torch.arange(70))
    scale = w.float().abs().amax(1, keepdim=True) / 127
    assert ((rounded - w.float()).abs() <= scale * 0.50001).all()
    assert error(ops.linear(x, packed), x.double() @ rounded.double().T) < (2e-4 if dtype is torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_rows_are_the_weight(ops, dtype):
    w = torch.randn(50, 38).to(dtype)
    ids = torch.tensor([0, 49, 7, 7, 32])
    assert torch.equal(ops.pack_linear(w, dtype=dtype).rows(ids), w[ids].float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_equal_the_reference(ops, dtype):
    x, weight, bias = torch.randn(9, 77) * 3 + 1, torch.randn(77), torch.randn(77)
    assert (
        error(ops.rms_norm(x, weight, 1e-5, dtype), REFERENCE.rms_norm(x, weight, 1e-5, torch.float32))
        < TOLERANCE[dtype]
    )
    expected = REFERENCE.layer_norm(x, weight, bias, 1e-5, torch.float32)
    assert error(ops.layer_norm(x, weight, bias, 1e-5, dtype), expected) < TOLERANCE[dtype]


@st.composite
def batches(draw: st.DrawFn):
    """Runs of (tokens in the cache already, tokens of the step)."""
    runs = draw(st.lists(st.tuples(st.integers(0, 150), st.integers(1, 70)), min_size=1, max_size=4))
    group = draw(st.sampled_from([1, 2, 3, 5, 64]))
    window = draw(st.sampled_from([None, None, 1, 9, 70]))
    return (
        runs,
        group,
        draw(st.sampled_from([16, 48, 64])),
        draw(st.sampled_from([16, 32])),
        window,
        draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", SETS)
@settings(deadline=None, max_examples=15)
@given(batch=batches())
def test_paged_attention_equals_the_reference(isa, dtype, batch):
    from headway.ops.cpu import CpuOps

    runs, group, dim, size, window, seed = batch
    ops, kv_heads = CpuOps(threads=2, isa=isa), 2
    torch.manual_seed(seed)
    per_run = [-(-(a + b) // size) for a, b in runs]
    order = (torch.randperm(sum(per_run)) + 1).int()
    table = torch.zeros(len(runs), max(per_run), dtype=torch.int32)
    for row, ids in zip(table, order.split(per_run), strict=True):
        row[: len(ids)] = ids
    caches = [o.allocate_kv(1, sum(per_run) + 1, size, kv_heads, dim, dtype) for o in (ops, REFERENCE)]
    for first, count in ((0, [a for a, _ in runs]), (1, [b for _, b in runs])):
        positions = [torch.arange(a * first, a * first + n) for (a, _), n in zip(runs, count, strict=True)]
        slots = [table[r][p // size] * size + p % size for r, p in enumerate(positions)]
        meta = AttentionMetadata(
            query_start=torch.tensor([0, *np.cumsum(count)], dtype=torch.int32),
            context_len=torch.tensor([int(p[-1]) + 1 if len(p) else 0 for p in positions], dtype=torch.int32),
            block_table=table,
            positions=torch.cat(positions).int(),
            slot_mapping=torch.cat(slots).int(),
            max_query=max(count),
            max_context=max(a + b for a, b in runs),
        )
        tokens = sum(count)
        k, v = torch.randn(2, tokens, kv_heads, dim).to(dtype)
        for o, cache in zip((ops, REFERENCE), caches, strict=True):
            o.write_kv(cache, 0, k, v, meta.slot_mapping)
    q = torch.randn(tokens, kv_heads * group, dim).to(dtype)
    got = ops.attention(caches[0], 0, q, meta, scale=dim**-0.5, window=window)
    if dtype is torch.bfloat16:  # the truth for the same rounded keys and values
        caches[1] = ReferenceKV(caches[1].keys.float(), caches[1].values.float())
        q = q.float()
    expected = REFERENCE.attention(caches[1], 0, q, meta, scale=dim**-0.5, window=window)
    assert error(got, expected) < (5e-6 if dtype is torch.float32 else 8e-3)


def test_a_new_block_forgets_the_infinities_of_its_last_owner(ops):
    """Masked keys get probability zero, and zero times infinity is not zero."""
    cache = ops.allocate_kv(1, 2, 16, 1, 16, torch.float32)
    poison = torch.full((16, 1, 16), float("inf"))
    ops.write_kv(cache, 0, poison, poison, torch.arange(16, 32, dtype=torch.int32))
    k = v = q = torch.ones(1, 1, 16)
    ops.write_kv(cache, 0, k, v, torch.tensor([16], dtype=torch.int32))
    one, zero = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    meta = AttentionMetadata(torch.cat([zero, one]), one, one[None], zero, one * 16, 1, 1)
    assert torch.equal(ops.attention(cache, 0, q, meta, scale=1.0, window=None), v)


def test_unknown_instruction_sets_are_refused():
    from headway.ops.cpu import CpuOps

    with pytest.raises(ConfigError, match="isa='avx1024'"):
        CpuOps(threads=1, isa="avx1024")


def test_one_openmp_runtime_serves_torch_and_the_kernels():
    """Two runtimes would be two pools of threads that fight for the cores."""
    from headway.ops.cpu import CpuOps

    ops = CpuOps(threads=2)
    ops.linear(torch.ones(64, 64), ops.pack_linear(torch.ones(64, 64), dtype=torch.float32))
    runtimes = set(re.findall(r"\S*lib(?:gomp|iomp|omp)\S*\.so\S*", Path("/proc/self/maps").read_text()))
    assert len(runtimes) == 1, runtimes
