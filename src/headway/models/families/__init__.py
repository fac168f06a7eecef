"""Which configurations have an implementation here. A family is a function from config.json to a spec. No torch."""

from __future__ import annotations

from headway.errors import ModelError
from headway.models.families import bert, gpt2, llama, opt
from headway.models.families.common import Config, UnsupportedVariant, WeightMap
from headway.models.spec import DecoderSpec, EncoderSpec

_DECODERS = {"llama": llama, "mistral": llama, "qwen2": llama, "qwen3": llama, "opt": opt, "gpt2": gpt2}
_ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert")
_HEADS = ("ForCausalLM", "LMHeadModel", "ForSequenceClassification", "Model", "ForMaskedLM", "ForPreTraining")

SUPPORTED = (*_DECODERS, *_ENCODERS)

__all__ = ["SUPPORTED", "UnsupportedVariant", "architecture", "decoder_spec", "encoder_spec", "weight_map"]


def architecture(config: Config) -> str:
    """The class that the checkpoint declares. Raises ModelError for a head that nothing here uses."""
    names: list[str] = config.get("architectures") or []
    name = names[0] if names else f"{config['model_type']}Model"
    if not name.endswith(_HEADS):
        raise ModelError(f"config.json: architecture {name} is not supported: its name must end in {', '.join(_HEADS)}")
    return name


def decoder_spec(config: Config) -> DecoderSpec | None:
    """None where the model type is none of ours; UnsupportedVariant where an option of it is not."""
    family = _DECODERS.get(config["model_type"])
    return None if family is None else family.spec(config)


def encoder_spec(config: Config) -> EncoderSpec | None:
    return bert.spec(config) if config["model_type"] in _ENCODERS else None


def weight_map(config: Config) -> WeightMap:
    return _DECODERS[config["model_type"]].WEIGHTS
