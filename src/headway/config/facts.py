"""What a checkpoint says about itself, read from its metadata alone: enough to resolve every setting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headway.config.settings import Dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """architecture: as the checkpoint names it. kind: "classifier" is either kind of body with a classification head.

    dtype: what the weights are stored in (quantised files: "bfloat16"). weights_bytes: bytes of the checkpoint's
    tensors as stored; num_parameters: their elements. num_labels: 0 without a classification head. num_kv_heads: 0 for
    bodies that keep no cache. head_layers: how many layers' weights the head has. token_types: kinds of segment an
    encoder tells apart, 0 for decoders.
    """

    architecture: str
    kind: Literal["decoder", "encoder", "classifier"]
    max_positions: int
    dtype: Dtype
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    head_layers: float = 0.0
    eos_token_ids: tuple[int, ...] = ()
    weights_bytes: int = 0
    num_parameters: int = 0
    num_labels: int = 0
    token_types: int = 0
