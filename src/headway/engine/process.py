"""An engine in a process of its own, for clients in others.

client ── Submit, Abort, Action ──> event loop ── AsyncEngine's methods ──> headway-engine thread
       <── News, one a client and step ──              <── outputs, one batch a step ──
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import msgspec

from headway.engine import AsyncEngine
from headway.engine.launch import load
from headway.engine.link import Listener
from headway.engine.port import Item
from headway.engine.wire import (
    Action,
    Done,
    Dying,
    EngineTicket,
    Hello,
    News,
    Ready,
    Submit,
    decode_ticket,
    decode_to_engine,
    encode,
)
from headway.errors import EngineDead
from headway.executor.channel.ring import frame
from headway.executor.channel.wire import Failure
from headway.executor.child import Parent
from headway.executor.failure import failure_of
from headway.messages import EngineOutput, Request

BEAT_S = 0.1
"""How old what clients know of the engine may get, while it does something."""


@dataclass(slots=True, eq=False)
class _Client:
    """running: ids of its requests. The rest goes into its next News."""

    name: bytes
    running: set[str] = field(default_factory=set[str])
    outputs: list[EngineOutput] = field(default_factory=list[EngineOutput])
    failures: list[tuple[str, Failure]] = field(default_factory=list[tuple[str, Failure]])
    taken: int = 0
    told: bool = False  # since the last beat


class EngineService:
    """load(), then run(): both on one thread."""

    def __init__(self, ticket: EngineTicket) -> None:
        self._ticket = ticket
        self._clients: dict[bytes, _Client] = {}
        self._dirty: set[_Client] = set()
        self._beats = False
        self._actions: set[asyncio.Task[None]] = set()
        self._over: Future[BaseException | None] = Future()

    def load(self) -> Ready:
        ticket = self._ticket
        config = ticket.config
        if config.trace is not None and ticket.replica:
            config = replace(config, trace=f"{config.trace}.replica{ticket.replica}")
        core, _, _ = load(config, ticket.facts, ticket.tokenizer)
        self._engine = AsyncEngine(core)
        self._engine.ended.add_done_callback(lambda ended: self._end(ended.result()))
        self._listener = Listener(ticket.host)
        info = msgspec.structs.replace(core.info, pids=core.info.pids or [os.getpid()])
        return Ready(self._listener.address, core.config, info)

    def run(self) -> BaseException | None:
        """Serves clients until stop(), or until the engine fails: what it failed of."""
        return asyncio.run(self._run())

    def stop(self) -> None:
        """From any thread."""
        self._end(None)

    async def _run(self) -> BaseException | None:
        self._loop = asyncio.get_running_loop()
        self._listener.open(self._take)
        error = await asyncio.wrap_future(self._over)
        if error is not None:
            for client in self._clients.values():
                self._listener.send(client.name, encode(Dying(str(error) or type(error).__name__)))
        self._clients, self._dirty = {}, set()  # nothing more is said to anybody
        self._listener.close()
        self._engine.close()
        return error

    def _end(self, error: BaseException | None) -> None:
        with suppress(InvalidStateError):  # it was over already
            self._over.set_result(error)

    def _take(self, name: bytes, data: bytes) -> None:
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = _Client(name)
        message = decode_to_engine(data)
        if isinstance(message, Submit):
            self._submit(client, message.requests)
        elif isinstance(message, Hello):
            self._news(client)
        elif isinstance(message, Action):
            task = self._loop.create_task(self._act(client, message))
            self._actions.add(task)
            task.add_done_callback(self._actions.discard)
        else:
            self._abort(message.request_ids)
        self._beat_soon()

    def _submit(self, client: _Client, requests: list[Request]) -> None:
        client.taken += len(requests)
        client.running.update(request.request_id for request in requests)
        with suppress(EngineDead):  # the client is told of that
            self._engine.submit(requests, partial(self._put, client))

    def _abort(self, request_ids: list[str]) -> None:
        with suppress(EngineDead):
            self._engine.abort(request_ids)

    def _put(self, client: _Client, name: str, item: Item) -> None:
        """An output, or what a request failed of: the engine's end is told otherwise."""
        if name not in client.running or self._engine.ended.done():
            return
        if isinstance(item, EngineOutput):
            client.outputs.append(item)
        else:
            client.failures.append((name, failure_of(item)))
        if not isinstance(item, EngineOutput) or item.finish_reason is not None:
            client.running.discard(name)
        if not self._dirty:
            self._loop.call_soon(self._flush)
        self._dirty.add(client)

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, set()
        for client in dirty:
            self._news(client)
        self._beat_soon()

    def _news(self, client: _Client) -> None:
        news = News(client.outputs, client.failures, client.taken, self._engine.metrics())
        client.outputs, client.failures, client.told = [], [], True
        self._send(client, news)

    def _send(self, client: _Client, message: Any) -> None:
        if not self._listener.send(client.name, encode(message)):
            self._clients.pop(client.name, None)
            self._abort(list(client.running))
            client.running.clear()

    def _beat_soon(self) -> None:
        if not self._beats:
            self._beats = True
            self._loop.call_later(BEAT_S, self._beat)

    def _beat(self) -> None:
        """Tells those who have not heard since the last one, as long as anything happens."""
        self._beats = False
        clients, metrics = list(self._clients.values()), self._engine.metrics()
        busy = metrics.running or metrics.waiting or any(client.told or client.running for client in clients)
        for client in clients:
            if not client.told:
                self._news(client)
            client.told = False
        if busy:
            self._beat_soon()

    async def _act(self, client: _Client, action: Action) -> None:
        failure = None
        try:
            await getattr(self._engine, action.method)(*action.args)
        except Exception as error:
            failure = failure_of(error)
        self._send(client, Done(action.id, failure))


def main() -> None:
    """The program that headway.executor.child starts. It tells its parent Ready, or the Failure that ended it; whatever
    the parent says ends it."""
    parent = Parent()
    ticket = decode_ticket(parent.ticket)
    service = EngineService(ticket)
    loaded = False

    def heard(_: bytes) -> None:
        if loaded:
            service.stop()
        else:
            parent.leave(0)

    def tell(message: Ready | Failure) -> None:
        parent.send(bytes(frame(encode(message))))

    parent.watch(f"headway-dp{ticket.replica}", heard)
    try:
        ready = service.load()
        loaded = True
        tell(ready)
        error = service.run()
        if error is not None:
            raise error
    except Exception as error:
        tell(failure_of(error))
        parent.leave(1)
    parent.leave(0)


if __name__ == "__main__":
    main()
