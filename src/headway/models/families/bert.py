"""BERT and RoBERTa encoders."""

from __future__ import annotations

from headway.models.families.common import Config, UnsupportedVariant, activation, num_labels, required
from headway.models.spec import EncoderSpec

PREFIXES = ("bert.", "roberta.", "")


def spec(config: Config) -> EncoderSpec:
    if config.get("position_embedding_type", "absolute") != "absolute" or config.get("is_decoder"):
        raise UnsupportedVariant("config.json: only absolute positions and bidirectional attention are supported")
    bert = config["model_type"] == "bert"
    offset = 0 if bert else int(config.get("pad_token_id", 1)) + 1
    labels = num_labels(config)
    positions = required(config, "max_position_embeddings")
    return EncoderSpec(
        vocab_size=required(config, "vocab_size"),
        hidden_size=required(config, "hidden_size"),
        num_layers=required(config, "num_hidden_layers"),
        num_heads=required(config, "num_attention_heads"),
        intermediate_size=required(config, "intermediate_size"),
        norm_eps=config.get("layer_norm_eps", 1e-12),
        activation=activation(config, "hidden_act", "gelu"),
        positions=positions,
        position_offset=offset,
        token_types=int(config.get("type_vocab_size", 2)),
        max_positions=positions - offset,
        num_labels=labels,
        head=None if not labels else "pooler" if bert else "dense",
    )
