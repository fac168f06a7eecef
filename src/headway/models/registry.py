"""From a resolved configuration to a model that runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from headway.errors import MissingDependencyError, ModelError
from headway.models import families
from headway.models.describe import decoder_shape
from headway.models.loading.config import Config, is_gguf, read_config
from headway.models.loading.pooling import max_prompt, read_pooling
from headway.models.spec import DecoderSpec, EncoderSpec, Shard

if TYPE_CHECKING:
    from headway.config.settings import ModelConfig
    from headway.models.decoder import Decoder
    from headway.models.encoder import Encoder
    from headway.models.port import CausalModel, Comm, EncoderModel
    from headway.ops.port import Ops


def load_model(
    config: ModelConfig, ops: Ops, shard: Shard | None = None, comm: Comm | None = None
) -> CausalModel | EncoderModel:
    """Reads, shards and packs the weights for ``ops``. comm: the tensor parallel group, when there are several ranks.

    Raises ModelError (the checkpoint), ConfigError (a setting it cannot have), MissingDependencyError (extra "hf").
    """
    path = Path(config.path)
    checkpoint = read_config(path)
    shard = shard or Shard()
    families.architecture(checkpoint)
    encoder = families.encoder_spec(checkpoint)
    if encoder is not None:
        return _load_encoder(config, path, checkpoint, encoder, ops, shard, comm)
    try:
        spec = families.decoder_spec(checkpoint)
    except families.UnsupportedVariant as error:
        return _load_fallback(config, checkpoint, ops, shard, str(error))
    if spec is None:
        known = ", ".join(families.SUPPORTED)
        reason = f"model type {checkpoint['model_type']!r} is not among {known}"
        return _load_fallback(config, checkpoint, ops, shard, reason)
    return _load_decoder(config, path, checkpoint, spec, ops, shard, comm)


def _load_decoder(
    config: ModelConfig,
    path: Path,
    checkpoint: Config,
    spec: DecoderSpec,
    ops: Ops,
    shard: Shard,
    comm: Comm | None,
) -> Decoder:
    import torch

    from headway.models.decoder import Decoder
    from headway.models.loading.weights import open_weights
    from headway.models.packing import DecoderPacker

    dtype: torch.dtype = getattr(torch, config.dtype)
    packer = DecoderPacker(
        spec,
        families.weight_map(checkpoint),
        open_weights(path, checkpoint, ops, load_format=config.load_format, seed=config.seed, dtype=dtype),
        ops,
        dtype,
        quantization=config.quantization,
        shard=shard,
        with_head=config.runner == "generate" and not spec.num_labels,
    )
    weights = packer.weights()
    packer.release_source()
    return Decoder(
        spec,
        weights,
        ops,
        dtype,
        packer=packer,
        pooling_spec=read_pooling(path, checkpoint, default="last"),
        max_model_len=min(spec.max_positions, config.max_model_len),
        shard=shard,
        comm=comm,
    )


def _load_encoder(
    config: ModelConfig,
    path: Path,
    checkpoint: Config,
    spec: EncoderSpec,
    ops: Ops,
    shard: Shard,
    comm: Comm | None,
) -> Encoder:
    import torch

    from headway.models.encoder import Encoder, EncoderPacker
    from headway.models.loading.weights import open_weights

    dtype: torch.dtype = getattr(torch, config.dtype)
    source = open_weights(path, checkpoint, ops, load_format=config.load_format, seed=config.seed, dtype=dtype)
    packer = EncoderPacker(spec, shard, source, ops, dtype, config.quantization)
    weights = packer.weights()
    packer.release_source()
    return Encoder(
        spec,
        weights,
        ops,
        dtype,
        pooling_spec=read_pooling(path, checkpoint, default="mean"),
        max_positions=max_prompt(path, spec.max_positions),
        packer=packer,
        shard=shard,
        comm=comm,
    )


def _load_fallback(config: ModelConfig, checkpoint: Config, ops: Ops, shard: Shard, reason: str) -> CausalModel:
    path = Path(config.path)
    max_positions = decoder_shape(checkpoint)["max_positions"]
    if is_gguf(path):
        raise ModelError(f"{path}: {reason}")
    if importlib.util.find_spec("transformers") is None:
        raise MissingDependencyError(f"{path}: {reason}; transformers may have it: pip install 'headway[hf]'")
    from headway.models.transformers_fallback import load_with_transformers

    return load_with_transformers(config, path, checkpoint, ops, shard, max_positions)
