"""Weights that come one by one into a model that is loaded."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.config.settings import ModelConfig
from headway.models.spec import Shard
from headway.models.update import update_weights

Make = Callable[..., Any]


class Stream:
    """Tensors that are copies made one by one; ``most`` were alive at a time."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.most = 0
        self._tensors = tensors

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        arrays: list[weakref.ref[Any]] = []
        for name, tensor in self._tensors.items():
            array = tensor.detach().numpy().copy()
            arrays.append(weakref.ref(array))
            yield name, torch.from_numpy(array)
            del array
            self.most = max(self.most, sum(ref() is not None for ref in arrays))


def config_of(path: Path) -> ModelConfig:
    return ModelConfig(path=str(path), served_model_name="m", dtype="float32")


@pytest.mark.parametrize("stage", [0, 1])
def test_few_of_the_tensors_that_come_are_held(stage: int, checkpoint: Make, load: Make) -> None:
    reference, path = checkpoint("llama", num_hidden_layers=8)
    model = load(path, Shard(pipeline_rank=stage, pipeline_size=2, stage_layers=(4, 4)))
    before = [tensor.clone() for tensor in model.packer.tensors()]
    stream = Stream({name: tensor * 2 for name, tensor in reference.state_dict().items()})
    update_weights(model, config_of(path), stream)
    assert stream.most <= 10  # the embedding and a layer
    assert all(torch.equal(now, was * 2) for now, was in zip(model.packer.tensors(), before, strict=True))


@pytest.mark.parametrize(("name", "kind", "prefix"), [("gpt2", "ForCausalLM", "transformer."), ("bert", "Model", "")])
def test_names_may_lack_the_bodys_prefix_or_have_it(
    name: str, kind: str, prefix: str, checkpoint: Make, load: Make
) -> None:
    reference, path = checkpoint(name, kind)
    model = load(path)
    before = [tensor.clone() for tensor in model.packer.tensors()]
    tensors = {
        (name.removeprefix(prefix) if prefix else f"bert.{name}"): tensor * 2
        for name, tensor in reference.state_dict().items()
    }
    update_weights(model, config_of(path), tensors.items())
    assert all(torch.equal(now, was * 2) for now, was in zip(model.packer.tensors(), before, strict=True))
