"""The engine for asyncio: streams, many callers, one process."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Sequence
from contextlib import aclosing, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from headway.engine import AsyncEngine, EngineCore, EngineMetrics
from headway.engine.port import EngineClient, Enough, Health, Pause
from headway.errors import RequestError
from headway.llm.chat import Message
from headway.llm.frontend import Client, Frontend
from headway.llm.outputs import GeneratedResult, PooledResult
from headway.llm.processor import Params, Prepared
from headway.llm.prompts import Prompt, PromptInput, as_input
from headway.llm.stream import K, OnAnswers, PromptStream
from headway.messages import EngineOutput, PooledOutput, PoolingParams, Request, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from headway.engine.upkeep import Weights

T = TypeVar("T")

# Tokenising more text than this, about 2 ms of it, goes to a thread so that the event loop goes on.
INLINE_CHARS = 8192


class AsyncLLM(Client[EngineClient]):
    """One model in this process, for any number of tasks on any number of event loops.

    Leaving an iterator early, or cancelling the task that awaits, aborts the request.
    """

    def _attach(self, frontend: Frontend, engine: EngineCore | EngineClient) -> None:
        self._frontend = frontend
        self._engine = AsyncEngine(engine) if isinstance(engine, EngineCore) else engine
        self._ids = (f"unnamed-{i}" for i in itertools.count())
        self._running: dict[str, list[str]] = {}  # request id to the engine's ids; none while it is prepared
        self._aborted_early: set[str] = set()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        stream: bool = True,
        data_parallel_rank: int | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Deltas as tokens come, each with what is new of one sample; without stream, the whole once at the end.

        data_parallel_rank: the replica that is to run it.
        """
        with self._named(request_id) as name:
            routing: dict[str, Any] = {"priority": priority, "data_parallel_rank": data_parallel_rank}
            requests, result = await self._begin(name, prompt, sampling_params, stream, **routing)
            source = self._engine.generate(*requests)
            async with aclosing(source) as outputs:
                async for output in outputs:
                    if (delta := self._feed(result, output)) is not None:
                        yield delta
                    if result.finished:
                        return

    async def follow(
        self,
        prompt: Prompt,
        take: Callable[[RequestOutput], Pause | None],
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        stream: bool = True,
        data_parallel_rank: int | None = None,
    ) -> None:
        """As generate(), with what take makes of the outputs: it is called where they arrive, most of them without a
        switch of tasks. What it returns is waited for before the next one.
        """

        def feed(output: EngineOutput) -> Pause | None:
            delta = self._feed(result, output)
            pause = None if delta is None else take(delta)
            if result.finished and pause is None:
                raise Enough
            return pause

        with self._named(request_id) as name:
            routing: dict[str, Any] = {"priority": priority, "data_parallel_rank": data_parallel_rank}
            requests, result = await self._begin(name, prompt, sampling_params, stream, **routing)
            await self._engine.follow(requests, feed)

    async def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        stream: bool = True,
        data_parallel_rank: int | None = None,
        **template: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """As generate(), for a conversation. template: tools and what else ChatRenderer.render takes."""
        prompt = self.chat_prompt(messages, **template)
        options: dict[str, Any] = {"priority": priority, "stream": stream, "data_parallel_rank": data_parallel_rank}
        outputs = self.generate(prompt, sampling_params, request_id=request_id, **options)
        async with aclosing(outputs):
            async for output in outputs:
                yield output

    async def embed(
        self, prompt: Prompt, pooling_params: PoolingParams | None = None, data_parallel_rank: int | None = None
    ) -> PooledOutput:
        return await self._pool(prompt, pooling_params or PoolingParams(task="embed"), data_parallel_rank)

    async def classify(
        self, prompt: Prompt, pooling_params: PoolingParams | None = None, data_parallel_rank: int | None = None
    ) -> PooledOutput:
        return await self._pool(prompt, pooling_params or PoolingParams(task="classify"), data_parallel_rank)

    async def score(
        self, text_1: str | list[str], text_2: str | list[str], data_parallel_rank: int | None = None
    ) -> list[PooledOutput]:
        """As LLM.score."""
        scoring = await asyncio.to_thread(self.scoring, text_1, text_2)
        outputs = await self.pool(scoring.prompts, scoring.params, data_parallel_rank)
        return await asyncio.to_thread(scoring.results, outputs)

    async def pool(
        self, prompts: Sequence[Prompt], params: PoolingParams, data_parallel_rank: int | None = None
    ) -> list[PooledOutput]:
        """One for each prompt. If one of them fails, the others end."""
        return await together(self._pool(prompt, params, data_parallel_rank) for prompt in prompts)

    def stream(self, done: OnAnswers[K]) -> PromptStream[K]:
        """For very many prompts: see PromptStream. To be used on the running event loop."""
        return PromptStream(self._frontend, self._engine, self._ids, done)

    def abort(self, request_id: str) -> None:
        """Ends a request; its iterator gets a last output with finish_reason "abort". Unknown ids are ignored."""
        running = self._running.get(request_id)
        if running:
            self._engine.abort(running)
        elif running is not None:
            self._aborted_early.add(request_id)

    async def update_weights(self, weights: Weights) -> None:
        """As LLM.update_weights, but refused with EngineError while requests run."""
        await self._engine.update_weights(weights)

    async def sleep(self, level: Literal[1, 2] = 1) -> None:
        """As LLM.sleep, but refused with EngineError while requests run."""
        await self._engine.sleep(level)

    async def wake_up(self) -> None:
        """As LLM.wake_up."""
        await self._engine.wake_up()

    def replica_metrics(self) -> list[EngineMetrics]:
        """metrics() of each replica, with what it counted before it died."""
        return self._engine.replica_metrics()

    def health(self) -> list[Health]:
        """Of each replica."""
        return self._engine.health()

    async def ended(self) -> BaseException:
        """Returns once the engine has failed for good, or was closed: of what."""
        return await asyncio.wrap_future(self._engine.ended)

    def close(self) -> None:
        """Ends the engine; idempotent. Whoever still waits gets EngineDead."""
        self._engine.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    async def _pool(self, prompt: Prompt, params: PoolingParams, rank: int | None) -> PooledOutput:
        prepared = await self._prepare(next(self._ids), prompt, params, data_parallel_rank=rank)
        result = PooledResult(prepared)
        async with aclosing(self._engine.generate(prepared.requests[0])) as outputs:
            async for output in outputs:
                pooled, _ = result.feed(output)
                if pooled is not None:
                    return pooled
        raise AssertionError("the engine ended a request without an output")

    @contextmanager
    def _named(self, request_id: str | None) -> Generator[str]:
        name = next(self._ids) if request_id is None else request_id
        if name in self._running:
            raise RequestError("request_id", name, "a request of this name is running")
        self._running[name] = []
        try:
            yield name
        finally:
            del self._running[name]
            self._aborted_early.discard(name)

    async def _begin(
        self, name: str, prompt: Prompt, params: SamplingParams | None, stream: bool, **routing: Any
    ) -> tuple[list[Request], GeneratedResult]:
        """What the engine is to run; it is entered before anything else happens on this event loop."""
        params = self.get_default_sampling_params() if params is None else params
        prepared = await self._prepare(name, prompt, params, delta=stream, **routing)
        self._running[name] = [request.request_id for request in prepared.requests]
        if name in self._aborted_early:
            asyncio.get_running_loop().call_soon(self.abort, name)
        return prepared.requests, GeneratedResult(self.tokenizer, prepared)

    def _feed(self, result: GeneratedResult, output: EngineOutput) -> RequestOutput | None:
        delta, must_abort = result.feed(output)
        if must_abort:
            self._engine.abort([output.request_id])
        return delta

    async def _prepare(self, request_id: str, prompt: Prompt, params: Params, **options: Any) -> Prepared:
        item = as_input(prompt)
        prepare = self._frontend.processor.prepare
        if _is_quick(item, params):
            return prepare(request_id, item, params, **options)
        return await asyncio.to_thread(prepare, request_id, item, params, **options)


async def together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What they return. If one of them fails, the others end."""
    tasks: list[asyncio.Task[T]] = []
    try:
        for work in works:
            tasks.append(asyncio.ensure_future(work))
            await asyncio.sleep(0)  # it begins with its prompt, which takes up to 2 ms: others have their turn between
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _is_quick(item: PromptInput, params: Params) -> bool:
    """Whether preparing takes less time than another thread would."""
    size = len(item.text or "")
    if isinstance(params, SamplingParams):
        if params.structured is not None:
            return False
        size += sum(map(len, params.bad_words or ()))
    return size <= INLINE_CHARS
