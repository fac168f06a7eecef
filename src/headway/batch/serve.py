"""An engine as a Ray Serve deployment: for ServeDeploymentProcessorConfig, and whoever else has a handle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast, get_args

import msgspec

from headway.batch.config import EngineProcessorConfig
from headway.batch.engines import Lease
from headway.batch.openai_file import CHAT, COMPLETIONS, answer_body, columns_of
from headway.batch.params import sampling_params
from headway.batch.ray.resources import engine_resources, engine_settings
from headway.batch.ray.settle import settle_in
from headway.batch.row import Row, RowError
from headway.batch.sinks import json_default
from headway.batch.stages.engine import EngineOptions, EngineStage, Task
from headway.batch.stages.serve import BUNDLES
from headway.config.resolve import MAX_NUM_SEQS
from headway.errors import MissingDependencyError, UserError
from headway.messages import Completion

try:
    from ray import serve
    from ray.serve import Application
except ImportError as missing:
    raise MissingDependencyError("deployments need Ray Serve: pip install 'headway[ray-serve]'") from missing

Request = Any
"""A dict, or an object with such attributes: a pydantic model, a msgspec struct."""
Answer = tuple[int, dict[str, Any], RowError | None]
"""Which request of several, and what it adds or why it does not."""
_URLS = {"chat": CHAT, "completions": COMPLETIONS}


def build_llm_deployment(
    model_source: str,
    *,
    engine_kwargs: dict[str, Any] | None = None,
    sampling_params: dict[str, Any] | None = None,
    placement_group_config: dict[str, Any] | None = None,
    accelerator_type: str | None = None,
    runtime_env: dict[str, Any] | None = None,
    name: str = "LLM",
    **serve_options: Any,
) -> Application:
    """For ``serve.run(app, name=...)``: a deployment ``name`` with the methods of LLMDeployment.

    engine_kwargs: see EngineArgs. sampling_params: what requests do not say. serve_options: of ``serve.deployment``,
    such as num_replicas, autoscaling_config, max_ongoing_requests, which is twice what an engine runs if not given.
    """
    config = EngineProcessorConfig(
        model_source=model_source,
        engine_kwargs=engine_kwargs or {},
        sampling_params=sampling_params or {},
        placement_group_config=placement_group_config,
        accelerator_type=accelerator_type,
        runtime_env=runtime_env,
    )
    given = {"model": model_source, **config.engine_kwargs}
    if placement_group_config is not None:
        given["placement_group_config"] = placement_group_config
    resources = {k: v for k, v in engine_resources(given, config).items() if v is not None}
    slots = config.engine_kwargs.get("max_num_seqs", MAX_NUM_SEQS)
    most = serve_options.get("max_ongoing_requests", 2 * slots)
    options: dict[str, Any] = {
        "name": name,
        "max_ongoing_requests": most,
        "user_config": {BUNDLES: {"rows": min(most // 4, most - slots), "methods": [*get_args(Task), *_URLS]}},
        "ray_actor_options": resources,
        "logging_config": {"enable_access_log": False},  # a line a row
        **serve_options,
    }
    own_threads = "OMP_NUM_THREADS" in (runtime_env or {}).get("env_vars", {})
    deployment: Any = serve.deployment(**options)(LLMDeployment)
    return deployment.bind(engine_settings(given, accelerator_type), config.sampling_params, own_threads)


class LLMDeployment:
    """One engine. A request that cannot be answered raises UserError.

    generate, embed, classify and score take and give what rows of an engine processor have; chat and completions are
    OpenAI's. generate_stream gives generated_text and generated_tokens as they come.
    """

    def __init__(self, settings: dict[str, Any], sampling: dict[str, Any], own_threads: bool = False) -> None:
        if not own_threads:
            settle_in()
        self._sampling = sampling
        self._model = settings["model"]
        self._lease = Lease(settings)
        self._stages: dict[Task, EngineStage] = {}
        self._opening = asyncio.Lock()
        self._broken: BaseException | None = None
        self._listening: set[asyncio.Event] = set()

    async def generate(self, request: Request) -> dict[str, Any]:
        return await self._answer("generate", request)

    async def embed(self, request: Request) -> dict[str, Any]:
        return await self._answer("embed", request)

    async def classify(self, request: Request) -> dict[str, Any]:
        return await self._answer("classify", request)

    async def score(self, request: Request) -> dict[str, Any]:
        return await self._answer("score", request)

    async def chat(self, request: Request) -> dict[str, Any]:
        return await self._answer("chat", request)

    async def completions(self, request: Request) -> dict[str, Any]:
        return await self._answer("completions", request)

    async def answer_rows(self, requests: list[tuple[str, Request]]) -> AsyncGenerator[list[Answer]]:
        """Each a method and its request. Items are of whatever has been answered since the last one."""
        async with aclosing(self._finished(requests)) as finished:
            async for rows in finished:
                yield [(row.index, _answer_of(row), row.error) for row in rows]

    async def generate_stream(self, request: Request) -> AsyncGenerator[dict[str, Any]]:
        """Each item is what is new of one sample, the last of a sample with its finish_reason."""
        columns = _columns(request)
        params = sampling_params(columns.get("sampling_params"), self._sampling)
        llm = await self._lease.open()
        messages: Any = columns.get("messages")
        prompt: Any = columns.get("prompt", columns.get("tokenized_prompt"))
        outputs = llm.generate(prompt, params) if messages is None else llm.chat(messages, params)
        async with aclosing(outputs):
            async for output in outputs:
                for sample in output.outputs:
                    yield _delta(sample)

    async def check_health(self) -> None:
        """Serve asks; raises what ended the engine for good."""
        if self._broken is not None:
            raise self._broken

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls it, as every deployment with a user_config must have it. That is for those who send rows."""

    async def _answer(self, method: str, request: Request) -> dict[str, Any]:
        async with aclosing(self._finished([(method, request)])) as finished:
            (row,) = await anext(finished)
        if row.error is not None:
            raise UserError(row.error.message)  # which reaches other processes
        return _answer_of(row)

    async def _finished(self, requests: list[tuple[str, Request]]) -> AsyncGenerator[list[Row]]:
        """All rows that were done since the last time, until none is left. When closed before, ends those that are."""
        await self.check_health()
        news, done = asyncio.Event(), list[Row]()

        def take(rows: list[Row]) -> None:
            done.extend(rows)
            news.set()

        rows = [self._row(i, method, request) for i, (method, request) in enumerate(requests)]
        left, tasks = set(rows), dict[Task, list[Row]]()
        for (method, _), row in zip(requests, rows):
            if row.error is None:
                tasks.setdefault(cast("Task", "generate" if method in _URLS else method), []).append(row)
            else:
                take([row])
        self._listening.add(news)
        try:
            for task, some in tasks.items():
                (await self._stage(task)).submit(some, take)
            while left:
                await news.wait()
                await self.check_health()
                news.clear()
                some = done.copy()
                done.clear()
                left.difference_update(some)
                yield some
        finally:
            self._listening.discard(news)
            if left:
                for stage in self._stages.values():
                    stage.drop(left)

    def _row(self, index: int, method: str, request: Request) -> Row:
        row = Row(index, {})
        try:
            columns = _columns(request)
            if (url := _URLS.get(method)) is None:
                return Row.of(index, columns)
            row.source = {"url": url, "body": {"model": self._model, **columns}}
            row.data = columns_of(url, columns)
        except UserError as error:
            row.fail(error, "engine")
        return row

    async def _stage(self, task: Task) -> EngineStage:
        async with self._opening:
            if task not in self._stages:
                sampling = self._sampling if task == "generate" else {}
                stage = EngineStage(self._lease, EngineOptions(task=task, sampling=sampling))
                await stage.open(self._fail)
                self._stages[task] = stage
        return self._stages[task]

    def _fail(self, error: BaseException) -> None:
        self._broken = error
        for news in self._listening:
            news.set()


def _answer_of(row: Row) -> dict[str, Any]:
    if row.error is not None:
        return {}
    if "url" in row.source:
        return msgspec.to_builtins(answer_body(row), enc_hook=json_default)
    return {name: value for name, value in row.data.items() if row.source.get(name) is not value}


def _columns(request: Request) -> dict[str, Any]:
    """What is not said is left out."""
    if hasattr(request, "model_dump"):  # pydantic
        return request.model_dump(exclude_none=True)
    try:
        columns: Any = msgspec.to_builtins(request, enc_hook=json_default)
    except TypeError as error:
        raise UserError(f"the request must be an object, not {type(request).__name__}") from error
    if not isinstance(columns, dict):
        raise UserError(f"the request must be an object, not {type(request).__name__}")
    return {name: value for name, value in cast("dict[str, Any]", columns).items() if value is not None}


def _delta(sample: Completion) -> dict[str, Any]:
    return {
        "index": sample.index,
        "generated_text": sample.text,
        "generated_tokens": sample.token_ids,
        "finish_reason": sample.finish_reason,
    }
