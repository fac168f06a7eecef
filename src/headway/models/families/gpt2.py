"""GPT-2: learned positions, linears stored transposed, queries, keys and values in one matrix."""

from __future__ import annotations

from headway.models.families.common import Config, UnsupportedVariant, WeightMap, activation, num_labels, required
from headway.models.spec import DecoderSpec

WEIGHTS = WeightMap(
    prefixes=("transformer.", ""),
    layer="h.{}.",
    parts={
        "attn_norm": ("ln_1",),
        "qkv": ("attn.c_attn",),
        "o": ("attn.c_proj",),
        "mlp_norm": ("ln_2",),
        "up": ("mlp.c_fc",),
        "down": ("mlp.c_proj",),
    },
    embed="wte",
    positions="wpe",
    final_norm="ln_f",
    transposed=True,
)


def spec(config: Config) -> DecoderSpec:
    for key, plain in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if bool(config.get(key, plain)) != plain:
            raise UnsupportedVariant(f"config.json: {key}={config[key]} is not supported")
    hidden_size, num_heads = required(config, "n_embd"), required(config, "n_head")
    positions = required(config, "n_positions")
    return DecoderSpec(
        vocab_size=required(config, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=required(config, "n_layer"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=config.get("n_inner") or 4 * hidden_size,
        norm="layer",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=activation(config, "activation_function", "gelu_new"),
        gated=False,
        learned_positions=positions,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
        max_positions=positions,
        num_labels=num_labels(config),
    )
