"""Tiny random checkpoints made by transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

_LLAMA: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_ROPE = {"rope_theta": 10000.0, "factor": 4.0}
_OPT: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GPT2 = {"vocab_size": 131, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128}
_BERT: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

# name: the class before its head, the configuration
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _LLAMA),
    "llama-tied-biased": (
        "Llama",
        {**_LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6},
    ),
    "llama-rope-linear": ("Llama", {**_LLAMA, "rope_parameters": {"rope_type": "linear", **_ROPE}}),
    "llama-rope-dynamic": ("Llama", {**_LLAMA, "rope_parameters": {"rope_type": "dynamic", **_ROPE}}),
    "llama-rope-llama3": (
        "Llama",
        {
            **_LLAMA,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "llama3",
                **_ROPE,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama-rope-yarn": (
        "Llama",
        {
            **_LLAMA,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "yarn", **_ROPE, "original_max_position_embeddings": 32},
        },
    ),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": 9}),
    "qwen2": ("Qwen2", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {**_LLAMA, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 16}),
    "opt": ("OPT", _OPT),
    "opt-350m": ("OPT", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "gpt2": ("GPT2", _GPT2),
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _BERT),
    "roberta": ("Roberta", {**_BERT, "type_vocab_size": 1, "pad_token_id": 1}),
}
_SIXTEEN = {"head_dim": 16}

# Changes with which the paged kernels take them
PAGED: dict[str, dict[str, Any]] = {
    "llama": _SIXTEEN,
    "llama-tied-biased": _SIXTEEN,
    "llama-rope-llama3": _SIXTEEN,
    "mistral": _SIXTEEN,
    "qwen2": {"num_attention_heads": 3, "num_key_value_heads": 1},
    "qwen2-window": {"num_attention_heads": 3, "num_key_value_heads": 1},
    "qwen3": _SIXTEEN,
    "opt": {"num_attention_heads": 3},
    "opt-350m": {"num_attention_heads": 3},
    "gpt2": {"n_head": 3},
}


def make_model(name: str, head: str, **changes: Any) -> Any:
    """A random transformers model; norms and biases are random too, so that none can be forgotten."""
    cls, settings = {**DECODERS, **ENCODERS}[name]
    if cls == "GPT2" and head == "ForCausalLM":
        head = "LMHeadModel"
    config = getattr(transformers, f"{cls}Config")(**{**settings, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, cls + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if parameter.dim() == 1 else 0.0))
    return model


def make_checkpoint(name: str, head: str, directory: Path, **changes: Any) -> tuple[Any, Path]:
    """(transformers model, its directory, made in ``directory``)."""
    model = make_model(name, head, **changes)
    path = directory / f"{name}-{head}"
    model.save_pretrained(path)
    return model, path
