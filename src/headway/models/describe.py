"""A checkpoint's facts from its metadata alone. Knows neither torch nor transformers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal

from headway.config.facts import ModelFacts
from headway.config.settings import Dtype
from headway.errors import ModelError
from headway.gguf import GGUFFile
from headway.models import families
from headway.models.families.common import Config, num_labels
from headway.models.loading.config import config_from_gguf, is_gguf, read_config, read_json
from headway.models.loading.pooling import max_prompt
from headway.models.loading.safetensors_file import read_headers

_DTYPES: dict[str, Dtype] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

# What sizes a decoder that only transformers knows.
_SIZES = ("num_attention_heads", "hidden_size", "vocab_size", "num_hidden_layers")
# What decoders call the longest sequence.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def describe(path: str | Path) -> ModelFacts:
    """Facts of a model directory or .gguf file. Raises ModelError when it is not one, not whole, or not supported."""
    path = Path(path)
    if not is_gguf(path):
        return _facts(path, read_config(path), _directory_storage(path))
    file = GGUFFile(path)
    return _facts(path, config_from_gguf(file), _gguf_storage(file))


def _facts(path: Path, config: Config, storage: dict[str, Any]) -> ModelFacts:
    name = families.architecture(config)
    shape = _encoder_shape(path, config) or decoder_shape(config)
    labels = num_labels(config)
    if not storage["weights_bytes"]:  # no files: random weights. Every family has about so many in a layer
        size = shape["hidden_size"]
        storage["num_parameters"] = shape["vocab_size"] * size + 12 * shape["num_layers"] * size * size
    body: Literal["encoder", "decoder"] = "decoder" if shape["num_kv_heads"] else "encoder"
    return ModelFacts(
        architecture=name,
        kind="classifier" if labels else body,
        num_labels=labels,
        eos_token_ids=_end_ids(path, config),
        **shape,
        **storage,
    )


def _encoder_shape(path: Path, config: Config) -> dict[str, int] | None:
    spec = families.encoder_spec(config)
    if spec is None:
        return None
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_layers": spec.num_layers,
        "num_heads": spec.num_heads,
        "num_kv_heads": 0,
        "head_dim": spec.hidden_size // spec.num_heads,
        "max_positions": max_prompt(path, spec.max_positions),
        "token_types": spec.token_types,
    }


def decoder_shape(config: Config) -> dict[str, Any]:
    """The fields of ModelFacts that size a decoder. Raises ModelError where neither we nor transformers can run it."""
    try:
        spec = families.decoder_spec(config)
    except families.UnsupportedVariant:
        spec = None
    if spec is None:
        return _unknown_decoder_shape(config)
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_layers": spec.num_layers,
        "num_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "head_layers": 0 if spec.num_labels else spec.head_layers,
        "max_positions": spec.max_positions,
    }


def _unknown_decoder_shape(config: Config) -> dict[str, int]:
    """A decoder that transformers may run; its configuration must use the common keys."""
    name = families.architecture(config)
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        known = ", ".join(families.SUPPORTED)
        raise ModelError(f"architecture {name} is not supported; supported are the model types {known}")
    positions = next((config[key] for key in _POSITIONS if config.get(key)), None)
    missing = [key for key in _SIZES if config.get(key) is None]
    if positions is None:
        missing.append(" or ".join(_POSITIONS))
    if missing:
        known = ", ".join(families.SUPPORTED)
        raise ModelError(
            f"architecture {name} is not among the supported model types {known}, and config.json lacks what running "
            f"it with transformers takes: {', '.join(missing)}"
        )
    heads, hidden_size = config["num_attention_heads"], config["hidden_size"]
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": hidden_size,
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or hidden_size // heads,
        "max_positions": positions,
    }


def _directory_storage(path: Path) -> dict[str, Any]:
    tensors = read_headers(path).values()
    if not tensors:
        pickled = path / "pytorch_model.bin"
        size = pickled.stat().st_size if pickled.exists() else 0
        return {"dtype": "float32", "weights_bytes": size, "num_parameters": size // 4}
    by_type: Counter[str] = Counter()
    for tensor in tensors:
        by_type[tensor.dtype] += tensor.num_elements
    return {
        "dtype": _DTYPES.get(by_type.most_common(1)[0][0], "bfloat16"),
        "weights_bytes": sum(tensor.nbytes for tensor in tensors),
        "num_parameters": by_type.total(),
    }


def _gguf_storage(file: GGUFFile) -> dict[str, Any]:
    by_type: Counter[str] = Counter()
    for tensor in file.tensors.values():
        by_type[tensor.type_name] += tensor.num_elements
    return {
        "dtype": _DTYPES.get(by_type.most_common(1)[0][0], "bfloat16"),
        "weights_bytes": sum(tensor.nbytes for tensor in file.tensors.values()),
        "num_parameters": by_type.total(),
    }


def _end_ids(path: Path, config: Config) -> tuple[int, ...]:
    """Of the configuration and the generation configuration: chat models add their end of turn in the latter."""
    generation: Config = ({} if is_gguf(path) else read_json(path / "generation_config.json")) or {}
    found: list[int] = []
    for value in (generation.get("eos_token_id"), config.get("eos_token_id")):
        found += [value] if isinstance(value, int) else value or []
    return tuple(dict.fromkeys(found))
