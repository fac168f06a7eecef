"""Llama 2 and 3, Mistral, SmolLM; Qwen2 and Qwen3 are the same body with biases or normalised queries and keys."""

from __future__ import annotations

from headway.models.families.common import (
    Config,
    UnsupportedVariant,
    WeightMap,
    activation,
    max_positions,
    num_labels,
    required,
    rotary,
)
from headway.models.spec import DecoderSpec

WEIGHTS = WeightMap(
    prefixes=("model.", ""),
    layer="layers.{}.",
    parts={
        "attn_norm": ("input_layernorm",),
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "q_norm": ("self_attn.q_norm",),
        "k_norm": ("self_attn.k_norm",),
        "o": ("self_attn.o_proj",),
        "mlp_norm": ("post_attention_layernorm",),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    },
    embed="embed_tokens",
    final_norm="norm",
)


def spec(config: Config) -> DecoderSpec:
    family = config["model_type"]
    qwen = family in ("qwen2", "qwen3")
    bias = bool(config.get("attention_bias", False))
    num_heads, hidden_size = required(config, "num_attention_heads"), required(config, "hidden_size")
    head_dim = config.get("head_dim") or (128 if family == "qwen3" else hidden_size // num_heads)
    return DecoderSpec(
        vocab_size=required(config, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=required(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        intermediate_size=required(config, "intermediate_size"),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=activation(config, "hidden_act", "silu"),
        rotary=rotary(config, head_dim),
        qk_norm=family == "qwen3",
        qkv_bias=bias or family == "qwen2",
        o_bias=bias and family != "qwen2",
        mlp_bias=bool(config.get("mlp_bias", False)),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        sliding_window=_qwen_window(config) if qwen else _mistral_window(config),
        max_positions=max_positions(config),
        num_labels=num_labels(config),
    )


def _mistral_window(config: Config) -> int | None:
    return config.get("sliding_window", 4096) if config["model_type"] == "mistral" else None


def _qwen_window(config: Config) -> int | None:
    """Qwen applies its window from some layer on; here all layers have it, or none."""
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return None
    layers = int(config["num_hidden_layers"])
    kinds = config.get("layer_types")
    first = int(config.get("max_window_layers", 28))
    sliding = kinds.count("sliding_attention") if kinds else max(layers - first, 0)
    if sliding not in (0, layers):
        raise UnsupportedVariant(f"config.json: sliding window in {sliding} of {layers} layers: all or none")
    return config["sliding_window"] if sliding else None
