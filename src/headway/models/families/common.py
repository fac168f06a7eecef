"""What family modules share: the weight map, rotary frequencies, configuration values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headway.errors import ModelError
from headway.models.spec import Activation, RotarySpec

Config = dict[str, Any]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class UnsupportedVariant(ModelError):
    """A known architecture with an option that this implementation lacks; transformers may have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMap:
    """Where a checkpoint keeps each part, as names without ".weight" and ".bias".

    prefixes: of the body, tried in order (a bare model is saved without its own). layer: prefix of layer {}'s parts.
    parts: of a layer; several names are rows one after the other; one name may hold them all already.
    transposed: layer linears are stored [K, N].
    """

    prefixes: tuple[str, ...]
    layer: str
    parts: Mapping[str, tuple[str, ...]]
    embed: str
    positions: str = ""
    final_norm: str = ""
    project_in: str = ""
    project_out: str = ""
    head: str = "lm_head"
    score: str = "score"
    transposed: bool = False


def required(config: Config, key: str) -> Any:
    """The value, or ModelError naming the key."""
    if config.get(key) is None:
        raise ModelError(f"config.json: {key} is missing")
    return config[key]


def activation(config: Config, key: str, default: str) -> Activation:
    name = config.get(key, default)
    if name not in _ACTIVATIONS:
        raise UnsupportedVariant(f"config.json: {key}={name!r}: must be one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def num_labels(config: Config) -> int:
    """Labels of the classification head that the architecture's name declares, else 0."""
    names: list[str] = config.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in names):
        return 0
    labels = config.get("id2label")
    return len(labels) if labels else int(config.get("num_labels", 2))


def rotary(config: Config, head_dim: int) -> RotarySpec:
    """Frequencies with the configured scaling. Both of transformers' spellings are read (rope_parameters since 5.0)."""
    rope: Config = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    dim = int(head_dim * (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0))
    plain = [theta ** (-i / dim) for i in range(0, dim, 2)]
    kind = rope.get("rope_type") or rope.get("type") or "default"
    match kind:
        case "default" | "none" | "mrope":
            frequencies, scale = plain, 1.0
        case "dynamic":
            # Changes nothing within max_position_embeddings, and further than that no request goes.
            frequencies, scale = plain, 1.0
        case "linear":
            frequencies, scale = [f / rope["factor"] for f in plain], 1.0
        case "factors":
            frequencies, scale = [f / g for f, g in zip(plain, rope["factors"], strict=True)], 1.0
        case "llama3":
            frequencies, scale = [_llama3(f, rope) for f in plain], 1.0
        case "yarn":
            frequencies, scale = _yarn(plain, theta, dim, rope, config)
        case _:
            raise UnsupportedVariant(f"config.json: rope type {kind!r} is not supported")
    return RotarySpec(dim=dim, inv_freq=tuple(frequencies), attention_scale=scale)


def max_positions(config: Config) -> int:
    """Longest sequence; yarn states the length before scaling apart from the factor."""
    limit = int(required(config, "max_position_embeddings"))
    rope: Config = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    if (rope.get("rope_type") or rope.get("type")) == "yarn" and rope.get("factor"):
        limit = max(limit, int(rope["factor"] * rope.get("original_max_position_embeddings", limit)))
    return limit


def _llama3(frequency: float, rope: Config) -> float:
    """Long wavelengths are stretched by the factor, short ones kept, those between blended."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    if turns < low:
        return frequency / rope["factor"]
    if turns > high:
        return frequency
    blend = (turns - low) / (high - low)
    return (1 - blend) * frequency / rope["factor"] + blend * frequency


def _yarn(plain: list[float], theta: float, dim: int, rope: Config, config: Config) -> tuple[list[float], float]:
    """https://arxiv.org/abs/2309.00071"""
    trained = rope.get("original_max_position_embeddings") or required(config, "max_position_embeddings")
    factor = rope.get("factor") or config["max_position_embeddings"] / trained

    def bound(turns: float) -> float:
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = bound(rope.get("beta_fast") or 32), bound(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = (high - low) or 0.001
    ramp = [min(max((i - low) / width, 0.0), 1.0) for i in range(len(plain))]
    frequencies = [f / factor * r + f * (1 - r) for f, r in zip(plain, ramp, strict=True)]
    return frequencies, _yarn_scale(factor, rope)


def _yarn_scale(factor: float, rope: Config) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return mscale(1.0)
