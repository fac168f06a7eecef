"""Compiles a Decoder into one native step, where the kernels offer a program builder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headway.models.layers import EmbeddingTable
from headway.ops.program import Buffer, LinearMode, NormKind, SharedHeads

if TYPE_CHECKING:
    from headway.models.decoder import Decoder
    from headway.models.layers import Norm
    from headway.ops.port import PackedLinear
    from headway.ops.program import ProgramBuilder


def compile_decoder(model: Decoder, builder: ProgramBuilder, *, max_tokens: int, max_runs: int) -> Any:
    """The step of every family of DecoderSpec, or a pipeline stage of it. max_tokens, max_runs: the most it holds."""
    spec = model.spec
    if model.halves_heads:
        columns, inputs = model.shard.qkv_columns(spec), model.o_inputs
        builder.share_heads(SharedHeads(model.kv_heads.start, spec.num_kv_heads, columns.start, inputs.start))
    if model.embed is not None:
        embedding = model.embed.weight if isinstance(model.embed, EmbeddingTable) else model.embed
        builder.embed(embedding, model.shard.width(spec.vocab_size))
    if model.project_in is not None:
        builder.norm(NormKind.NONE, model.project_in.in_features)
        builder.linear(Buffer.H, Buffer.X, model.project_in, LinearMode.SET)
    if model.positions is not None:
        builder.add_positions(model.positions, spec.position_offset)
    if not spec.norm_first:
        builder.norm(NormKind.NONE, spec.hidden_size)
    for index, layer in enumerate(model.layers):
        if spec.norm_first:
            _norm(builder, layer.attn_norm, spec.hidden_size)
        builder.linear(Buffer.H, Buffer.QKV, layer.qkv, LinearMode.STORE)
        q_norm, k_norm = (n.weight if n is not None else None for n in (layer.q_norm, layer.k_norm))
        builder.rotary_kv(index, q_norm, k_norm, spec.norm_eps)
        builder.attention(index)
        if layer is model.layers[-1] and model.head is not None:
            builder.keep_sampled_rows()
        builder.linear(Buffer.ATTN, Buffer.X, layer.o, LinearMode.ADD)
        _norm(
            builder, layer.mlp_norm if spec.norm_first else layer.attn_norm, spec.hidden_size, keep=not spec.norm_first
        )
        if spec.gated:
            builder.linear(Buffer.H, Buffer.ACT, layer.gate_up, LinearMode.GATED, spec.activation)
        else:
            builder.linear(Buffer.H, Buffer.ACT, layer.up, LinearMode.STORE, spec.activation)
        builder.linear(Buffer.ACT, Buffer.X, layer.down, LinearMode.ADD)
        if not spec.norm_first:
            _norm(builder, layer.mlp_norm, spec.hidden_size, keep=True)
    if model.head is not None:
        _head(model, builder, model.head)
    return builder.finish(
        num_heads=len(model.heads),
        cos_sin=model.cos_sin,
        scale=model.scale,
        window=spec.sliding_window,
        dtype=model.dtype,
        max_tokens=max_tokens,
        max_runs=max_runs,
    )


def _head(model: Decoder, builder: ProgramBuilder, head: PackedLinear) -> None:
    spec = model.spec
    if model.final_norm is not None:
        _norm(builder, model.final_norm, spec.hidden_size)
    elif spec.norm_first:
        builder.norm(NormKind.NONE, spec.hidden_size)
    head_from = Buffer.H
    if model.project_out is not None:
        head_from = Buffer.ATTN
        builder.linear(Buffer.H, head_from, model.project_out, LinearMode.STORE)
    builder.head(head_from, head, model.shard.bounds(spec.vocab_size))


def _norm(builder: ProgramBuilder, norm: Norm, width: int, *, keep: bool = False) -> None:
    kind = NormKind.RMS if norm.bias is None else NormKind.LAYER
    builder.norm(kind, width, norm.weight, norm.bias, norm.eps, keep=keep)
