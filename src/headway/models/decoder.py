"""One decoder for every family: what differs is in its DecoderSpec.

Shape suffixes: T tokens of the step, K hidden size, H query heads, G key/value heads, D head dimension, R rows,
V vocabulary. x is the residual stream, float32; h is what a block reads of it, in the compute dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headway.errors import RequestError
from headway.models import pooling
from headway.models.layers import DecoderLayer, DecoderWeights, add_linear, cos_sin_table

if TYPE_CHECKING:
    from torch import Tensor

    from headway.messages import PoolingParams
    from headway.models.packing import Packer
    from headway.models.port import Comm
    from headway.models.spec import DecoderSpec, PoolingSpec, Shard
    from headway.ops.port import AttentionMetadata, KVCache, Ops, PackedLinear


class Decoder:
    """A CausalModel. Weights are attributes for a compiler of step programs to walk.

    forward is embed_tokens, run_layers, finish: a pipeline stage calls those that are its own and passes x on.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        weights: DecoderWeights,
        ops: Ops,
        dtype: torch.dtype,
        *,
        packer: Packer,
        pooling_spec: PoolingSpec,
        max_model_len: int,
        shard: Shard,
        comm: Comm | None,
    ) -> None:
        assert (shard.tensor_size > 1) == (comm is not None), "tensor parallel ranks need a Comm, a single rank none"
        self.spec, self.ops, self.dtype, self.shard, self.comm = spec, ops, dtype, shard, comm
        self.pooling_spec = pooling_spec
        self.max_positions = spec.max_positions
        self.vocab_size, self.num_labels = spec.vocab_size, spec.num_labels
        self.heads, self.kv_heads = shard.attended_heads(spec), shard.cached_heads(spec)
        self.halves_heads = shard.halves_heads(spec)
        self.scale = spec.head_dim**-0.5
        self.layers = weights.layers
        self.embed, self.positions, self.project_in = weights.embed, weights.positions, weights.project_in
        self.project_out, self.final_norm = weights.project_out, weights.final_norm
        self.head, self.score = weights.head, weights.score
        self.cos_sin = None if spec.rotary is None else cos_sin_table(spec.rotary, max_model_len)
        self.weights_bytes = weights.nbytes
        self.packer: Packer | None = packer

    def allocate_kv(self, num_blocks: int, block_size: int) -> KVCache:
        return self.ops.allocate_kv(
            len(self.layers), num_blocks, block_size, len(self.kv_heads), self.spec.head_dim, self.dtype
        )

    def forward(self, token_ids_T: Tensor, meta: AttentionMetadata, kv: KVCache) -> Tensor:
        x_TK = self.embed_tokens(token_ids_T, meta.positions)
        self.run_layers(x_TK, meta, kv)
        return self.finish(x_TK)

    def embed_tokens(self, token_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """x_TK, on the first pipeline rank."""
        rows = self._embedding_rows(token_ids_T)
        if self.project_in is not None:
            rows = self.ops.linear(rows.to(self.dtype), self.project_in)
        x_TK = rows.float()
        if self.positions is not None:
            x_TK = x_TK + self.positions[positions_T + self.spec.position_offset]
        return x_TK

    def run_layers(self, x_TK: Tensor, meta: AttentionMetadata, kv: KVCache) -> None:
        """This rank's layers, in place."""
        for index, layer in enumerate(self.layers):
            if self.spec.norm_first:
                h_TK = layer.attn_norm(self.ops, x_TK, self.dtype)
                self._add(self._attention(index, layer, h_TK, meta, kv), layer.o, x_TK)
                self._add(self._mlp(layer, layer.mlp_norm(self.ops, x_TK, self.dtype)), layer.down, x_TK)
            else:
                self._add(self._attention(index, layer, x_TK.to(self.dtype), meta, kv), layer.o, x_TK)
                x_TK.copy_(layer.attn_norm(self.ops, x_TK, torch.float32))
                self._add(self._mlp(layer, x_TK.to(self.dtype)), layer.down, x_TK)
                x_TK.copy_(layer.mlp_norm(self.ops, x_TK, torch.float32))

    def finish(self, x_TK: Tensor) -> Tensor:
        """Hidden states for head, score and embeddings, on the last pipeline rank."""
        norm = self.final_norm
        hidden_TK = x_TK.to(self.dtype) if norm is None else norm(self.ops, x_TK, self.dtype)
        return hidden_TK if self.project_out is None else self.ops.linear(hidden_TK, self.project_out)

    def logits(self, hidden_RK: Tensor) -> Tensor:
        assert self.head is not None, "loaded for pooling, or not the last pipeline rank"
        # Added to zeros, the products stay float32: bfloat16 logits would tie where float32 ones do not.
        logits_RV = torch.zeros(len(hidden_RK), self.vocab_size, dtype=torch.float32, device=hidden_RK.device)
        mine = self.shard.width(self.vocab_size)
        self.ops.linear_add(hidden_RK, self.head, logits_RV[:, mine.start : mine.stop])
        if self.comm is not None:
            self.comm.all_reduce(logits_RV)
        return logits_RV

    def pool(self, hidden_RK: Tensor, params: list[PoolingParams]) -> list[Tensor]:
        return [self._pool_one(hidden_K, p) for hidden_K, p in zip(hidden_RK, params, strict=True)]

    def _pool_one(self, hidden_K: Tensor, params: PoolingParams) -> Tensor:
        if params.task == "embed":
            return pooling.embedding(hidden_K, params, self.pooling_spec)
        if self.score is None:
            raise RequestError("task", params.task, "this model has no classification head: only embed")
        return pooling.scores(self.ops.linear(hidden_K[None], self.score)[0], params, self.pooling_spec)

    def _embedding_rows(self, token_ids_T: Tensor) -> Tensor:
        assert self.embed is not None, "not the first pipeline rank"
        if self.comm is None:
            return self.embed.rows(token_ids_T)
        mine = self.shard.width(self.vocab_size)
        elsewhere = (token_ids_T < mine.start) | (token_ids_T >= mine.stop)
        rows = self.embed.rows((token_ids_T - mine.start).masked_fill(elsewhere, 0)).float()
        rows.masked_fill_(elsewhere[:, None], 0)
        self.comm.all_reduce(rows)
        return rows

    def _attention(self, index: int, layer: DecoderLayer, h_TK: Tensor, meta: AttentionMetadata, kv: KVCache) -> Tensor:
        """[T, H * D], or what this rank's output projection takes of it."""
        dim, heads, kv_heads = self.spec.head_dim, len(self.heads), len(self.kv_heads)
        q_THD, k_TGD, v_TGD = self._qkv(layer, h_TK)
        if layer.q_norm is not None and layer.k_norm is not None:
            q_THD = layer.q_norm(self.ops, q_THD.reshape(-1, dim), self.dtype).view(-1, heads, dim)
            k_TGD = layer.k_norm(self.ops, k_TGD.reshape(-1, dim), self.dtype).view(-1, kv_heads, dim)
        if self.cos_sin is not None:
            self.ops.rotary_(q_THD, k_TGD, meta.positions, self.cos_sin)
        self.ops.write_kv(kv, index, k_TGD, v_TGD, meta.slot_mapping)
        window = self.spec.sliding_window
        attended = self.ops.attention(kv, index, q_THD, meta, scale=self.scale, window=window).flatten(1)
        return attended[:, self.o_inputs] if self.halves_heads else attended

    @property
    def o_inputs(self) -> slice:
        """Where heads are halved: what this rank's output projection takes of the heads that it attends to."""
        first = self.heads.start * self.spec.head_dim
        mine = self.shard.width(self.spec.num_heads * self.spec.head_dim)
        return slice(mine.start - first, mine.stop - first)

    def _qkv(self, layer: DecoderLayer, h_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the heads that this rank attends to."""
        spec, mine_TN = self.spec, self.ops.linear(h_TK, layer.qkv)
        if self.comm is None or not self.halves_heads:
            sizes = (len(self.heads), len(self.kv_heads), len(self.kv_heads))
            q, k, v = mine_TN.unflatten(-1, (-1, spec.head_dim)).split(sizes, dim=1)
            return q, k, v
        sizes, columns = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), self.shard.qkv_columns(spec)
        all_TN = torch.zeros(len(h_TK), sum(sizes) * spec.head_dim, device=h_TK.device)
        all_TN[:, columns.start : columns.stop] = mine_TN
        self.comm.all_reduce(all_TN)
        q, k, v = all_TN.to(self.dtype).unflatten(-1, (-1, spec.head_dim)).split(sizes, dim=1)
        cached = slice(self.kv_heads.start, self.kv_heads.stop)
        return q[:, self.heads.start : self.heads.stop], k[:, cached], v[:, cached]

    def _mlp(self, layer: DecoderLayer, h_TK: Tensor) -> Tensor:
        """[T, intermediate], before the output projection."""
        if layer.gate_up is not None:
            return self.ops.gated_linear(h_TK, layer.gate_up, self.spec.activation)
        assert layer.up is not None
        return self.ops.linear(h_TK, layer.up, activation=self.spec.activation)

    def _add(self, y: Tensor, weight: PackedLinear, x_TK: Tensor) -> None:
        add_linear(self.ops, self.comm, y, weight, x_TK)
