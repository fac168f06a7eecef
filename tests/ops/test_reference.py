"""The reference kernels against formulas written out in float64."""

from __future__ import annotations

import math

import pytest
import torch

from headway.errors import ConfigError
from headway.ops import get_ops
from headway.ops.port import AttentionMetadata
from headway.ops.reference import ReferenceOps

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def ops() -> ReferenceOps:
    torch.manual_seed(0)
    return ReferenceOps(threads=1)


def int32(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_registry_knows_its_names() -> None:
    assert get_ops("reference").name == "reference"
    with pytest.raises(ConfigError, match="ops='tpu': must be one of: reference, cpu"):
        get_ops("tpu")


@pytest.mark.parametrize("bias", [True, False])
def test_linear_adds_its_bias_and_keeps_the_type(ops: ReferenceOps, bias: bool) -> None:
    x, w, b = torch.randn(5, 7), torch.randn(3, 7), torch.randn(3) if bias else None
    expected = x @ w.T + (b if b is not None else 0)
    packed = ops.pack_linear(w, b, dtype=torch.float32)
    torch.testing.assert_close(ops.linear(x, packed), expected, **TOLERANCE)
    half = ops.pack_linear(w, b, dtype=torch.bfloat16)
    assert ops.linear(x.bfloat16(), half).dtype == torch.bfloat16
    assert (packed.out_features, packed.in_features) == (3, 7)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("silu", lambda x: x / (1 + math.exp(-x))),
        ("gelu", lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("relu", lambda x: max(x, 0.0)),
    ],
)
def test_activations(ops: ReferenceOps, name: str, function: object) -> None:
    x = torch.linspace(-4, 4, 17)[:, None]
    found = ops.linear(x, ops.pack_linear(torch.ones(1, 1), dtype=torch.float32), activation=name)  # type: ignore[arg-type]
    expected = torch.tensor([[function(v)] for v in x[:, 0].tolist()])  # type: ignore[operator]
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_gated_linear_takes_gate_rows_first(ops: ReferenceOps) -> None:
    x, gate, up = torch.randn(5, 7), torch.randn(4, 7), torch.randn(4, 7)
    packed = ops.pack_linear(torch.cat((gate, up)), dtype=torch.float32, gated=True)
    torch.testing.assert_close(ops.gated_linear(x, packed, "relu"), (x @ gate.T).relu() * (x @ up.T), **TOLERANCE)


def test_linear_add_accumulates_in_float32(ops: ReferenceOps) -> None:
    x, w, residual = torch.randn(5, 7), torch.randn(3, 7), torch.full((5, 3), 1000.0)
    expected = residual + x @ w.T
    ops.linear_add(x.bfloat16(), ops.pack_linear(w, dtype=torch.bfloat16), residual)
    assert residual.dtype == torch.float32
    torch.testing.assert_close(residual, expected, atol=0.1, rtol=0)


def test_int8_rows_are_within_half_a_step(ops: ReferenceOps) -> None:
    w = torch.randn(6, 40) * torch.logspace(-3, 3, 6)[:, None]
    packed = ops.pack_linear(w, dtype=torch.float32, quantization="int8")
    step = w.abs().amax(1, keepdim=True) / 127
    ids = torch.tensor([5, 0, 3])
    assert ((packed.rows(ids) - w[ids]).abs() <= step[ids] * 0.5001).all()
    torch.testing.assert_close(ops.linear(torch.eye(40), packed).T, packed.rows(torch.arange(6)), **TOLERANCE)


def test_packing_copies(ops: ReferenceOps) -> None:
    w = torch.ones(2, 2)
    packed = ops.pack_linear(w, dtype=torch.float32)
    w.zero_()
    assert ops.linear(torch.ones(1, 2), packed).tolist() == [[2.0, 2.0]]


