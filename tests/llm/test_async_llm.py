"""AsyncLLM over the fake executor: streams, aborts, many callers."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
from tests.llm.conftest import FACTS, FakeFrontends

from headway.errors import EngineDead, RequestError
from headway.executor.fake import FakeModel
from headway.llm import LLM, AsyncLLM
from headway.messages import PoolingParams, RequestOutput, SamplingParams

SEEDED = SamplingParams(seed=7, max_tokens=12, ignore_eos=True)


async def idle(llm: AsyncLLM) -> None:
    """Waits until the engine has let go of every request."""
    for _ in range(500):
        stats = llm.metrics()
        if stats.running == stats.waiting == stats.blocks_used == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(llm.metrics())


async def text_of(llm: AsyncLLM, prompt: list[int], params: SamplingParams) -> str:
    return "".join([d.outputs[0].text async for d in llm.generate(prompt, params)])


async def test_deltas_join_to_what_llm_returns(fake: FakeFrontends) -> None:
    with LLM.over(*fake()) as llm:
        (whole,) = llm.generate([50, 51], SEEDED)
    async with AsyncLLM.over(*fake(FakeModel(latency_s=0.02))) as llm:
        deltas = [d async for d in llm.generate([50, 51], SEEDED, request_id="r1")]
    assert "".join(d.outputs[0].text for d in deltas) == whole.outputs[0].text
    assert [t for d in deltas for t in d.outputs[0].token_ids] == whole.outputs[0].token_ids
    assert len(deltas) > 2
    assert {d.request_id for d in deltas} == {"r1"}
    assert deltas[-1].finished and deltas[-1].outputs[0].finish_reason == "length"


async def test_without_stream_the_whole_comes_once(fake: FakeFrontends) -> None:
    params = SamplingParams(n=2, seed=3, max_tokens=5)
    async with AsyncLLM.over(*fake()) as llm:
        (whole,) = [o async for o in llm.generate([50], params, stream=False)]
    assert [len(c.token_ids) for c in whole.outputs] == [5, 5]


async def test_many_callers_get_their_own_answers(fake: FakeFrontends) -> None:
    async with AsyncLLM.over(*fake()) as llm:
        alone = [await text_of(llm, [50 + i], SEEDED) for i in range(20)]
        together = await asyncio.gather(*(text_of(llm, [50 + i], SEEDED) for i in range(20)))
    assert together == alone


async def test_samples_stream_interleaved(fake: FakeFrontends) -> None:
    async with AsyncLLM.over(*fake()) as llm:
        deltas = [d async for d in llm.generate([50], SamplingParams(n=3, seed=1, max_tokens=6))]
        await idle(llm)
    tokens: dict[int, list[int]] = {}
    for delta in deltas:
        tokens.setdefault(delta.outputs[0].index, []).extend(delta.outputs[0].token_ids)
    assert [len(tokens[i]) for i in range(3)] == [6, 6, 6]
    assert [d.finished for d in deltas] == [False] * (len(deltas) - 1) + [True]


async def test_a_stop_string_of_one_sample_leaves_the_others(fake: FakeFrontends) -> None:
    params = SamplingParams(n=2, seed=1, max_tokens=30)
    async with AsyncLLM.over(*fake()) as llm:
        (free,) = [o async for o in llm.generate([50], params, stream=False)]
        first, second = (c.text for c in free.outputs)
        stop = next(c for c in first if c not in second)
        params = SamplingParams(n=2, seed=1, max_tokens=30, stop=stop)
        (stopped,) = [o async for o in llm.generate([50], params, stream=False)]
        await idle(llm)
    assert [c.finish_reason for c in stopped.outputs] == ["stop", "length"]
    assert stopped.outputs[0].text == first.partition(stop)[0]
    assert stopped.outputs[1].text == second


async def test_abort_ends_the_stream_with_its_reason(fake: FakeFrontends) -> None:
    async with AsyncLLM.over(*fake(FakeModel(latency_s=0.002))) as llm:
        deltas: list[RequestOutput] = []
        async for delta in llm.generate([50], SamplingParams(max_tokens=400, n=2), request_id="r1"):
            deltas.append(delta)
            if len(deltas) == 3:
                llm.abort("r1")
        assert {d.outputs[0].finish_reason for d in deltas[-2:]} == {"abort"}
        assert len(deltas) < 100
        llm.abort("unknown")
        await idle(llm)


async def test_abort_reaches_a_request_that_is_still_tokenised(fake: FakeFrontends) -> None:
    async with AsyncLLM.over(*fake(facts=replace(FACTS, vocab_size=49152, max_positions=8192))) as llm:
        first = asyncio.ensure_future(anext(llm.generate("many words " * 2000, SEEDED, request_id="r1")))
        await asyncio.sleep(0)
        llm.abort("r1")
        delta = await first
        assert (delta.finished, delta.outputs[0].finish_reason, delta.outputs[0].token_ids) == (True, "abort", [])
        assert llm.metrics().steps == 0


async def test_leaving_the_iterator_aborts(fake: FakeFrontends) -> None:
    async with AsyncLLM.over(*fake(FakeModel(latency_s=0.002))) as llm:
        stream = llm.generate([50], SamplingParams(max_tokens=400, n=2), request_id="r1")
        await anext(stream)
        await stream.aclose()
        await idle(llm)
        # The name is free again.
        assert len([d async for d in llm.generate([50], SEEDED, request_id="r1")]) > 0


async def test_cancelling_the_task_aborts(fake: FakeFrontends) -> None:
    async with AsyncLLM.over(*fake(FakeModel(latency_s=0.002))) as llm:
        task = asyncio.create_task(text_of(llm, [50], SamplingParams(max_tokens=400)))
        while not llm.metrics().running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await idle(llm)


async def test_a_bad_request_costs_the_others_nothing(fake: FakeFrontends) -> None:
    async with AsyncLLM.over(*fake()) as llm:
        good = asyncio.create_task(text_of(llm, [50], SEEDED))
        with pytest.raises(RequestError, match="max_model_len"):
            await text_of(llm, [50] * 600, SEEDED)
        assert await good


async def test_a_name_in_use_is_refused(fake: FakeFrontends) -> None:
    async with AsyncLLM.over(*fake(FakeModel(latency_s=0.002))) as llm:
        stream = llm.generate([50], SamplingParams(max_tokens=400), request_id="r1")
        await anext(stream)
        with pytest.raises(RequestError, match="request_id='r1'"):
            await anext(llm.generate([50], SEEDED, request_id="r1"))
        assert (await anext(stream)).request_id == "r1"
        await stream.aclose()


async def test_tokenising_a_long_prompt_does_not_block_the_loop(fake: FakeFrontends) -> None:
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0)
            longest = max(longest, time.perf_counter() - start)

    async with AsyncLLM.over(*fake(facts=replace(FACTS, vocab_size=49152))) as llm:
        text = "A long text of many words, 漢字 too. " * 40_000
        start = time.perf_counter()
        llm.tokenizer.encode(text)
        alone = time.perf_counter() - start
        watcher = asyncio.create_task(watch())
        with pytest.raises(RequestError, match="prompt has"):
            await anext(llm.generate(text, SEEDED))
        watcher.cancel()
    assert longest < alone / 3


async def test_chat_streams_an_answer(fake: FakeFrontends) -> None:
    async with AsyncLLM.over(*fake(facts=replace(FACTS, vocab_size=49152))) as llm:
        deltas = [d async for d in llm.chat([{"role": "user", "content": "hi"}], SEEDED)]
        assert deltas[-1].finished
        assert deltas[0].prompt is not None and deltas[0].prompt.endswith("<|im_start|>assistant\n")
        with pytest.raises(RequestError, match=r"messages\[0\]\.role"):
            await anext(llm.chat([{"content": "hi"}]))


async def test_pooling_awaits_one_output(fake: FakeFrontends) -> None:
    encoder = replace(FACTS, kind="encoder", num_kv_heads=0, vocab_size=49152)
    with LLM.over(*fake(facts=encoder)) as llm:
        expected = llm.embed(["a", "b"])
        scores = llm.score("a", ["a", "b"])
    async with AsyncLLM.over(*fake(facts=encoder)) as llm:
        found = await asyncio.gather(llm.embed("a"), llm.embed("b"))
        assert [o.data for o in found] == [o.data for o in expected]
        assert [o.data for o in await llm.score("a", ["a", "b"])] == [o.data for o in scores]


async def test_a_prompt_that_fails_ends_those_that_are_pooled_with_it(fake: FakeFrontends) -> None:
    encoder = replace(FACTS, kind="encoder", num_kv_heads=0, vocab_size=49152)
    async with AsyncLLM.over(*fake(FakeModel(latency_s=0.2), facts=encoder)) as llm:
        with pytest.raises(RequestError, match="at least 1"):
            await llm.pool(["a", "b", ""], PoolingParams())
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await idle(llm)


async def test_a_failure_of_the_executor_reaches_every_caller(fake: FakeFrontends) -> None:
    async with AsyncLLM.over(*fake(FakeModel(fail_at_step=5))) as llm:
        runs = [text_of(llm, [50 + i], SamplingParams(max_tokens=100)) for i in range(4)]
        results = await asyncio.gather(*runs, return_exceptions=True)
        assert all("injected at step 5" in str(r) for r in results)
        with pytest.raises(EngineDead):
            await text_of(llm, [50], SEEDED)
