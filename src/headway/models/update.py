"""Other weights for a model that runs: in the memory of those before, which everything that points to them keeps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from headway.errors import ModelError
from headway.models import families
from headway.models.loading.config import Config, read_config
from headway.models.loading.weights import StreamedWeights, open_weights

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
        path = Path(config.path if weights is None else weights)
        load_format = config.load_format if weights is None else "auto"
        described = read_config(Path(config.path) if path.suffix == ".safetensors" else path)
        if _spec(described) != _spec(read_config(Path(config.path))):
            raise ModelError(f"{path}: its configuration makes another model than {config.path}")
        dtype: torch.dtype = getattr(torch, config.dtype)
        source = open_weights(path, described, packer.ops, load_format=load_format, seed=config.seed, dtype=dtype)
        packer.refill(source)
    else:
        source = StreamedWeights(weights)
        packer.refill(source)
        source.exhaust()


def _spec(checkpoint: Config) -> object:
    return families.encoder_spec(checkpoint) or families.decoder_spec(checkpoint)


def packer_of(model: CausalModel | EncoderModel) -> Packer:
    if model.packer is None:
        raise ModelError("this model runs with transformers: its weights cannot be updated or put to sleep")
    return model.packer
