"""An engine in other processes for a caller without an event loop: what EngineCore is to LLM."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

from headway.engine.metrics import EngineMetrics
from headway.engine.port import EngineClient, Item, Stream
from headway.messages import EngineOutput, Request

if TYPE_CHECKING:
    from headway.engine.upkeep import Weights

WAIT_S = 0.2
"""How long step() may take while nothing comes, so that Ctrl-C is heeded."""


class Stepped:
    """Used by one thread at a time. Dropped without close(), it closes the engine."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._items: SimpleQueue[tuple[str, Item]] = SimpleQueue()
        self._entering: list[Request] = []
        self._running: dict[str, Stream] = {}
        self._finalizer = weakref.finalize(self, _drop, engine)

    @property
    def upkeep(self) -> Stepped:
        return self

    def add(self, request: Request) -> None:
        """It enters with the next step()."""
        self._entering.append(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Nothing more comes of them."""
        self._enter()
        self._engine.leave([stream for name in request_ids if (stream := self._running.pop(name, None))])

    def has_work(self) -> bool:
        return bool(self._entering or self._running)

    def step(self) -> list[EngineOutput]:
        """What has come; waits a moment for the first. Raises what a request failed of."""
        self._enter()
        items: list[tuple[str, Item]] = []
        with suppress(Empty):
            items.append(self._items.get(timeout=WAIT_S))
            while True:
                items.append(self._items.get_nowait())
        return [output for name, item in items if (output := self._output(name, item)) is not None]

    def _output(self, name: str, item: Item) -> EngineOutput | None:
        if name not in self._running:
            return None
        if isinstance(item, BaseException) or item.finish_reason is not None:
            del self._running[name]
        if isinstance(item, BaseException):
            raise item
        return item

    def update_weights(self, weights: Weights) -> None:
        _wait_for(self._engine.update_weights(weights))

    def sleep(self, level: Literal[1, 2]) -> None:
        _wait_for(self._engine.sleep(level))

    def wake_up(self) -> None:
        _wait_for(self._engine.wake_up())

    def metrics(self) -> EngineMetrics:
        return self._engine.metrics()

    def close(self) -> None:
        self._finalizer.detach()
        self._engine.close()

    def _enter(self) -> None:
        if self._entering:
            entering, self._entering = self._entering, []
            streams = {request.request_id: Stream(request, None, self._put) for request in entering}
            self._engine.enter(list(streams.values()))
            self._running.update(streams)

    def _put(self, name: str, item: Item) -> None:
        self._items.put((name, item))


def _drop(engine: EngineClient) -> None:
    """What is garbage may be found on any thread, also on one that is to be waited for."""
    if threading.current_thread().daemon:  # those are
        threading.Thread(target=engine.close, name="headway-drop").start()
    else:
        engine.close()


def _wait_for(work: Coroutine[Any, Any, None]) -> None:
    with ThreadPoolExecutor(1) as pool:  # the caller's own thread may run an event loop
        pool.submit(asyncio.run, work).result()
