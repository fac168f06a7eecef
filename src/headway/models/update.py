"""Other weights for a model that runs: in the memory of those before, which everything that points to them keeps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from headway.errors import ModelError
from headway.models import families
from headway.models.loading.config import Config, read_config
from headway.models.loading.weights import StreamedWeights, WeightSource, open_weights

if TYPE_CHECKING:
    from torch import Tensor

    from headway.config.settings import ModelConfig
    from headway.models.packing import Packer
    from headway.models.port import CausalModel, EncoderModel

Weights = str | Iterable[tuple[str, "Tensor"]]


def update_weights(model: CausalModel | EncoderModel, config: ModelConfig, weights: Weights | None) -> None:
    """weights: a checkpoint's path, its tensors under their names, or None for those that the model was loaded with.

    Raises ModelError: after that the weights may be a mixture.
    """
    packer = packer_of(model)
    if weights is None or isinstance(weights, str):
        packer.refill(_open(packer, config, weights))
    else:
        source = StreamedWeights(weights, packer.names_used, packer.prefixes)
        packer.refill(source)
        source.exhaust()


def check_weights(model: CausalModel | EncoderModel, config: ModelConfig, path: str | None) -> None:
    """Raises ModelError for what can be known to be unfit before the first tensor is read. path: None for tensors."""
    packer = packer_of(model)
    if path is not None:
        _open(packer, config, path)


def _open(packer: Packer, config: ModelConfig, given: str | None) -> WeightSource:
    path = Path(given or config.path)
    described = read_config(Path(config.path) if path.suffix == ".safetensors" else path)
    if _spec(described) != _spec(read_config(Path(config.path))):
        raise ModelError(f"{path}: its configuration makes another model than {config.path}")
    load_format = "auto" if given else config.load_format
    dtype: torch.dtype = getattr(torch, config.dtype)
    return open_weights(path, described, packer.ops, load_format=load_format, seed=config.seed, dtype=dtype)


def _spec(checkpoint: Config) -> object:
    return families.encoder_spec(checkpoint) or families.decoder_spec(checkpoint)


def packer_of(model: CausalModel | EncoderModel) -> Packer:
    if model.packer is None:
        raise ModelError("this model runs with transformers: its weights cannot be updated or put to sleep")
    return model.packer
