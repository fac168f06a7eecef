"""Rows to deployments of ours, which get some of them together."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray.data")
serve = pytest.importorskip("ray.serve")

from tests.batch.processors import MODEL, processor  # noqa: E402

from headway.batch import ServeDeploymentProcessorConfig, build_processor  # noqa: E402
from headway.batch.flow import Flow  # noqa: E402
from headway.batch.row import Row  # noqa: E402
from headway.batch.serve import Answer, LLMDeployment, build_llm_deployment  # noqa: E402

pytestmark = pytest.mark.usefixtures("applications")

SLOTS, BUNDLE = 8, 4
REPLICAS = 2
FOREVER = 4000
CROSS_ENCODER = "cross-encoder/ms-marco-MiniLM-L-6-v2"


class Watched(LLMDeployment):
    """Writes down what it is asked, and how many rows are in the engine once that is over."""

    async def answer_rows(self, requests: list[tuple[str, Any]]) -> AsyncGenerator[list[Answer]]:
        self._tell(asked=[request.get("prompt") for _, request in requests])
        try:
            async with aclosing(super().answer_rows(requests)) as items:
                async for item in items:
                    yield item
        finally:
            self._tell(inside=sum(len(stage.inside) for stage in self._stages.values()))

    def _tell(self, **what: Any) -> None:
        with Path(os.environ["WATCHED"]).open("a") as file:
            file.write(json.dumps({"pid": os.getpid(), **what}) + "\n")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watched") / "log"


@pytest.fixture(scope="module")
def applications(ray_here: None, watched: Path) -> Generator[None]:
    serve.start(proxy_location="Disabled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headway.batch.serve.LLMDeployment", Watched)
        slow = build_llm_deployment(
            MODEL,
            engine_kwargs={
                "distributed_executor_backend": "tests.batch.slow_executor:SlowExecutor",
                "max_num_seqs": SLOTS,
                "max_model_len": FOREVER + 100,
            },
            sampling_params={"ignore_eos": True},
            num_replicas=REPLICAS,
            ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": {"WATCHED": str(watched)}}},
        )
    serve.run(slow, name="slow", route_prefix=None)
    yield
    serve.shutdown()


@pytest.fixture
def told(watched: Path) -> Generator[Path]:
    watched.write_text("")
    return watched


def said(told: Path, what: str) -> list[tuple[int, Any]]:
    lines = map(json.loads, told.read_text().splitlines())
    return [(line["pid"], line[what]) for line in lines if what in line]


def flow_to(app: str, **settings: Any) -> Flow:
    return build_processor(ServeDeploymentProcessorConfig(app_name=app, deployment_name="LLM", **settings)).flow()


def rows_of(requests: list[Any], method: str = "generate") -> list[Row]:
    return [Row.of(i, {"method": method, "request_kwargs": request}) for i, request in enumerate(requests)]


def ask(number: int, max_tokens: int, **params: Any) -> dict[str, Any]:
    return {"prompt": f"Row {number}", "sampling_params": {"max_tokens": max_tokens, **params}}


async def answered(app: str, rows: list[Row], **settings: Any) -> list[Row]:
    """In the order in which they were."""
    done: list[Row] = []
    async with flow_to(app, **settings) as flow:
        every = asyncio.Event()

        def take(some: list[Row]) -> None:
            done.extend(some)
            if len(done) == len(rows):
                every.set()

        flow.push(rows, take)
        await asyncio.wait_for(every.wait(), 60)
    return done


async def until(state: Any, wanted: object) -> None:
    async with asyncio.timeout(20):
        while state() != wanted:
            await asyncio.sleep(0.02)


async def test_rows_go_out_together_and_come_back_as_they_are_done(told: Path) -> None:
    lengths = [60 if i % BUNDLE == 0 else 2 + i % 7 for i in range(20 * BUNDLE)]
    rows = rows_of([ask(i, n) for i, n in enumerate(lengths)])
    rows[7].data["request_kwargs"] = ask(7, 5, temperature=-1)
    order = await answered("slow", rows)
    errors = {row.index: row.error for row in rows if row.error is not None}
    assert [*errors] == [7] and errors[7].type == "RequestError" and errors[7].stage == "serve_deployment"
    assert [row.data["num_generated_tokens"] for row in rows if row.index != 7] == lengths[:7] + lengths[8:]
    bundles = said(told, "asked")
    assert len(bundles) == 20 and len({pid for pid, _ in bundles}) == REPLICAS
    assert order.index(rows[1]) < order.index(rows[0])


async def test_methods_may_be_mixed() -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    rows = rows_of([ask(0, 3), chat, {"prompt": "x", "max_tokens": 2}, ask(3, 4), {"messages": 3}, "?", ask(6, 3), {}])
    methods = ["generate", "chat", "completions", "generate_stream", "chat", "generate", "nothing", "score"]
    for row, method in zip(rows, methods):
        row.data["method"] = method
    await answered("slow", rows)
    usage = [row.data["usage"]["completion_tokens"] for row in rows[1:3]]
    assert (rows[0].data["num_generated_tokens"], usage) == (3, [3, 2])
    assert len(rows[3].data["responses"]) >= 2
    messages = [row.error.message if row.error else None for row in rows]
    assert messages[:4] == [None] * 4
    for message, part in zip(messages[4:], ("messages=3", "request_kwargs='?'", "nothing", "must have one of")):
        assert message is not None and part in message


async def test_rows_without_an_answer_go_to_another_replica_when_theirs_dies(told: Path) -> None:
    rows = rows_of([ask(i, 2 if i % BUNDLE == 0 else 150) for i in range(12 * BUNDLE)])
    left, before = set(rows), set[str]()
    every = asyncio.Event()

    def take(some: list[Row]) -> None:
        left.difference_update(some)
        if not before:
            before.update(row.source["request_kwargs"]["prompt"] for row in some)
            pid = next(pid for pid, asked in said(told, "asked") if before.intersection(asked))
            os.kill(pid, signal.SIGKILL)
        if not left:
            every.set()

    async with flow_to("slow") as flow:
        flow.push(rows, take)
        await asyncio.wait_for(every.wait(), 60)
    assert all(row.error is None for row in rows)
    times = Counter(prompt for _, asked in said(told, "asked") for prompt in asked)
    assert len(times) == len(rows) and max(times.values()) == 2
    assert all(times[prompt] == 1 for prompt in before)


async def test_time_runs_out_for_each_row_and_ends_it_in_the_engine(told: Path) -> None:
    rows = rows_of([ask(i, 2 if i == 1 else FOREVER) for i in range(BUNDLE)])
    await answered("slow", rows, request_timeout_s=2)
    assert [row.error.type if row.error else None for row in rows] == [
        "RequestTimeoutError",
        None,
        *["RequestTimeoutError"] * (BUNDLE - 2),
    ]
    await until(lambda: [inside for _, inside in said(told, "inside")], [0])


async def test_rows_end_in_the_engine_when_the_stage_closes(told: Path) -> None:
    rows, first = rows_of([ask(i, 2 if i == 1 else FOREVER) for i in range(BUNDLE)]), asyncio.Event()
    async with flow_to("slow") as flow:
        flow.push(rows, lambda _: first.set())
        await asyncio.wait_for(first.wait(), 60)
    await until(lambda: [inside for _, inside in said(told, "inside")], [0])


@pytest.mark.long
async def test_embeddings_and_scores_of_an_engine_on_rays_executor(minilm_dir: Path) -> None:
    settings: dict[str, Any] = {"distributed_executor_backend": "ray", "threads": 1}
    app = build_llm_deployment(str(minilm_dir), engine_kwargs=settings)
    serve.run(app, name="embed", route_prefix=None)
    texts = [{"prompt": f"number {i}", "pooling_params": {"normalize": i % 2 == 0}} for i in range(6)]
    pairs = [{"text_1": f"number {i}", "text_2": "a dog"} for i in range(6)]
    for method, requests in (("embed", texts), ("score", pairs)):
        rows = rows_of(requests, method)
        await answered("embed", rows)
        await compare(rows, model_source=str(minilm_dir), engine_kwargs={"threads": 1}, task_type=method)
    serve.delete("embed")


@pytest.mark.long
async def test_classes() -> None:
    settings: dict[str, Any] = {"load_format": "dummy", "threads": 1}
    serve.run(build_llm_deployment(CROSS_ENCODER, engine_kwargs=settings), name="classify", route_prefix=None)
    rows = rows_of([{"tokenized_prompt": [101, 5 + i, 102]} for i in range(6)], "classify")
    await answered("classify", rows)
    await compare(rows, model_source=CROSS_ENCODER, engine_kwargs=settings, task_type="classify")
    serve.delete("classify")


async def compare(rows: list[Row], **settings: Any) -> None:
    """With an engine of this process."""
    expected = [Row.of(row.index, row.data["request_kwargs"]) for row in rows]
    with processor(sampling_params={}, **settings) as here:
        async with here.flow() as flow:
            await flow.answer(expected)
    for row, other in zip(rows, expected):
        assert row.error is None and row.data["num_input_tokens"] == other.data["num_input_tokens"]
        np.testing.assert_allclose(row.data["embeddings"], other.data["embeddings"], rtol=1e-4, atol=1e-5)
