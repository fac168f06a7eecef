"""What a model is, as data. Decoders differ in these fields only; one Decoder and one compiler serve them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RotarySpec:
    """Rotary embedding over the first ``dim`` of each head, halves rotated against each other (the HF convention).

    inv_freq: dim/2 frequencies with any scaling (llama3, linear, yarn) applied. attention_scale multiplies cos and sin.
    """

    dim: int
    inv_freq: tuple[float, ...]
    attention_scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """Sizes are of the whole model; a rank's share follows from Shard.

    norm_first: pre-norm (all but OPT-350m). position_offset: added to positions before the learned table (OPT: 2).
    embed_size: width of the embedding where it differs from hidden_size (OPT-350m projects in and out).
    sliding_window: a token sees itself and the sliding_window - 1 before it; None sees all.
    qkv_bias, o_bias, mlp_bias: whether those linears have one. Layer norms always do, the head and projections never.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_first: bool = True
    final_norm: bool = True
    activation: Activation = "silu"
    gated: bool = True
    rotary: RotarySpec | None = None
    learned_positions: int = 0
    position_offset: int = 0
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    embed_size: int | None = None
    tie_embeddings: bool = False
    sliding_window: int | None = None
    max_positions: int = 2048
    num_labels: int = 0

    @property
    def head_layers(self) -> float:
        """Weights of the head in those of a layer."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        layer = self.hidden_size * (attention + (2 + self.gated) * self.intermediate_size)
        return self.vocab_size * (self.embed_size or self.hidden_size) / layer


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """A BERT-like encoder: learned positions, post-norm, biases everywhere.

    positions: rows of the position table. position_offset: added to positions (RoBERTa: padding id + 1).
    head: how class logits come from the first token: "pooler" is dense, tanh, classifier (BERT); "dense" is the same
    under RoBERTa's names; None has no classification head. max_positions: the longest prompt.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    norm_eps: float
    activation: Activation
    positions: int
    position_offset: int
    token_types: int
    max_positions: int
    num_labels: int = 0
    head: Literal["pooler", "dense"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingSpec:
    """How a checkpoint turns hidden states into vectors and class logits into scores.

    normalize: to unit length. classify, score: the function over the logits of those tasks.
    """

    pooling: Literal["mean", "cls", "max", "last"]
    normalize: bool
    classify: Literal["softmax", "sigmoid", "identity"]
    score: Literal["sigmoid", "identity"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """This rank's share: heads, intermediate width and vocabulary by tensor rank, layers by pipeline rank."""

    tensor_rank: int = 0
    tensor_size: int = 1
    pipeline_rank: int = 0
    pipeline_size: int = 1
    stage_layers: tuple[int, ...] = ()

    def layers(self, num_layers: int) -> range:
        """The layers of this pipeline rank; evenly divided, earlier ranks take the remainder."""
        if self.stage_layers:
            assert sum(self.stage_layers) == num_layers and len(self.stage_layers) == self.pipeline_size
            start = sum(self.stage_layers[: self.pipeline_rank])
            return range(start, start + self.stage_layers[self.pipeline_rank])
        return _part(num_layers, self.pipeline_rank, self.pipeline_size)

    @property
    def first(self) -> bool:
        """Holds the embedding."""
        return self.pipeline_rank == 0

    @property
    def last(self) -> bool:
        """Holds the final norm and the head."""
        return self.pipeline_rank == self.pipeline_size - 1

    def width(self, total: int) -> range:
        """This tensor rank's part of an intermediate width or a vocabulary: whole vectors where they are enough."""
        bounds = self.bounds(total)
        return range(bounds[self.tensor_rank], bounds[self.tensor_rank + 1])

    def bounds(self, total: int, unit: int = 16) -> list[int]:
        """Where each tensor rank's part begins, and ``total``."""
        unit = unit if total >= unit * self.tensor_size else 1
        return [total // unit * rank // self.tensor_size * unit for rank in range(self.tensor_size)] + [total]

    def kv_heads(self, num_kv_heads: int) -> range:
        """The key/value heads of this tensor rank; where ranks are more than heads, several hold the same one."""
        if num_kv_heads >= self.tensor_size:
            return _part(num_kv_heads, self.tensor_rank, self.tensor_size)
        head = self.tensor_rank * num_kv_heads // self.tensor_size
        return range(head, head + 1)

    def halves_heads(self, spec: DecoderSpec) -> bool:
        """Whether a decoder's rank owns some key/value heads and half of one, as of 3 on 2 ranks.

        The ranks then have equal parts of the projections, columns of qkv and inputs of o, whose halves of a group of
        heads are whole vectors. Both owners of a head cache it and attend to it.
        """
        whole = spec.num_kv_heads < self.tensor_size or spec.num_kv_heads % self.tensor_size == 0
        group_size = spec.num_heads // spec.num_kv_heads * spec.head_dim
        return not whole and 2 * spec.num_kv_heads % self.tensor_size == 0 and group_size % 32 == 0

    def cached_heads(self, spec: DecoderSpec) -> range:
        """The key/value heads that a decoder's rank caches."""
        if not self.halves_heads(spec):
            return self.kv_heads(spec.num_kv_heads)
        start = self.tensor_rank * spec.num_kv_heads
        return range(start // self.tensor_size, -(-(start + spec.num_kv_heads) // self.tensor_size))

    def attended_heads(self, spec: DecoderSpec) -> range:
        """The query heads of those."""
        if not self.halves_heads(spec):
            return self.heads(spec.num_heads, spec.num_kv_heads)
        group, cached = spec.num_heads // spec.num_kv_heads, self.cached_heads(spec)
        return range(cached.start * group, cached.stop * group)

    def qkv_columns(self, spec: DecoderSpec) -> range:
        """Where heads are halved: its columns of all queries, keys and values, in whole panels of packed weights."""
        total = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        bounds = self.bounds(total, unit=32)
        return range(bounds[self.tensor_rank], bounds[self.tensor_rank + 1])

    def heads(self, num_heads: int, num_kv_heads: int) -> range:
        """The query heads of this tensor rank, all of its key/value heads; ranks that share one divide its queries."""
        group, mine = num_heads // num_kv_heads, self.kv_heads(num_kv_heads)
        if num_kv_heads >= self.tensor_size:
            return range(mine.start * group, mine.stop * group)
        holders = [r for r in range(self.tensor_size) if r * num_kv_heads // self.tensor_size == mine.start]
        part = _part(group, self.tensor_rank - holders[0], len(holders))
        return range(mine.start * group + part.start, mine.start * group + part.stop)


def _part(count: int, index: int, parts: int) -> range:
    """One of ``parts`` runs of ``count`` things; earlier ones take the remainder."""
    base, extra = divmod(count, parts)
    start = index * base + min(index, extra)
    return range(start, start + base + (index < extra))
