"""Engines in processes of their own, behind AsyncLLM and LLM, with a tiny model."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.conformance.scenarios import what_is_left

from headway import LLM, AsyncLLM, SamplingParams
from headway.engine.metrics import EngineMetrics
from headway.errors import ConfigError, EngineDead, EngineError, ModelError, RequestError
from headway.llm.frontend import find
from headway.llm.replicas import start_engines

PROMPTS = [[5 + i, 6, 7] for i in range(12)]
PARAMS = [SamplingParams(temperature=i % 2, seed=i, max_tokens=12, ignore_eos=True) for i in range(12)]


@pytest.fixture
def settings(tiny_opt: Path) -> dict[str, Any]:
    return {"model": str(tiny_opt), "load_format": "dummy", "max_model_len": 2048, "threads": 1, "max_num_seqs": 16}


@pytest.fixture
def expected(settings: dict[str, Any]) -> list[list[int]]:
    """Of one engine in this process."""
    with LLM(**settings) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]


async def tokens(llm: AsyncLLM, prompt: Any, params: SamplingParams, **options: Any) -> list[int]:
    return [token async for d in llm.generate(prompt, params, **options) for token in d.outputs[0].token_ids]


async def settled(llm: AsyncLLM) -> EngineMetrics:
    for _ in range(500):
        metrics = llm.metrics()
        if metrics.running == metrics.waiting == metrics.blocks_used == 0:
            return metrics
        await asyncio.sleep(0.01)
    raise AssertionError(llm.metrics())


async def test_streams_of_two_replicas_are_those_of_one_engine(
    settings: dict[str, Any], expected: list[list[int]]
) -> None:
    async with AsyncLLM(**settings, data_parallel_size=2) as llm:
        answers = await asyncio.gather(*(tokens(llm, *one) for one in zip(PROMPTS, PARAMS)))
        assert answers == expected
        assert [health.up for health in llm.health()] == [True, True]
        metrics = await settled(llm)
        assert (metrics.prompt_tokens, metrics.generated_tokens) == (36, 144)
        for rank in (0, 1):
            assert await tokens(llm, PROMPTS[3], PARAMS[3], data_parallel_rank=rank) == expected[3]
        with pytest.raises(RequestError, match="data_parallel_rank=2: must be a replica, 0 to 1"):
            await tokens(llm, PROMPTS[3], PARAMS[3], data_parallel_rank=2)
        await left_and_aborted(llm)
        await all_asleep(llm, expected)


async def left_and_aborted(llm: AsyncLLM) -> None:
    long = SamplingParams(max_tokens=2000, ignore_eos=True)
    before = llm.metrics().generated_tokens
    left, aborted = (llm.generate([1, 2], long, request_id=name) for name in ("left", "aborted"))
    await anext(left)
    await anext(aborted)
    await left.aclose()
    llm.abort("aborted")
    assert [d.outputs[0].finish_reason async for d in aborted][-1] == "abort"
    assert (await settled(llm)).generated_tokens < before + 4000


async def all_asleep(llm: AsyncLLM, expected: list[list[int]]) -> None:
    busy = llm.generate([1, 2], SamplingParams(max_tokens=2000, ignore_eos=True))
    await anext(busy)
    with pytest.raises(EngineError, match="requests are running"):
        await llm.sleep(1)
    await busy.aclose()
    await settled(llm)
    await llm.sleep(2)
    for rank in (0, 1):
        with pytest.raises(EngineError, match="the engine sleeps"):
            await tokens(llm, [1], PARAMS[0], data_parallel_rank=rank)
    with pytest.raises(ConfigError, match="level"):
        await llm.sleep(3)  # pyright: ignore
    await llm.wake_up()
    for rank in (0, 1):
        assert await tokens(llm, PROMPTS[1], PARAMS[1], data_parallel_rank=rank) == expected[1]


def test_llm_with_two_replicas_answers_as_one_engine_and_leaves_nothing(
    settings: dict[str, Any], expected: list[list[int]]
) -> None:
    before = what_is_left()
    with LLM(**settings, data_parallel_size=2) as llm:
        outputs = llm.generate(PROMPTS, PARAMS)
        assert [output.outputs[0].token_ids for output in outputs] == expected
        assert llm.metrics().generated_tokens == 144
        assert len(set(llm.executor_info.pids)) == 2
        with pytest.raises(RequestError):
            llm.generate([[1 << 20]])
        llm.sleep(1)
        with pytest.raises(EngineError, match="sleeps"):
            llm.generate(PROMPTS[0])
        llm.wake_up()
        assert llm.generate([PROMPTS[2]], PARAMS[2])[0].outputs[0].token_ids == expected[2]
    assert what_is_left() <= before
    with pytest.raises(EngineDead, match="closed"):
        llm.generate(PROMPTS[0])


def test_what_no_replica_can_load_is_the_callers_error_and_leaves_nothing(minilm_dir: Path, tmp_path: Path) -> None:
    for file in minilm_dir.iterdir():
        if file.is_file():
            (tmp_path / file.name).symlink_to(file)
    weights = tmp_path / "model.safetensors"
    weights.unlink()
    weights.write_bytes((minilm_dir / "model.safetensors").read_bytes()[:-1000])
    before = what_is_left()
    with pytest.raises(ModelError):
        LLM(str(tmp_path), data_parallel_size=2)
    assert what_is_left() <= before


async def test_several_front_ends_share_the_engines(settings: dict[str, Any], expected: list[list[int]]) -> None:
    before = what_is_left()
    supervisor, seat = start_engines(find(**settings, data_parallel_size=2))
    links = [supervisor.seat(), supervisor.seat()]
    fronts = [AsyncLLM.over(*seat.join(link)) for link in links]
    answers = [tokens(fronts[i % 2], prompt, params) for i, (prompt, params) in enumerate(zip(PROMPTS, PARAMS))]
    assert await asyncio.gather(*answers) == expected
    for front in fronts:
        while (await settled(front)).generated_tokens < 144:  # a front end hears a moment later what others did
            await asyncio.sleep(0.01)
    fronts[0].close()
    running = fronts[1].generate([1, 2], SamplingParams(max_tokens=400, ignore_eos=True))
    await anext(running)
    supervisor.close()
    with pytest.raises(EngineDead):
        async for _ in running:
            pass
    fronts[1].close()
    assert what_is_left() <= before
