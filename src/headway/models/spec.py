"""What a decoder is, as data. Architectures differ in these fields only; one Decoder and one compiler serve them all."""

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
    sliding_window: keys further back than this are not seen; None sees all.
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
    embed_size: int | None = None
    tie_embeddings: bool = False
    sliding_window: int | None = None
    max_positions: int = 2048
    num_labels: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """This rank's share: heads, intermediate width and vocabulary by tensor rank, layers by pipeline rank."""

    tensor_rank: int = 0
    tensor_size: int = 1
    pipeline_rank: int = 0
    pipeline_size: int = 1

    def layers(self, num_layers: int) -> range:
        """The layers of this pipeline rank; earlier ranks take the remainder."""
        base, extra = divmod(num_layers, self.pipeline_size)
        start = self.pipeline_rank * base + min(self.pipeline_rank, extra)
        return range(start, start + base + (self.pipeline_rank < extra))
