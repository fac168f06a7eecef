"""Workers on a tiny random Llama, on each set of kernels, and on real models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.worker.driver import Driver, engine_config

from headway.errors import ConfigError
from headway.ops import get_ops
from headway.worker import Worker

# name: kernels, operation by operation
KERNELS = {"reference": ("reference", True), "cpu-operations": ("cpu", True), "cpu-program": ("cpu", False)}
VOCAB = 211


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """(transformers model, its directory)."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    path = tmp_path_factory.mktemp("tiny-llama")
    model.save_pretrained(path)
    return model, path


@pytest.fixture(params=list(KERNELS))
def new_driver(request: pytest.FixtureRequest, tiny_llama: tuple[Any, Path]) -> Iterator[Callable[[], Driver]]:
    """Every call gives a driver of a fresh worker."""
    ops, eager = KERNELS[request.param]
    try:
        get_ops(ops)
    except ConfigError as error:
        pytest.skip(str(error))
    workers: list[Worker] = []

    def make() -> Driver:
        worker = Worker(engine_config(tiny_llama[1], ops=ops, enforce_eager=eager))
        info = worker.load()
        assert info.program == (request.param == "cpu-program")
        workers.append(worker)
        return Driver(worker)

    yield make
    for worker in workers:
        worker.close()


@pytest.fixture(scope="session")
def reference_driver(tiny_llama: tuple[Any, Path]) -> Iterator[Driver]:
    """A driver of a worker on the reference kernels."""
    worker = Worker(engine_config(tiny_llama[1]))
    worker.load()
    yield Driver(worker)
    worker.close()