def test_norms(ops: ReferenceOps) -> None:
    x, w, b = torch.randn(5, 8) * 3 + 1, torch.randn(8), torch.randn(8)
    rms = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w
    layer = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * w + b
    torch.testing.assert_close(ops.rms_norm(x, w, 1e-5, torch.float32), rms, **TOLERANCE)
    torch.testing.assert_close(ops.layer_norm(x, w, b, 1e-5, torch.float32), layer, **TOLERANCE)
    assert ops.rms_norm(x, w, 1e-5, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_turns_pairs_of_halves_in_place(ops: ReferenceOps, dtype: torch.dtype) -> None:
    positions, angles = int32([0, 3, 5]), torch.rand(6, 2) * 6
    table = torch.cat((angles.cos(), angles.sin()), -1)
    merged = torch.randn(3, 5, 6).to(dtype)  # views of one matrix, as a model passes them
    before = merged.clone()
    q, k = merged[:, :2], merged[:, 2:4]
    ops.rotary_(q, k, positions, table)
    for token, position in enumerate(positions.tolist()):
        turn = torch.polar(torch.ones(2), angles[position])
        pairs = torch.complex(before[token, :4, :2].float(), before[token, :4, 2:4].float()) * turn
        expected = torch.cat((pairs.real, pairs.imag), -1)
        torch.testing.assert_close(merged[token, :4, :4].float(), expected, atol=1e-2, rtol=1e-2)
    assert torch.equal(merged[:, :4, 4:], before[:, :4, 4:])
    assert torch.equal(merged[:, 4], before[:, 4])


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_paged_attention_sees_the_past_of_its_own_run(
    ops: ReferenceOps, heads: int, groups: int, window: int | None
) -> None:
    dim, block = 8, 4
    contexts, queries = [9, 1, 4], [3, 1, 4]
    kv = ops.allocate_kv(2, 12, block, groups, dim, torch.float32)
    tables = [[7, 2, 9], [4, 0, 0], [11, 0, 0]]
    keys = [torch.randn(c, groups, dim) for c in contexts]
    values = [torch.randn(c, groups, dim) for c in contexts]
    for table, k, v in zip(tables, keys, values, strict=True):
        slots = int32([table[p // block] * block + p % block for p in range(len(k))])
        ops.write_kv(kv, 1, k, v, slots)
    starts = [0, 3, 4, 8]
    q = torch.randn(8, heads, dim)
    meta = AttentionMetadata(int32(starts), int32(contexts), int32(tables), int32([]), int32([]), 4, 9)
    found = ops.attention(kv, 1, q, meta, scale=0.3, window=window)
    for run, context in enumerate(contexts):
        for i in range(queries[run]):
            position = context - queries[run] + i
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(heads):
                group = head * groups // heads
                k, v = (t[run][first : position + 1, group].double() for t in (keys, values))
                row = starts[run] + i
                expected = (q[row, head].double() @ k.T * 0.3).softmax(-1) @ v
                torch.testing.assert_close(found[row, head].double(), expected, **TOLERANCE)


def test_encoder_attention_sees_the_whole_prompt_and_no_other(ops: ReferenceOps) -> None:
    q, k, v = torch.randn(3, 7, 2, 8)
    found = ops.encoder_attention(q, k, v, int32([0, 5, 7]), 5, scale=0.3)
    for rows in (slice(0, 5), slice(5, 7)):
        weights = (torch.einsum("qhd,khd->hqk", q[rows], k[rows]) * 0.3).softmax(-1)
        torch.testing.assert_close(found[rows], torch.einsum("hqk,khd->qhd", weights, v[rows]), **TOLERANCE)


def test_cache_states_its_size(ops: ReferenceOps) -> None:
    kv = ops.allocate_kv(3, 5, 4, 2, 8, torch.bfloat16)
    assert (kv.num_blocks, kv.block_size, kv.nbytes) == (5, 4, 2 * 3 * 5 * 4 * 2 * 8 * 2)
    assert ops.program_builder(kv) is None
