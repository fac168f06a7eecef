"""A checkpoint's configuration as one dictionary in Hugging Face's terms, whatever the file format. Knows no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headway.errors import ModelError
from headway.gguf import GGUFFile

Config = dict[str, Any]

# GGUF architecture: the class it was converted from
_GGUF_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_GGUF_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
}
_GPT2_KEYS = {
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "block_count": "n_layer",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf"


def read_config(path: Path) -> Config:
    """config.json of a directory, or the same made from a GGUF file's metadata. Raises ModelError."""
    if is_gguf(path):
        return config_from_gguf(GGUFFile(path))
    config = read_json(path / "config.json")
    if config is None:
        raise ModelError(f"{path}: has no config.json: not a Hugging Face model directory")
    if "model_type" not in config:
        raise ModelError(f"{path / 'config.json'}: has no model_type")
    return config


def read_json(path: Path) -> Any | None:
    """The file's value, None where there is no file. Raises ModelError when it is not JSON."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error


def config_from_gguf(file: GGUFFile) -> Config:
    arch = file.metadata.get("general.architecture")
    if arch not in _GGUF_ARCHITECTURES:
        known = ", ".join(_GGUF_ARCHITECTURES)
        raise ModelError(f"{file.path}: GGUF architecture {arch!r} is not supported; supported are {known}")
    keys = _GPT2_KEYS if arch == "gpt2" else _GGUF_KEYS
    own = {k.removeprefix(f"{arch}."): _as_written(v) for k, v in file.metadata.items() if k.startswith(f"{arch}.")}
    config: Config = {name: own[key] for key, name in keys.items() if key in own}
    config["model_type"], config["architectures"] = arch, [_GGUF_ARCHITECTURES[arch]]
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{file.path}: tensor token_embd.weight is missing")
    config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config["eos_token_id"] = _gguf_end_ids(file)
    if arch == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if arch != "gpt2":
        config["rope_theta"] = own.get("rope.freq_base", 10000.0)
        config["rope_scaling"] = _gguf_rope_scaling(file, own)
    return config


def _as_written(value: Any) -> Any:
    """The decimal that a float32 came from, as config.json has it: 1e-05 and not 9.999999747378752e-06."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _gguf_rope_scaling(file: GGUFFile, own: dict[str, Any]) -> Config | None:
    factors = file.tensors.get("rope_freqs.weight")
    if factors is not None:
        view = memoryview(file.data)[factors.offset : factors.offset + factors.nbytes].cast("f")
        return {"rope_type": "factors", "factors": view.tolist()}
    kind = own.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling: Config = {"rope_type": kind, "factor": own.get("rope.scaling.factor", 1.0)}
    if "rope.scaling.original_context_length" in own:
        scaling["original_max_position_embeddings"] = own["rope.scaling.original_context_length"]
    return scaling


def _gguf_end_ids(file: GGUFFile) -> list[int]:
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = (file.metadata.get(f"tokenizer.ggml.{key}") for key in keys)
    return list(dict.fromkeys(id_ for id_ in found if id_ is not None))
