"""Rows through a real engine, one that is shared, and engines that fail."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.batch.processors import MODEL, SAMPLING, SMALL, processor

from headway import LLM, SamplingParams
from headway.batch import Processor
from headway.batch.engines import Lease
from headway.batch.row import Row
from headway.batch.stages.engine import EngineOptions, EngineStage
from headway.errors import ConfigError, EngineError


def answer(one: Processor, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    async def run() -> list[dict[str, Any]]:
        async with one.flow() as flow:
            rows = [Row.of(i, columns) for i, columns in enumerate(inputs)]
            await asyncio.wait_for(flow.answer(rows), 120)
            return [row.record() for row in rows]

    return asyncio.run(run())


QUESTIONS = [f"Name {n} animals" for n in range(2, 22)]


def chats(questions: list[str]) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": question}]} for question in questions]


@pytest.fixture(scope="module")
def expected() -> list[str]:
    with LLM(MODEL, **SMALL) as llm:
        conversations: Any = [row["messages"] for row in chats(QUESTIONS)]
        return [output.outputs[0].text for output in llm.chat(conversations, SamplingParams(**SAMPLING))]


def test_answers_are_those_of_chat(expected: list[str]) -> None:
    with processor() as one:
        found = answer(one, chats(QUESTIONS))
    assert [row["generated_text"] for row in found] == expected
    first = found[0]
    assert first["num_generated_tokens"] == len(first["generated_tokens"]) == 6
    assert first["num_input_tokens"] == len(first["prompt_token_ids"]) and first["finish_reason"] == "length"
    assert first["prompt"].endswith("<|im_start|>assistant\n")


def test_stages_with_workers_of_their_own_give_the_same(expected: list[str]) -> None:
    own = {"batch_size": 3, "concurrency": 2}
    with processor(chat_template_stage=own, tokenize_stage=own, detokenize_stage=own) as one:
        assert one.list_stage_names() == ["chat_template", "tokenize", "engine", "detokenize"]
        found = answer(one, chats(QUESTIONS))
    assert [row["generated_text"] for row in found] == expected
    assert all(row["tokenized_prompt"] == row["prompt_token_ids"] for row in found)


def test_rows_that_cannot_be_answered_say_why_and_cost_the_others_nothing(expected: list[str]) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"question": "?"}, "must have one of"),
        ({"prompt": "x " * 400}, "max_model_len"),
        ({"prompt": "hello", "sampling_params": {"max_token": 3}}, "did you mean max_tokens"),
        ({"prompt": "hello", "sampling_params": {"temperature": "hot"}}, "sampling_params.temperature"),
        ({"prompt": "hello", "sampling_params": {"seed": 1 << 70}}, "seed"),
        ({"messages": [{"content": "no role"}]}, "role"),
        ({"tokenized_prompt": [1, 10**7]}, "prompt_token_ids"),
        ({"prompt": "hello", "sampling_params": {"structured": {"regex": "("}}}, "regex"),
    ]
    with processor() as one:
        found = answer(one, [*(row for row, _ in bad), *chats(QUESTIONS[:2])])
    for row, (columns, message) in zip(found, bad):
        assert row.keys() == {*columns, "error"} and message in row["error"]["message"], row
        assert (row["error"]["type"], row["error"]["stage"]) == ("RequestError", "engine")
    assert [row["generated_text"] for row in found[-2:]] == expected[:2]


def test_all_samples_and_log_probabilities_are_in_the_row() -> None:
    params = {"n": 3, "seed": 1, "temperature": 1.0, "logprobs": 1, "max_tokens": 4}
    with processor() as one:
        (row,) = answer(one, [{"prompt": "Once upon a time", "sampling_params": params}])
    assert len(row["outputs"]) == 3 and row["outputs"][0]["generated_text"] == row["generated_text"]
    assert len({tuple(sample["generated_tokens"]) for sample in row["outputs"]}) > 1
    assert len(row["logprobs"]) == 4


def test_embeddings_and_pairs(minilm_dir: Path) -> None:
    encoder: dict[str, Any] = {"model_source": str(minilm_dir), "engine_kwargs": {"threads": 1}}
    with processor(task_type="embed", **encoder) as one:
        cat, kitten, car = (row["embeddings"] for row in answer(one, [{"prompt": p} for p in ("cat", "kitten", "car")]))
    assert cat.dtype == np.float32 and cat.shape == (384,)
    assert cat @ kitten > cat @ car
    pairs = [{"text_1": "cat", "text_2": "kitten"}, {"text_1": "cat", "text_2": "cat"}, {"text_1": "cat"}]
    with processor(task_type="score", **encoder) as one:
        near, same, bad = answer(one, pairs)
    assert near["embeddings"] == pytest.approx([cat @ kitten], abs=0.01)
    assert same["embeddings"] == pytest.approx([1.0], abs=1e-5)
    assert bad["error"]["stage"] == "engine"


# Shared engines -------------------------------------------------------------------------------------------------------


def test_the_second_turn_of_a_conversation_finds_the_first_in_the_shared_engines_cache() -> None:
    story = "A long time ago, in a small village by the sea, there lived an old fisherman. " * 5

    def turn_one(row: dict[str, Any]) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": story + row["q"]}]}

    def turn_two(row: dict[str, Any]) -> dict[str, Any]:
        answered = {"role": "assistant", "content": row["generated_text"]}
        return {"messages": [*row["messages"], answered, {"role": "user", "content": "And then?"}]}

    with processor(turn_one, shared="talk") as first, processor(turn_two, shared="talk") as second:
        rows = answer(first.then(second), [{"q": f"Chapter {i}?"} for i in range(4)])
    for row in rows:
        assert "error" not in row and row["num_cached_tokens"] > 0.6 * row["num_input_tokens"]


def test_a_shared_engine_is_one_and_ends_with_its_last_user() -> None:
    settings = {"model": MODEL, **SMALL}
    first, second = Lease(settings, "one"), Lease(settings, "one")
    with pytest.raises(ConfigError, match="other settings"):
        Lease({**settings, "max_num_seqs": 4}, "one")

    async def run() -> None:
        llm = await first.open()
        assert await second.open() is llm
        first.close()
        async for output in llm.generate("Hello", SamplingParams(max_tokens=2), stream=False):
            assert output.finished
        second.close()
        with pytest.raises(EngineError):
            async for _ in llm.generate("Hello", SamplingParams(max_tokens=2), stream=False):
                pass

    asyncio.run(run())
    with processor(shared="one", engine_kwargs={**SMALL, "max_num_seqs": 4}):
        pass  # the name is free again


# Engines that fail ----------------------------------------------------------------------------------------------------


class Killer:
    """Submits rows to a stage over a worker process, which it kills while certain rows run."""

    def __init__(self, kills: int, victims: set[int], max_tokens: int = 40) -> None:
        settings = {"model": MODEL, **SMALL, "distributed_executor_backend": "mp"}
        self.lease = Lease(settings)
        self.stage = EngineStage(self.lease, EngineOptions(sampling={"max_tokens": max_tokens, "ignore_eos": True}))
        self.kills, self.victims = kills, victims
        self.failed: list[BaseException] = []

    async def run(self, count: int) -> list[Row]:
        rows = [Row.of(i, {"prompt": f"Row {i}"}) for i in range(count)]
        done, complete = list[Row](), asyncio.Event()

        def take(some: list[Row]) -> None:
            done.extend(some)
            if len(done) == count:
                complete.set()

        def fail(error: BaseException) -> None:
            self.failed.append(error)
            complete.set()

        await self.stage.open(fail)
        try:
            self.stage.submit(rows, take)
            await asyncio.wait_for(asyncio.gather(complete.wait(), self._kill(complete)), 120)
        finally:
            await self.stage.close()
            self.lease.close()
        assert self.failed or sorted(row.index for row in done) == list(range(count))
        return rows

    async def _kill(self, complete: asyncio.Event) -> None:
        """Whenever a step has run while a victim is in the engine."""
        killed: set[int] = set()
        while not complete.is_set() and self.kills:
            llm = self.stage.llm
            inside = {row.index for row in self.stage.inside}
            steps = llm.metrics().steps
            if id(llm) not in killed and inside & self.victims and steps:
                killed.add(id(llm))
                self.kills -= 1
                self.keep = llm  # so that its id is not another one's
                os.kill(llm.executor_info.pids[0], signal.SIGKILL)
            await asyncio.sleep(0.005)


def test_an_engine_that_dies_is_replaced_and_its_rows_run_again() -> None:
    killer = Killer(kills=1, victims={3})
    rows = asyncio.run(killer.run(12))
    assert killer.stage.counts.restarts == 1 and not killer.failed
    assert all(row.error is None and row.data["num_generated_tokens"] == 40 for row in rows)


def test_a_row_that_kills_engines_fails_and_the_others_are_answered() -> None:
    killer = Killer(kills=99, victims={2})
    rows = asyncio.run(killer.run(5))
    assert not killer.failed and killer.stage.counts.restarts == 3
    assert [row.index for row in rows if row.error is not None] == [2]
    assert rows[2].error is not None and rows[2].error.type == "WorkerDied"


def test_a_job_ends_when_engines_fail_whatever_runs() -> None:
    killer = Killer(kills=99, victims=set(range(8)), max_tokens=200)  # none may be done before its engine is killed
    asyncio.run(killer.run(8))
    assert [type(error).__name__ for error in killer.failed] == ["WorkerDied"]
