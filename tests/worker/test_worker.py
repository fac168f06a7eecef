"""A worker's tokens depend on a request alone: not on how it is cut into steps, its company, its slot or its blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.worker.driver import BLOCK, Driver, engine_config
from tests.worker.plans import plan, start, tokens_of

from headway.messages import PoolingParams, SamplingParams, StructuredOutput
from headway.worker import Worker

VOCAB = 211
NewDriver = Callable[[], Driver]
RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(3, VOCAB, n).tolist() for n in (40, 3, 17, 1, 25)]
VARIED: list[dict[str, Any]] = [
    {"sampling": SamplingParams(temperature=0)},
    {"sampling": SamplingParams(temperature=0.9), "seed": 1},
    {"sampling": SamplingParams(temperature=1.2, top_k=20, top_p=0.9), "seed": 2},
    {"sampling": SamplingParams(repetition_penalty=1.3, min_p=0.05), "seed": 3},
    {"sampling": SamplingParams(temperature=0, presence_penalty=1.0, frequency_penalty=0.5, logprobs=2)},
]


def fill(driver: Driver, order: list[int]) -> None:
    for slot in order:
        driver.add(slot, PROMPTS[slot], **VARIED[slot])


@pytest.fixture
def together(new_driver: NewDriver) -> dict[int, list[int]]:
    driver = new_driver()
    fill(driver, [0, 1, 2, 3, 4])
    return driver.generate(12)


def test_greedy_tokens_and_logprobs_equal_transformers(new_driver: NewDriver, tiny_llama: tuple[Any, Path]) -> None:
    driver = new_driver()
    params = SamplingParams(temperature=0, logprobs=3, prompt_logprobs=2)
    sequence = driver.add(2, PROMPTS[0], sampling=params)
    driver.generate(10, chunk=16)
    with torch.inference_mode():
        reference = torch.log_softmax(tiny_llama[0](torch.tensor([sequence.tokens])).logits[0].double(), -1)
    assert sequence.output == reference[len(PROMPTS[0]) - 1 : -1].argmax(-1).tolist()
    rows = sequence.prompt_logprobs + sequence.logprobs
    assert len(rows) == len(sequence.tokens) - 1
    for position, row in enumerate(rows):
        expected = reference[position]
        count = 2 if position < len(PROMPTS[0]) - 1 else 3
        assert row.token_ids[0] == sequence.tokens[position + 1]
        assert row.token_ids[1:] == expected.topk(count).indices.tolist()
        assert row.logprobs == pytest.approx(expected[row.token_ids].tolist(), abs=1e-4)
        assert row.rank == 1 + int((expected > expected[row.token_ids[0]]).sum())


def test_all_kernels_draw_the_same_tokens(new_driver: NewDriver, reference_driver: Driver) -> None:
    """Eight seeds of every way to filter."""
    filters = [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 40, "top_p": 0.9, "min_p": 0.02}]
    for params in filters:
        drivers = [new_driver(), reference_driver]
        outputs: list[dict[int, list[int]]] = []
        for driver in drivers:
            for slot in range(8):
                driver.add(slot, PROMPTS[2], sampling=SamplingParams(temperature=1.1, **params), seed=100 + slot)
            outputs.append(driver.generate(10))
            for slot in range(8):
                driver.release(slot)
        assert outputs[0] == outputs[1], params


def test_chunked_prefill_equals_whole(new_driver: NewDriver, together: dict[int, list[int]]) -> None:
    driver = new_driver()
    fill(driver, [0, 1, 2, 3, 4])
    assert driver.generate(12, chunk=7) == together


def test_alone_equals_batched(new_driver: NewDriver, together: dict[int, list[int]]) -> None:
    driver = new_driver()
    for slot in range(5):
        fill(driver, [slot])
        assert driver.generate(12)[slot] == together[slot]
        driver.release(slot)


def test_the_order_of_a_batch_does_not_matter(new_driver: NewDriver, together: dict[int, list[int]]) -> None:
    driver = new_driver()
    fill(driver, [3, 1, 4, 0, 2])
    assert driver.generate(12) == together


def test_preempted_equals_not_preempted(new_driver: NewDriver, together: dict[int, list[int]]) -> None:
    driver = new_driver()
    fill(driver, [0, 1, 2, 3, 4])
    driver.generate(5)
    for slot in (1, 2, 3):
        driver.preempt(slot, new_slot=8 - slot if slot > 1 else 1)
    outputs = driver.generate(12)
    assert [outputs[s] for s in (0, 1, 6, 5, 4)] == [together[s] for s in range(5)]


def test_a_prefix_hit_equals_a_computed_prefix(new_driver: NewDriver) -> None:
    driver = new_driver()
    first = driver.add(0, PROMPTS[0])
    whole = driver.generate(6)[0]
    driver.add_sharing(1, PROMPTS[0], first, blocks=2)
    assert first.blocks[:2] == driver.sequences[1].blocks
    assert driver.sequences[1].left == len(PROMPTS[0]) - 2 * BLOCK
    assert driver.generate(6)[1] == whole


def test_a_masked_slot_takes_an_allowed_token(new_driver: NewDriver) -> None:
    driver = new_driver()
    driver.add(0, PROMPTS[0])
    driver.add(1, PROMPTS[1], sampling=SamplingParams(temperature=0, structured=StructuredOutput(regex="a")))
    allowed = np.zeros(VOCAB, bool)
    allowed[[7, 90]] = True
    driver.step({0: len(PROMPTS[0]), 1: len(PROMPTS[1])}, masks={1: np.packbits(allowed, bitorder="little").tobytes()})
    assert driver.sequences[1].output[0] in (7, 90)
    driver.release(1)
    driver.add(3, PROMPTS[0])
    driver.generate(4)
    assert driver.sequences[3].output == driver.sequences[0].output


def test_masks_are_asked_for_once_and_only_where_a_plan_says_so(new_driver: NewDriver) -> None:
    worker, asked = new_driver().worker, []

    def masks(step: int) -> dict[int, bytes]:
        asked.append(step)
        return {0: b"\xff" * 32}

    params = SamplingParams(temperature=0, structured=StructuredOutput(regex="a"))
    worker.step(plan(7, starts=[start(0, [5, 6], [1], sampling=params)], runs=[(0, 1)]), masks)
    assert asked == []
    worker.step(plan(8, runs=[(0, 1)], masked_slots=[0]), masks)
    assert asked == [8]


def test_a_run_that_does_not_reach_the_end_samples_nothing(new_driver: NewDriver) -> None:
    driver = new_driver()
    driver.add(0, PROMPTS[0])
    driver.add(1, PROMPTS[1])
    result = driver.step({0: 10, 1: 3})
    assert tokens_of(result)[0] == -1
    assert tokens_of(result)[1] == driver.sequences[1].output[0]
    assert set(result.times_ns) == {"prepare", "model", "sample", "start", "end"}


def test_a_plan_without_runs_computes_nothing(new_driver: NewDriver) -> None:
    driver = new_driver()
    driver.add(0, PROMPTS[0])
    driver.generate(2)
    driver.release(0)
    result = driver.step({})
    assert (result.tokens, result.logprobs) == (b"", {})


def test_an_error_in_a_step_reaches_the_caller(new_driver: NewDriver) -> None:
    worker = new_driver().worker
    with pytest.raises(AssertionError, match="past its slot's known tokens"):
        worker.step(plan(starts=[start(0, [5], [1])], runs=[(0, 2)]), lambda step: {})


def test_a_decoder_pools_the_last_token_beside_generation(new_driver: NewDriver, tiny_llama: tuple[Any, Path]) -> None:
    driver = new_driver()
    driver.add(0, PROMPTS[0], pooling=PoolingParams(normalize=True))
    driver.add(1, PROMPTS[1])
    first = driver.step({0: 30, 1: 3})
    assert first.pooled == {}
    second = driver.step({0: 10, 1: 1})
    assert tokens_of(second)[0] == -1
    with torch.inference_mode():
        hidden = tiny_llama[0].model(torch.tensor([PROMPTS[0]])).last_hidden_state[0, -1]
    expected = (hidden / hidden.norm()).numpy()
    assert np.frombuffer(second.pooled[0], np.float32) == pytest.approx(expected, abs=1e-5)


def test_an_encoder_pools_packed_prompts_like_single_ones(minilm_dir: Path) -> None:
    worker = Worker(engine_config(minilm_dir, runner="pooling"))
    info = worker.load()
    assert (info.program, info.kv_bytes) == (False, 0)
    prompts = [[101, 2023, 2003, 102], [101, 7592, 102], [101, *range(2000, 2040), 102]]
    pooling = PoolingParams()
    starts = [start(i, p, pooling=pooling) for i, p in enumerate(prompts)]
    packed = worker.step(plan(starts=starts, runs=[(i, len(p)) for i, p in enumerate(prompts)]), lambda step: {})
    assert tokens_of(packed) == [-1, -1, -1]
    for i, prompt in enumerate(prompts):
        one = plan(releases=[i], starts=[start(i, prompt, pooling=pooling)], runs=[(i, len(prompt))])
        alone = np.frombuffer(worker.step(one, lambda step: {}).pooled[i], np.float32)
        assert np.linalg.norm(alone) == pytest.approx(1, abs=1e-5)
        assert np.frombuffer(packed.pooled[i], np.float32) == pytest.approx(alone, abs=1e-5)
