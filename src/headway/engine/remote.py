"""One engine process, as a client sees it. Everything here happens on one event loop."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from headway.engine.link import Dialer
from headway.engine.metrics import EngineMetrics
from headway.engine.port import Item, Stream
from headway.engine.replay import Act
from headway.engine.wire import Abort, Action, Dying, Hello, Method, News, Submit, decode_to_client, encode
from headway.errors import EngineDead
from headway.executor.channel.wire import Address
from headway.executor.failure import error_of


@dataclass(slots=True, eq=False)
class Sent:
    """A request on its way. started: its caller has had something of it. tries: how often it was sent."""

    stream: Stream
    remote: RemoteEngine | None = None
    id: str = ""
    started: bool = False
    tries: int = 0


class RemoteEngine:
    """arrived: called with what a step gave. died: if the engine says that it ends. lost: if the connection to it was.

    greeted: is set once it has answered. did: what is known of its actions, as Replay.acts.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        replica: int,
        address: Address,
        did: list[Act],
        arrived: Callable[[list[tuple[Sent, Item]]], None],
        died: Callable[[RemoteEngine, str], None],
        lost: Callable[[RemoteEngine], None],
    ) -> None:
        self.replica, self.address, self.did = replica, address, did
        self.metrics = EngineMetrics()
        self.greeted = asyncio.Event()
        self._loop, self._arrived, self._died = loop, arrived, died
        self._ids = (f"{secrets.token_hex(4)}-{number}" for number in itertools.count())
        self._sent: dict[str, Sent] = {}
        self._submitted = self._taken = 0
        self._numbers = itertools.count()
        self._actions: dict[int, asyncio.Future[None]] = {}
        self._closed = ""  # why
        self._dialer = Dialer(loop, address, self._take, lambda: lost(self))
        self._dialer.send(encode(Hello()))

    @property
    def load(self) -> int:
        """Requests that run or wait there, those included that it cannot have counted yet."""
        return self.metrics.running + self.metrics.waiting + self._submitted - self._taken

    def submit(self, batch: list[Sent]) -> None:
        """Raises OverflowError, TypeError or UnicodeError, and does nothing, for what no message can hold."""
        ids = [next(self._ids) for _ in batch]
        requests = [msgspec.structs.replace(sent.stream.request, request_id=name) for sent, name in zip(batch, ids)]
        self._dialer.send(encode(Submit(requests)))
        self._submitted += len(batch)
        for sent, name in zip(batch, ids):
            sent.remote, sent.id, sent.tries = self, name, sent.tries + 1
            self._sent[name] = sent

    def abort(self, batch: list[Sent]) -> None:
        """Their last outputs still come."""
        self._dialer.send(encode(Abort([sent.id for sent in batch])))

    def forget(self, batch: list[Sent]) -> None:
        for sent in batch:
            self._sent.pop(sent.id, None)
        self.abort(batch)

    async def act(self, method: Method, *args: int | str) -> None:
        """Raises what it raises there."""
        if self._closed:
            raise EngineDead(f"replica {self.replica}: {self._closed}")
        number, done = next(self._numbers), self._loop.create_future()
        self._actions[number] = done
        self._dialer.send(encode(Action(number, method, list(args))))
        await done

    def close(self, why: str) -> list[Sent]:
        """What is without an answer."""
        self._dialer.close()
        self._closed = why
        self.greeted.set()  # who waits for that finds it closed
        for done in self._actions.values():
            if not done.done():
                done.set_exception(EngineDead(f"replica {self.replica}: {why}"))
        left, self._sent = list(self._sent.values()), {}
        return left

    def _take(self, data: bytes) -> None:
        message = decode_to_client(data)
        if isinstance(message, News):
            self._news(message)
        elif isinstance(message, Dying):
            self._died(self, message.why)
        else:
            done = self._actions.pop(message.id)
            if message.failure is None:
                done.set_result(None)
            else:
                done.set_exception(error_of(0, message.failure))

    def _news(self, news: News) -> None:
        self.metrics, self._taken = news.metrics, news.taken
        self.greeted.set()
        items: list[tuple[Sent, Item]] = []
        for output in news.outputs:
            sent = self._sent.get(output.request_id)
            if sent is None:
                continue
            if output.finish_reason is not None:
                del self._sent[output.request_id]
            sent.started = True
            output.request_id = sent.stream.request.request_id
            items.append((sent, output))
        for name, failure in news.failures:
            if (sent := self._sent.pop(name, None)) is not None:
                items.append((sent, error_of(0, failure)))
        if items:
            self._arrived(items)
