"""The same promises on a real model, in float32, on the best kernels of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.worker.driver import Driver, engine_config

from headway.config.settings import EngineConfig
from headway.errors import ConfigError
from headway.messages import SamplingParams
from headway.ops import get_ops
from headway.worker import Worker

# "The capital of France is", "Once upon a time", and 60 tokens of anything.
PROMPTS = [[504, 3575, 282, 4649, 314], [6403, 2311, 253, 655], list(range(1000, 1060))]


def config(path: Path) -> EngineConfig:
    try:
        get_ops("cpu")
    except ConfigError:
        return engine_config(path)
    return engine_config(path, ops="cpu", enforce_eager=False)


@pytest.fixture(scope="module")
def worker(smollm2_gguf: Path) -> Iterator[Worker]:
    worker = Worker(config(smollm2_gguf))
    worker.load()
    yield worker
    worker.close()


@pytest.fixture
def driver(worker: Worker) -> Iterator[Driver]:
    driver = Driver(worker)
    yield driver
    for slot in list(driver.sequences):
        driver.release(slot)
    driver.step({})


def test_seeded_samples_do_not_depend_on_chunks_or_company(driver: Driver) -> None:
    params = [SamplingParams(temperature=0.8), SamplingParams(top_p=0.9, top_k=40), SamplingParams(temperature=0)]
    for slot, prompt in enumerate(PROMPTS):
        driver.add(slot, prompt, sampling=params[slot], seed=slot)
    together = driver.generate(24)
    for slot in range(3):
        driver.release(slot)
    for slot, prompt in enumerate(PROMPTS):
        driver.add(slot, prompt, sampling=params[slot], seed=slot)
        assert driver.generate(24, chunk=16)[slot] == together[slot]
        driver.release(slot)
    assert len(set(together[0])) > 5


def test_log_probabilities_equal_transformers(driver: Driver, transformers_smollm2: Any) -> None:
    sequence = driver.add(0, PROMPTS[0], sampling=SamplingParams(temperature=0, logprobs=5, prompt_logprobs=5))
    driver.generate(16)
    with torch.inference_mode():
        expected = torch.log_softmax(transformers_smollm2(torch.tensor([sequence.tokens])).logits[0].double(), -1)
    rows = sequence.prompt_logprobs + sequence.logprobs
    assert sequence.output == expected[len(PROMPTS[0]) - 1 : -1].argmax(-1).tolist()
    for position, row in enumerate(rows):
        assert row.logprobs == pytest.approx(expected[position, row.token_ids].tolist(), abs=1e-4)


def test_a_sampled_distribution_is_the_models(driver: Driver) -> None:
    """The first token of 400 seeds against the probabilities that greedy decoding reports."""
    greedy = driver.add(0, PROMPTS[0], sampling=SamplingParams(temperature=0, logprobs=8))
    driver.generate(1)
    driver.release(0)
    expected = dict(zip(greedy.logprobs[0].token_ids[1:], np.exp(greedy.logprobs[0].logprobs[1:]), strict=True))
    drawn: list[int] = []
    for seed in range(0, 400, 8):
        for slot in range(8):
            driver.add(slot, PROMPTS[0], sampling=SamplingParams(), seed=seed + slot)
        drawn += [output[0] for output in driver.generate(1).values()]
        for slot in range(8):
            driver.release(slot)
    for token, probability in expected.items():
        deviation = (probability * (1 - probability) / len(drawn)) ** 0.5
        assert abs(drawn.count(token) / len(drawn) - probability) < 4 * deviation
