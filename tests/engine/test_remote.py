"""What clients make of an engine's messages, over the real link; the test says what the engine would."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TypeVar

import pytest
from msgspec.structs import replace
from tests.engine.test_async_engine import eventually
from tests.engine.test_link import Proxy

from headway.engine.link import Listener
from headway.engine.metrics import EngineMetrics
from headway.engine.port import Item
from headway.engine.replicas import Replicas
from headway.engine.wire import (
    Abort,
    Action,
    Done,
    Hello,
    News,
    Status,
    Submit,
    ToClient,
    ToEngine,
    decode_to_engine,
    encode,
)
from headway.errors import EngineDead, EngineError, RequestError
from headway.executor.failure import failure_of
from headway.messages import EngineOutput, Request, SamplingParams

M = TypeVar("M")
WAIT_S = 5.0


class Engine:
    """With one client."""

    def __init__(self, host: str | None = None) -> None:
        self._listener = Listener(host)
        self._listener.open(self._take)
        self._heard: asyncio.Queue[ToEngine] = asyncio.Queue()
        self._client = b""
        self.address = self._listener.address

    def _take(self, client: bytes, data: bytes) -> None:
        self._client = client
        self._heard.put_nowait(decode_to_engine(data))

    async def hears(self, kind: type[M]) -> M:
        message = await asyncio.wait_for(self._heard.get(), WAIT_S)
        assert isinstance(message, kind), message
        return message

    def tells(self, message: ToClient) -> None:
        assert self._listener.send(self._client, encode(message))

    async def is_greeted(self) -> None:
        await self.hears(Hello)
        self.tells(News([], [], 0, EngineMetrics()))

    async def acts(self, method: str) -> None:
        action = await self.hears(Action)
        assert action.method == method
        self.tells(Done(action.id))

    def close(self) -> None:
        self._listener.close()


@asynccontextmanager
async def two_engines() -> AsyncGenerator[tuple[Replicas, Engine, Engine]]:
    engines = Engine(), Engine()
    replicas = Replicas(2, asyncio.get_running_loop())
    for replica, engine in enumerate(engines):
        replicas.tell(Status(replica, engine.address))
        await engine.is_greeted()
    yield replicas, *engines
    replicas.close()
    for engine in engines:
        engine.close()


async def until_up(replicas: Replicas, *wanted: bool) -> None:
    await eventually(lambda: [health.up for health in replicas.health()] == list(wanted))


async def began_again(replicas: Replicas, replica: int) -> Engine:
    """Its process died, and another one is there."""
    engine = Engine()
    replicas.tell(Status(replica, None, "it died"))
    replicas.tell(Status(replica, engine.address))
    await engine.is_greeted()
    return engine


def request() -> Request:
    return Request(request_id="r", prompt_token_ids=[1], sampling=SamplingParams(), max_tokens=9)


@pytest.mark.parametrize("aborted", [False, True])
async def test_a_request_of_an_engine_that_died_runs_again_unless_it_was_aborted(aborted: bool) -> None:
    async with two_engines() as (replicas, other, first):
        items: asyncio.Queue[Item] = asyncio.Queue()
        replicas.submit([request()], lambda _, item: items.put_nowait(item))
        await first.hears(Submit)
        if aborted:
            replicas.abort(["r"])
            await first.hears(Abort)
        replicas.tell(Status(1, None, "it died"))
        if not aborted:
            (again,) = (await other.hears(Submit)).requests
            other.tells(News([EngineOutput(request_id=again.request_id, finish_reason="stop")], [], 1, EngineMetrics()))
        item = await asyncio.wait_for(items.get(), WAIT_S)
        assert isinstance(item, EngineDead if aborted else EngineOutput)


async def test_a_request_that_no_message_can_hold_fails_alone() -> None:
    async with two_engines() as (replicas, *_, engine):
        items: asyncio.Queue[tuple[str, Item]] = asyncio.Queue()
        bad, good = (replace(request(), request_id=name, data_parallel_rank=1) for name in ("bad", "good"))
        bad.priority = 1 << 70
        replicas.submit([bad, good], lambda *item: items.put_nowait(item))
        assert len((await engine.hears(Submit)).requests) == 1
        name, item = await asyncio.wait_for(items.get(), WAIT_S)
        assert name == "bad" and isinstance(item, RequestError) and "can't serialize" in str(item)


async def test_an_engine_that_comes_while_the_others_act_does_so_too() -> None:
    async with two_engines() as (replicas, steady, _):
        replicas.tell(Status(1, None, "it died"))
        await until_up(replicas, True, False)
        sleeping = asyncio.create_task(replicas.sleep(1))
        action = await steady.hears(Action)
        new = await began_again(replicas, 1)
        steady.tells(Done(action.id))
        await sleeping
        assert [health.up for health in replicas.health()] == [True, False]
        await new.acts("sleep")
        await until_up(replicas, True, True)
        new.close()


async def test_an_engine_that_dies_of_what_the_others_do_catches_up() -> None:
    async with two_engines() as (replicas, steady, dying):
        updating = asyncio.create_task(replicas.update_weights("new"))
        action = await dying.hears(Action)
        new = await began_again(replicas, 1)
        await steady.acts(action.method)
        await updating
        await new.acts("update_weights")
        await until_up(replicas, True, True)
        new.close()


async def test_what_an_engine_refuses_is_the_callers_error_and_is_not_asked_of_those_that_come() -> None:
    async with two_engines() as (replicas, *engines):
        with pytest.raises(EngineError, match="no such file"):
            updating = asyncio.create_task(replicas.update_weights("new"))
            for engine in engines:
                action = await engine.hears(Action)
                engine.tells(Done(action.id, failure_of(EngineError("no such file"))))
            await updating
        new = await began_again(replicas, 1)
        await until_up(replicas, True, True)
        new.close()


async def test_an_action_that_nobody_waits_for_any_more_is_one_all_the_same() -> None:
    async with two_engines() as (replicas, *engines):
        sleeping = asyncio.create_task(replicas.sleep(1))
        actions = [await engine.hears(Action) for engine in engines]
        sleeping.cancel()
        await asyncio.gather(sleeping, return_exceptions=True)
        for engine, action in zip(engines, actions):
            engine.tells(Done(action.id))
        new = await began_again(replicas, 1)
        await new.acts("sleep")
        await until_up(replicas, True, True)
        new.close()


async def test_a_connection_that_was_lost_twice_in_a_row_comes_back_and_what_was_counted_counts_once() -> None:
    engine, counted = Engine("127.0.0.1"), EngineMetrics(generated_tokens=7, running=1)
    proxy = Proxy(engine.address.endpoint)
    replicas = Replicas(1, asyncio.get_running_loop())
    replicas.tell(Status(0, replace(engine.address, endpoint=await proxy.open())))
    await engine.hears(Hello)
    engine.tells(News([], [], 0, counted))
    await eventually(lambda: replicas.metrics().running)
    for _ in range(2):
        proxy.cut()
        await engine.hears(Hello)
        assert [health.why for health in replicas.health()] == ["the connection was lost"]
        assert (replicas.metrics().generated_tokens, replicas.metrics().running) == (7, 0)
    engine.tells(News([], [], 0, counted))
    await until_up(replicas, True)
    assert (replicas.metrics().generated_tokens, replicas.metrics().running) == (7, 1)
    replicas.close()
    await proxy.close()
    engine.close()
