"""Compiles a Decoder into one native step, where the kernels offer a program builder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headway.models.layers import EmbeddingTable
from headway.ops.cpu import abi

if TYPE_CHECKING:
    from headway.models.decoder import Decoder, Norm


def compile_decoder(model: Decoder, builder: Any, *, max_tokens: int, max_runs: int) -> Any:
    """The step of every family of DecoderSpec. max_tokens, max_runs: the most one step may hold."""
    spec = model.spec
    builder.embed(model.embed.weight if isinstance(model.embed, EmbeddingTable) else model.embed)
    if model.project_in is not None:
        builder.norm(abi.NORM_NONE, model.project_in.in_features)
        builder.linear(abi.BUF_H, abi.BUF_X, model.project_in, abi.LIN_SET)
    if model.positions is not None:
        builder.add_positions(model.positions, spec.position_offset)
    if not spec.norm_first:
        builder.norm(abi.NORM_NONE, spec.hidden_size)
    for index, layer in enumerate(model.layers):
        if spec.norm_first:
            _norm(builder, layer.attn_norm, spec.hidden_size)
        builder.linear(abi.BUF_H, abi.BUF_QKV, layer.qkv, abi.LIN_STORE)
        q_norm, k_norm = (n.weight if n is not None else None for n in (layer.q_norm, layer.k_norm))
        builder.rotary_kv(index, q_norm, k_norm, spec.norm_eps)
        builder.attention(index)
        builder.linear(abi.BUF_ATTN, abi.BUF_X, layer.o, abi.LIN_ADD)
        _norm(
            builder, layer.mlp_norm if spec.norm_first else layer.attn_norm, spec.hidden_size, keep=not spec.norm_first
        )
        if spec.gated:
            builder.linear(abi.BUF_H, abi.BUF_ACT, layer.gate_up, abi.LIN_GATED, spec.activation)
        else:
            builder.linear(abi.BUF_H, abi.BUF_ACT, layer.up, abi.LIN_STORE, spec.activation)
        builder.linear(abi.BUF_ACT, abi.BUF_X, layer.down, abi.LIN_ADD)
        if not spec.norm_first:
            _norm(builder, layer.mlp_norm, spec.hidden_size, keep=True)
    if model.final_norm is not None:
        _norm(builder, model.final_norm, spec.hidden_size, sampled_rows=True)
    else:
        builder.norm(abi.NORM_NONE, spec.hidden_size, sampled_rows=True)
    head_from = abi.BUF_ROWS
    if model.project_out is not None:
        builder.linear(abi.BUF_ROWS, abi.BUF_H, model.project_out, abi.LIN_STORE)
        head_from = abi.BUF_H
    if model.head is not None:
        builder.head(head_from, model.head)
    return builder.finish(
        num_heads=model.num_heads,
        cos_sin=model.cos_sin,
        scale=model.scale,
        window=spec.sliding_window,
        dtype=model.dtype,
        max_tokens=max_tokens,
        max_runs=max_runs,
    )


def _norm(builder: Any, norm: Norm, width: int, *, keep: bool = False, sampled_rows: bool = False) -> None:
    kind = abi.NORM_RMS if norm.bias is None else abi.NORM_LAYER
    builder.norm(kind, width, norm.weight, norm.bias, norm.eps, keep=keep, sampled_rows=sampled_rows)
