"""Many prompts of one event loop, without a coroutine for each."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.llm.conftest import FakeFrontends

from headway import LLM, AsyncLLM, SamplingParams
from headway.errors import EngineError, RequestError
from headway.executor.fake import FakeModel
from headway.llm.prompts import PromptInput
from headway.llm.stream import Answer
from headway.messages import RequestOutput


async def answers(llm: AsyncLLM, prompts: list[Any], params: list[SamplingParams], batch: int) -> dict[int, Answer]:
    """Of all prompts, which are handed over some at a time."""
    found: dict[int, Answer] = {}
    complete = asyncio.Event()

    def take(some: list[tuple[int, Answer]]) -> None:
        assert not found.keys() & {key for key, _ in some}, "a prompt was answered twice"
        found.update(some)
        if len(found) == len(prompts):
            complete.set()

    stream = llm.stream(take)
    for start in range(0, len(prompts), batch):
        keys = range(start, min(start + batch, len(prompts)))
        stream.submit(keys, [prompts[i] for i in keys], [params[i] for i in keys])
        await asyncio.sleep(0)
    await asyncio.wait_for(complete.wait(), 60)
    return found


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_every_prompt_is_answered_as_by_itself(fake: FakeFrontends, batch: int) -> None:
    prompts = [f"Prompt {i}" for i in range(40)]
    params = [SamplingParams(max_tokens=1 + i % 5, seed=i, n=1 + i % 3) for i in range(40)]
    with LLM.over(*fake()) as llm:
        expected = [output.outputs for output in llm.generate([byte_ids(p) for p in prompts], params)]

    async def run() -> None:
        async with AsyncLLM.over(*fake()) as llm:
            found = await answers(llm, [byte_ids(p) for p in prompts], params, batch)
            got = [found[i] for i in range(40)]
            assert [output.outputs for output in got if isinstance(output, RequestOutput)] == expected

    asyncio.run(run())


def test_a_prompt_that_cannot_be_honoured_costs_the_others_nothing(fake: FakeFrontends) -> None:
    async def run() -> None:
        async with AsyncLLM.over(*fake()) as llm:
            prompts = [byte_ids("good"), [], byte_ids("x" * 600), 7, byte_ids("good too")]
            found = await answers(llm, prompts, [SamplingParams()] * 5, 5)
        assert [isinstance(found[i], RequestOutput) for i in range(5)] == [True, False, False, False, True]
        assert all(isinstance(found[i], RequestError) for i in (1, 2, 3))

    asyncio.run(run())


def test_each_prompt_hears_what_ended_the_engine_once(fake: FakeFrontends) -> None:
    async def run() -> None:
        async with AsyncLLM.over(*fake(FakeModel(fail_at_step=3))) as llm:
            params = [SamplingParams(max_tokens=2 if i == 0 else 50, n=2) for i in range(20)]
            found = await answers(llm, [byte_ids("a")] * 20, params, 20)
            assert isinstance(found[0], RequestOutput)
            assert all(isinstance(found[i], EngineError) for i in range(1, 20))
            later = await answers(llm, [byte_ids("a")], [SamplingParams()], 1)
            assert isinstance(later[0], EngineError)

    asyncio.run(run())


def test_a_closed_stream_runs_no_more(fake: FakeFrontends) -> None:
    async def run() -> None:
        async with AsyncLLM.over(*fake(FakeModel(latency_s=0.001))) as llm:
            stream = llm.stream(lambda found: pytest.fail(f"heard of {found}"))
            stream.submit([1], [byte_ids("a")], [SamplingParams(max_tokens=400)])
            stream.close()
            async for _ in llm.generate(byte_ids("b"), SamplingParams(max_tokens=3), stream=False):
                pass
            assert llm.metrics().running == 0

    asyncio.run(run())


def byte_ids(text: str) -> PromptInput:
    """The fake model's vocabulary is bytes."""
    return PromptInput(token_ids=list(text.encode()))
