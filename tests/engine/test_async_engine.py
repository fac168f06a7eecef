"""Many callers, many event loops, one engine thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pytest

from headway.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from headway.engine import AsyncEngine, EngineCore
from headway.engine.port import Enough, Pause, Stream
from headway.errors import EngineDead, RequestError, WorkerError
from headway.executor.fake import FakeExecutor, FakeModel, FakeWorker, prefix_state
from headway.executor.uni import UniExecutor
from headway.messages import EngineOutput, Request, SamplingParams, StepPlan, StepResult, StructuredOutput


@contextmanager
def running(model: FakeModel | None = None, grammar: Any = None) -> Iterator[AsyncEngine]:
    config = EngineConfig(model=ModelConfig(path="", served_model_name=""), cache=CacheConfig(num_blocks=500))
    executor = FakeExecutor(config, model)
    engine = AsyncEngine(EngineCore(config, executor, executor.start(), grammar))
    try:
        yield engine
    finally:
        engine.close()
        engine.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("headway-")]


def make_request(name: str, max_tokens: int = 4, stream: bool = True, **sampling: Any) -> Request:
    prompt = list(name.encode())
    return Request(
        request_id=name,
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
        max_tokens=max_tokens,
        stream=stream,
    )


async def collect(engine: AsyncEngine, request: Request) -> list[EngineOutput]:
    return [output async for output in engine.generate(request)]


def tokens_alone(request: Request) -> list[int]:
    state, tokens = prefix_state(request.prompt_token_ids), []
    while len(tokens) < request.max_tokens:
        tokens.append(FakeModel().next_token(state, request.seed))
        state = prefix_state(tokens[-1:], state)
    return tokens


async def eventually(condition: Any) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def test_callers_on_several_event_loops_get_their_own_tokens() -> None:
    failures: list[BaseException] = []

    async def many(engine: AsyncEngine, thread: int) -> None:
        requests = [make_request(f"{thread}-{number}", 3 + number) for number in range(12)]
        for request, outputs in zip(requests, await asyncio.gather(*(collect(engine, r) for r in requests))):
            assert [token for output in outputs for token in output.token_ids] == tokens_alone(request)
            assert [output.finish_reason for output in outputs] == [None] * (len(outputs) - 1) + ["length"]

    def caller(engine: AsyncEngine, thread: int) -> None:
        try:
            asyncio.run(many(engine, thread))
        except BaseException as error:
            failures.append(error)

    with running() as engine:
        threads = [threading.Thread(target=caller, args=(engine, number)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_one_wakeup_a_step_and_loop_however_many_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(engine: AsyncEngine) -> int:
        loop = asyncio.get_running_loop()
        wakeups, wake = [], loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: wakeups.append(1) or wake(*args))
        await asyncio.gather(*(collect(engine, make_request(str(number), 10)) for number in range(20)))
        return len(wakeups)

    with running() as engine:
        wakeups = asyncio.run(scenario(engine))
        assert wakeups <= engine.metrics().steps


def test_closing_the_iterator_aborts_the_request() -> None:
    async def scenario(engine: AsyncEngine) -> None:
        stream = engine.generate(make_request("a", 1000))
        assert (await anext(stream)).finish_reason is None
        await stream.aclose()
        await eventually(lambda: engine.metrics().running == 0)
        assert engine.metrics().generated_tokens < 1000
        # The name is free again.
        assert (await collect(engine, make_request("a", 2)))[-1].finish_reason == "length"

    with running(FakeModel(latency_s=0.002)) as engine:
        asyncio.run(scenario(engine))


class GatedWorker(FakeWorker):
    """Ends a step when it is let."""

    def __init__(self, config: EngineConfig, let: threading.Semaphore) -> None:
        super().__init__(config, FakeModel())
        self._let = let

    def step(self, plan: StepPlan, masks: Callable[[int], dict[int, bytes]]) -> StepResult:
        assert self._let.acquire(timeout=10)
        return super().step(plan, masks)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_request_that_is_left_is_gone_before_the_next_step(depth: Any) -> None:
    let = threading.Semaphore(0)
    config = EngineConfig(
        model=ModelConfig(path="", served_model_name=""),
        cache=CacheConfig(num_blocks=500),
        scheduler=SchedulerConfig(depth=depth),
    )
    executor = UniExecutor(config, partial(GatedWorker, let=let))
    engine = AsyncEngine(EngineCore(config, executor, executor.start()))

    async def scenario() -> None:
        loop, begun = asyncio.get_running_loop(), asyncio.Event()
        left, stays = (Stream(make_request(name, 100), loop, lambda *_: begun.set()) for name in ("left", "stays"))
        engine.enter([left, stays])
        let.release()
        await begun.wait()
        await eventually(lambda: engine.metrics().steps == 2 + depth)
        assert (engine.metrics().running, engine.metrics().blocks_used) == (2, 2)
        engine.leave([left])  # while step 1 runs, and at depth 1 step 2 waits for it
        let.release()
        await eventually(lambda: engine.metrics().steps == 3 + depth)
        assert (engine.metrics().running, engine.metrics().blocks_used) == (1, 1)

    try:
        asyncio.run(scenario())
    finally:
        let.release(200)
        engine.close()


def test_abort_by_name_ends_the_iterator() -> None:
    async def scenario(engine: AsyncEngine) -> None:
        stream = engine.generate(make_request("a", 1000))
        await anext(stream)
        engine.abort(["a", "unknown"])
        rest = [output async for output in stream]
        assert rest[-1].finish_reason == "abort"

    with running(FakeModel(latency_s=0.002)) as engine:
        asyncio.run(scenario(engine))


def test_a_bad_request_costs_nobody_else_anything() -> None:
    async def scenario(engine: AsyncEngine) -> None:
        good = asyncio.create_task(collect(engine, make_request("good", 50)))
        await asyncio.sleep(0.01)
        with pytest.raises(RequestError, match="prompt_token_ids"):
            await collect(engine, make_request("", 4))
        with pytest.raises(RequestError, match="in use"):
            await collect(engine, make_request("good", 4))
        assert sum(len(output.token_ids) for output in await good) == 50

    with running(FakeModel(latency_s=0.002)) as engine:
        asyncio.run(scenario(engine))


def test_a_failure_reaches_every_waiting_caller_and_later_ones() -> None:
    async def scenario(engine: AsyncEngine) -> None:
        tasks = [asyncio.create_task(collect(engine, make_request(str(n), 100, stream=n > 2))) for n in range(5)]
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, WorkerError) and "injected" in str(error)
        with pytest.raises(EngineDead, match="injected"):
            await collect(engine, make_request("late"))

    with running(FakeModel(fail_at_step=5)) as engine:
        asyncio.run(scenario(engine))


def test_closing_ends_every_waiting_caller() -> None:
    async def scenario(engine: AsyncEngine) -> None:
        task = asyncio.create_task(collect(engine, make_request("a", 1000)))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineDead, match="closed"):
            await task

    with running(FakeModel(latency_s=0.002)) as engine:
        asyncio.run(scenario(engine))


def test_callers_whose_event_loop_is_gone_are_aborted() -> None:
    with running(FakeModel(latency_s=0.002)) as engine:
        loop = asyncio.new_event_loop()
        stream = engine.generate(make_request("a", 1000))
        loop.run_until_complete(anext(stream))
        loop.close()
        asyncio.run(eventually(lambda: engine.metrics().running == 0))


def test_an_idle_engine_costs_nothing() -> None:
    with running() as engine:
        asyncio.run(collect(engine, make_request("a")))
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.05


class SlowGrammar:
    """Compiles when it is let; everything is allowed. The regex "bad" is refused."""

    def __init__(self) -> None:
        self.let = threading.Event()

    def compile(self, constraint: StructuredOutput) -> SlowGrammar:
        assert self.let.wait(10)
        if constraint.regex == "bad":
            raise RequestError("structured.regex", "bad", "is bad")
        return self

    def mask(self) -> bytes:
        return b"\xff" * 32

    def accept(self, token_id: int) -> bool:
        return True


def constrained(name: str, regex: str = "x") -> Request:
    return make_request(name, structured=StructuredOutput(regex=regex))


def test_outputs_that_wait_for_a_slow_caller_are_one() -> None:
    request = make_request("slow", 20)

    async def scenario(engine: AsyncEngine) -> None:
        whole = [token for output in await collect(engine, request) for token in output.token_ids]
        outputs = engine.generate(request)
        first = await anext(outputs)
        while engine.metrics().running:
            await asyncio.sleep(0)
        await asyncio.sleep(0)  # what was sent before is put now
        (rest,) = [output async for output in outputs]
        assert first.token_ids + rest.token_ids == whole
        assert rest.finish_reason == "length"

    with running() as engine:
        asyncio.run(scenario(engine))


def test_who_follows_gets_what_who_iterates_gets() -> None:
    async def main(engine: AsyncEngine) -> None:
        requests = [make_request(f"r{number}", 5 + number) for number in range(3)]
        tokens = {request.request_id: list[int]() for request in requests}

        def take(output: EngineOutput) -> None:
            tokens[output.request_id] += output.token_ids

        await engine.follow(requests, take)
        assert tokens == {request.request_id: tokens_alone(request) for request in requests}

    with running() as engine:
        asyncio.run(main(engine))


def test_who_asks_for_a_pause_gets_what_comes_meanwhile_as_one() -> None:
    request, counts, tokens, pauses = make_request("r", 60), list[int](), list[int](), 0

    async def pause() -> None:
        nonlocal pauses
        pauses += 1
        before = len(counts)
        await asyncio.sleep(0.05)
        assert len(counts) == before

    def take(output: EngineOutput) -> Pause | None:
        counts.append(len(output.token_ids))
        tokens.extend(output.token_ids)
        return pause if len(counts) in (1, 3) else None

    with running(FakeModel(latency_s=0.005)) as engine:
        asyncio.run(engine.follow([request], take))
    assert tokens == tokens_alone(request) and pauses == 2
    assert counts[0] == 1 and counts[1] > 2 and counts[3] > 2


@pytest.mark.parametrize("error", [Enough(), ValueError("cannot be told")])
@pytest.mark.parametrize("at", [1, 3])
def test_a_taker_that_fails_or_has_enough_ends_its_requests_alone(error: Exception, at: int) -> None:
    async def main(engine: AsyncEngine) -> None:
        other, seen = asyncio.create_task(collect(engine, make_request("other", 300))), 0

        def take(_: EngineOutput) -> None:
            nonlocal seen
            seen += 1
            if seen == at:
                raise error

        with suppress(ValueError):
            await engine.follow([make_request("r", 1000)], take)
        assert seen == at
        await eventually(lambda: engine.metrics().running == 1)
        assert not other.done()
        assert sum(len(output.token_ids) for output in await other) == 300

    with running(FakeModel(latency_s=0.002)) as engine:
        asyncio.run(main(engine))


def test_an_event_loop_that_is_late_gets_what_came_meanwhile_as_one() -> None:
    request, counts = make_request("r", 40), list[int]()

    def take(output: EngineOutput) -> None:
        counts.append(len(output.token_ids))
        if len(counts) == 2:
            time.sleep(0.1)

    with running(FakeModel(latency_s=0.005)) as engine:
        asyncio.run(engine.follow([request], take))
    assert sum(counts) == 40 and counts[2] > 5


def test_a_grammar_that_compiles_holds_nobody_up() -> None:
    grammar = SlowGrammar()

    async def scenario(engine: AsyncEngine) -> None:
        slow, bad = (asyncio.create_task(collect(engine, constrained(n, n))) for n in ("slow", "bad"))
        assert sum(len(o.token_ids) for o in await collect(engine, make_request("quick", 20))) == 20
        with pytest.raises(RequestError, match="in use"):
            await collect(engine, constrained("slow"))
        grammar.let.set()
        assert (await slow)[-1].finish_reason == "length"
        with pytest.raises(RequestError, match=r"structured\.regex='bad'"):
            await bad

    with running(grammar=grammar) as engine:
        asyncio.run(scenario(engine))


def test_a_request_whose_grammar_compiles_can_be_aborted() -> None:
    grammar = SlowGrammar()

    async def scenario(engine: AsyncEngine) -> None:
        aborted, left = (asyncio.create_task(collect(engine, constrained(n))) for n in ("aborted", "left"))
        await asyncio.sleep(0.01)
        engine.abort(["aborted"])
        assert [o.finish_reason for o in await aborted] == ["abort"]
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        grammar.let.set()
        assert sum(len(o.token_ids) for o in await collect(engine, constrained("left"))) == 4
        assert engine.metrics().generated_tokens == 4

    with running(grammar=grammar) as engine:
        asyncio.run(scenario(engine))


def test_closing_ends_those_whose_grammar_compiles() -> None:
    grammar = SlowGrammar()

    async def scenario(engine: AsyncEngine) -> None:
        tasks = [asyncio.create_task(collect(engine, constrained(n))) for n in ("a", "b")]
        await asyncio.sleep(0.01)
        threading.Timer(0.05, grammar.let.set).start()
        await asyncio.to_thread(engine.close)
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(error, EngineDead)

    with running(grammar=grammar) as engine:
        asyncio.run(scenario(engine))
