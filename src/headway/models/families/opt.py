"""OPT: learned positions offset by two, ReLU; the 350m is post-norm and projects a narrower embedding in and out."""

from __future__ import annotations

from headway.models.families.common import Config, UnsupportedVariant, WeightMap, activation, num_labels, required
from headway.models.spec import DecoderSpec

WEIGHTS = WeightMap(
    prefixes=("model.decoder.", "decoder."),
    layer="layers.{}.",
    parts={
        "attn_norm": ("self_attn_layer_norm",),
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "o": ("self_attn.out_proj",),
        "mlp_norm": ("final_layer_norm",),
        "up": ("fc1",),
        "down": ("fc2",),
    },
    embed="embed_tokens",
    positions="embed_positions",
    final_norm="final_layer_norm",
    project_in="project_in",
    project_out="project_out",
)


def spec(config: Config) -> DecoderSpec:
    if not config.get("layer_norm_elementwise_affine", True):
        raise UnsupportedVariant("config.json: layer_norm_elementwise_affine=false is not supported")
    hidden_size, num_heads = required(config, "hidden_size"), required(config, "num_attention_heads")
    embed_size = config.get("word_embed_proj_dim") or hidden_size
    norm_first = bool(config.get("do_layer_norm_before", True))
    bias = bool(config.get("enable_bias", True))
    positions = required(config, "max_position_embeddings")
    return DecoderSpec(
        vocab_size=required(config, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=required(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=required(config, "ffn_dim"),
        norm="layer",
        norm_first=norm_first,
        final_norm=norm_first and not config.get("_remove_final_layer_norm", False),
        activation=activation(config, "activation_function", "relu"),
        gated=False,
        learned_positions=positions + 2,
        position_offset=2,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        embed_size=embed_size if embed_size != hidden_size else None,
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
        max_positions=positions,
        num_labels=num_labels(config),
    )
