"""The memory of a worker's weights and cache, and what is done with it between steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headway.models.update import check_weights, packer_of, update_weights
from headway.ops.cpu.memory import drop_pages

if TYPE_CHECKING:
    from headway.config.settings import ModelConfig
    from headway.models.port import CausalModel, EncoderModel
    from headway.models.update import Weights
    from headway.ops.port import KVCache


class WorkerMemory:
    """Nothing ever moves, so a compiled step stays valid. kv: None for an encoder."""

    def __init__(self, model: CausalModel | EncoderModel, kv: KVCache | None, config: ModelConfig) -> None:
        self._model, self._kv, self._config = model, kv, config

    def check_weights(self, path: str | None) -> None:
        check_weights(self._model, self._config, path)

    def update_weights(self, weights: Weights | None) -> None:
        """None: those that the model was loaded with."""
        update_weights(self._model, self._config, weights)

    def sleep(self, level: int) -> None:
        """Gives back the cache's pages, at level 2 the weights' too; they read as zeros from then on."""
        tensors = [] if self._kv is None else self._kv.tensors()
        if level > 1:
            tensors = tensors + packer_of(self._model).tensors()
        for tensor in tensors:
            drop_pages(tensor)
