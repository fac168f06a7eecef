"""BERT-like encoders: whole prompts in, one vector per prompt out.

Shape suffixes: T tokens of the packed prompts, K hidden size, H heads, D head dimension, L labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from headway.errors import RequestError
from headway.models import pooling
from headway.models.families.bert import PREFIXES
from headway.models.layers import Norm, add_linear
from headway.models.packing import Packer, head_rows, rows_of

if TYPE_CHECKING:
    from torch import Tensor

    from headway.messages import PoolingParams
    from headway.models.loading.weights import WeightSource
    from headway.models.port import Comm
    from headway.models.spec import EncoderSpec, PoolingSpec, Shard
    from headway.ops.port import Ops, PackedLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderLayer:
    """qkv: rows of queries, keys, values. Norms come after what they are named for."""

    qkv: PackedLinear
    o: PackedLinear
    attn_norm: Norm
    up: PackedLinear
    down: PackedLinear
    mlp_norm: Norm


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderWeights:
    """words: [V, K] in the compute dtype; positions, types: float32. dense, classifier: the classification head."""

    words: Tensor
    positions: Tensor
    types: Tensor
    embed_norm: Norm
    layers: tuple[EncoderLayer, ...]
    dense: PackedLinear | None
    classifier: PackedLinear | None


class Encoder:
    """An EncoderModel."""

    def __init__(
        self,
        spec: EncoderSpec,
        weights: EncoderWeights,
        ops: Ops,
        dtype: torch.dtype,
        *,
        pooling_spec: PoolingSpec,
        max_positions: int,
        packer: Packer,
        shard: Shard,
        comm: Comm | None,
    ) -> None:
        assert (shard.tensor_size > 1) == (comm is not None), "tensor parallel ranks need a Comm, a single rank none"
        self.spec, self.weights, self.ops, self.dtype, self.comm = spec, weights, ops, dtype, comm
        self.num_heads = len(shard.heads(spec.num_heads, spec.num_heads))
        self.pooling_spec, self.max_positions = pooling_spec, max_positions
        self.num_labels, self.weights_bytes = spec.num_labels, packer.nbytes
        self.packer: Packer | None = packer

    def forward(self, token_ids_T: Tensor, token_type_ids_T: Tensor, query_start: Tensor, max_query: int) -> Tensor:
        x_TK = self._embed(token_ids_T, token_type_ids_T, query_start)
        for layer in self.weights.layers:
            attention = self._attention(layer, x_TK.to(self.dtype), query_start, max_query)
            add_linear(self.ops, self.comm, attention, layer.o, x_TK)
            x_TK = layer.attn_norm(self.ops, x_TK, torch.float32)
            middle = self.ops.linear(x_TK.to(self.dtype), layer.up, activation=self.spec.activation)
            add_linear(self.ops, self.comm, middle, layer.down, x_TK)
            x_TK = layer.mlp_norm(self.ops, x_TK, torch.float32)
        return x_TK

    def pool(self, hidden_TK: Tensor, query_start: Tensor, params: list[PoolingParams]) -> list[Tensor]:
        starts = query_start.tolist()
        prompts = (hidden_TK[start:end] for start, end in pairwise(starts))
        return [self._pool_one(prompt_TK, p) for prompt_TK, p in zip(prompts, params, strict=True)]

    def _pool_one(self, prompt_TK: Tensor, params: PoolingParams) -> Tensor:
        if params.task == "embed":
            return pooling.embedding(pooling.pool_tokens(prompt_TK, self.pooling_spec), params, self.pooling_spec)
        dense, classifier = self.weights.dense, self.weights.classifier
        if dense is None or classifier is None:
            raise RequestError("task", params.task, "this model has no classification head: only embed")
        first = self.ops.linear(prompt_TK[:1].to(self.dtype), dense).tanh()
        return pooling.scores(self.ops.linear(first, classifier)[0], params, self.pooling_spec)

    def _embed(self, token_ids_T: Tensor, token_type_ids_T: Tensor, query_start: Tensor) -> Tensor:
        weights = self.weights
        start, lengths = query_start[:-1], query_start.diff()
        positions_T = torch.arange(len(token_ids_T), device=start.device) - start.repeat_interleave(lengths)
        x_TK = weights.words[token_ids_T] + weights.types[token_type_ids_T]
        x_TK = x_TK + weights.positions[positions_T + self.spec.position_offset]
        return weights.embed_norm(self.ops, x_TK, torch.float32)

    def _attention(self, layer: EncoderLayer, h_TK: Tensor, query_start: Tensor, max_query: int) -> Tensor:
        heads, dim = self.num_heads, self.spec.hidden_size // self.spec.num_heads
        qkv = self.ops.linear(h_TK, layer.qkv).unflatten(-1, (3 * heads, dim))
        q, k, v = qkv.split(heads, dim=1)
        return self.ops.encoder_attention(q, k, v, query_start, max_query, scale=dim**-0.5).flatten(1)


class EncoderPacker(Packer):
    """One rank's EncoderWeights under BERT's and RoBERTa's names. Embeddings and the head are whole on every rank."""

    def __init__(
        self,
        spec: EncoderSpec,
        shard: Shard,
        source: WeightSource,
        ops: Ops,
        dtype: torch.dtype,
        quantization: str | None,
    ) -> None:
        super().__init__(source, ops, dtype, quantization, shard, PREFIXES)
        self.spec = spec

    def weights(self) -> EncoderWeights:
        spec, shard = self.spec, self.shard
        prefix = self.prefix_of("embeddings.word_embeddings.weight")
        tables, size = f"{prefix}embeddings.", spec.hidden_size
        dense, classifier = self._head(spec, prefix)
        return EncoderWeights(
            words=self.table(f"{tables}word_embeddings.weight", (spec.vocab_size, size), self.dtype),
            positions=self.table(f"{tables}position_embeddings.weight", (spec.positions, size), torch.float32),
            types=self.table(f"{tables}token_type_embeddings.weight", (spec.token_types, size), torch.float32),
            embed_norm=self.norm(f"{tables}LayerNorm", size, spec.norm_eps, bias=True),
            layers=tuple(self._layer(spec, shard, f"{prefix}encoder.layer.{i}.") for i in range(spec.num_layers)),
            dense=dense,
            classifier=classifier,
        )

    def _layer(self, spec: EncoderSpec, shard: Shard, layer: str) -> EncoderLayer:
        size, middle, dim = spec.hidden_size, spec.intermediate_size, spec.hidden_size // spec.num_heads
        rows = head_rows(shard.heads(spec.num_heads, spec.num_heads), dim)
        part = rows_of(shard.width(middle))
        names = [f"{layer}attention.self.{part}" for part in ("query", "key", "value")]
        return EncoderLayer(
            qkv=self.linear(
                torch.cat([self.get(f"{name}.weight", (size, size))[rows] for name in names]),
                torch.cat([self.get(f"{name}.bias", (size,))[rows] for name in names]),
            ),
            o=self._inward(f"{layer}attention.output.dense", size, size, rows),
            attn_norm=self.norm(f"{layer}attention.output.LayerNorm", size, spec.norm_eps, bias=True),
            up=self.linear(
                self.get(f"{layer}intermediate.dense.weight", (middle, size))[part],
                self.get(f"{layer}intermediate.dense.bias", (middle,))[part],
            ),
            down=self._inward(f"{layer}output.dense", size, middle, part),
            mlp_norm=self.norm(f"{layer}output.LayerNorm", size, spec.norm_eps, bias=True),
        )

    def _inward(self, name: str, rows: int, columns: int, mine: slice) -> PackedLinear:
        return self.inward_linear(name, self.get(f"{name}.weight", (rows, columns)), mine, bias=True)

    def _head(self, spec: EncoderSpec, prefix: str) -> tuple[PackedLinear | None, PackedLinear | None]:
        if spec.head is None:
            return None, None
        pooler = spec.head == "pooler"
        names = (f"{prefix}pooler.dense", "classifier") if pooler else ("classifier.dense", "classifier.out_proj")
        size = spec.hidden_size
        return (
            self.simple_linear(names[0], size, size, bias=True, quantize=False),
            self.simple_linear(names[1], spec.num_labels, size, bias=True, quantize=False),
        )
