"""The engine for asyncio: one thread runs the loop, any number of event loops wait for outputs.

    caller ── inbox (a queue) ──> headway-engine thread: core.step() ── outputs ──> caller
                                            one call_soon_threadsafe per event loop and step

The thread sleeps in the inbox while there is nothing to do, but for a look at the workers now and then. Grammars are
compiled on another thread, one at a time, and come back through the inbox: no step waits for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal

from headway.engine.constraints import constraint
from headway.engine.core import EngineCore
from headway.engine.grammar import Matcher
from headway.engine.metrics import EngineMetrics
from headway.engine.port import EngineClient, Health, Item, Stream
from headway.errors import EngineDead, EngineError, HeadwayError, RequestError
from headway.messages import EngineOutput

if TYPE_CHECKING:
    from headway.engine.upkeep import Weights

HEALTH_S = 1.0
"""How long an idle engine may go on without knowing that it has lost a worker."""


class AsyncEngine(EngineClient):
    """Owns the core."""

    def __init__(self, core: EngineCore) -> None:
        super().__init__()
        self._core = core
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._streams: dict[str, Stream] = {}
        self._compiling: dict[str, Stream] = {}
        self._compiler = ThreadPoolExecutor(1, "headway-grammar")
        self._thread = Thread(target=self._run, name="headway-engine", daemon=True)
        self._thread.start()

    async def update_weights(self, weights: Weights) -> None:
        await self._between_steps(lambda core: core.upkeep.update_weights(weights))

    async def sleep(self, level: Literal[1, 2]) -> None:
        await self._between_steps(lambda core: core.upkeep.sleep(level))

    async def wake_up(self) -> None:
        await self._between_steps(lambda core: core.upkeep.wake_up())

    async def _between_steps(self, run: Callable[[EngineCore], None]) -> None:
        """Runs something on the engine's thread. Raises what it raises."""
        done: Future[None] = Future()
        self._post(self._act, run, done)
        await asyncio.wrap_future(done)

    def replica_metrics(self) -> list[EngineMetrics]:
        return [self._core.metrics()]

    def health(self) -> list[Health]:
        ended = self.ended.done()
        return [Health(0, not ended, str(self.ended.result()) if ended else "")]

    def close(self, timeout: float = 5.0) -> None:
        self._inbox.put(None)
        self._thread.join(timeout)
        self._compiler.shutdown(cancel_futures=True)
        self._core.close(timeout)

    def _soon(self, act: Callable[..., None], *args: Any) -> None:
        self._inbox.put(partial(act, *args))

    # The engine's thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._read_inbox():
                if self._core.has_work():
                    self._deliver(self._core.step())
            self._end(EngineDead("the engine was closed"))
        except BaseException as error:
            self._end(error)
            with suppress(EngineError):  # close() tells
                self._core.close()  # the memory of the workers that are left

    def _read_inbox(self) -> bool:
        """Takes in every message, waiting for one if there is nothing else to do; False at the end."""
        while True:
            try:
                act = self._inbox.get(block=not self._core.has_work(), timeout=HEALTH_S)
            except Empty:
                if self._core.has_work():
                    return True
                self._core.check()
                continue
            if act is None:
                return False
            act()

    def _enter(self, streams: list[Stream]) -> None:
        if self.ended.done():
            self._send([(stream, self.ended.result()) for stream in streams])
            return
        for stream in streams:
            if constraint(stream.request) is None:
                self._add(stream)
            else:
                self._compile(stream)

    def _act(self, run: Callable[[EngineCore], None], done: Future[None]) -> None:
        if not done.set_running_or_notify_cancel():
            return
        if self.ended.done():
            done.set_exception(self.ended.result())
            return
        try:
            run(self._core)
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    def _compile(self, stream: Stream) -> None:
        name = stream.request.request_id
        if name in self._compiling:
            self._send([(stream, RequestError("request_id", name, "is in use"))])
            return
        self._compiling[name] = stream
        future = self._compiler.submit(self._core.compile, stream.request)
        future.add_done_callback(lambda done: self._hand_back(stream, done))

    def _hand_back(self, stream: Stream, done: Future[Matcher | None]) -> None:
        if not done.cancelled():  # by close()
            self._soon(self._add_compiled, stream, done.exception() or done.result())

    def _add_compiled(self, stream: Stream, result: Matcher | BaseException | None) -> None:
        if self._compiling.get(stream.request.request_id) is not stream:
            return  # it was aborted meanwhile
        del self._compiling[stream.request.request_id]
        if isinstance(result, BaseException):
            self._send([(stream, result)])
        else:
            self._add(stream, result)

    def _add(self, stream: Stream, matcher: Matcher | None = None) -> None:
        try:
            self._core.add(stream.request, matcher)
        except HeadwayError as error:
            self._send([(stream, error)])
        else:
            self._streams[stream.request.request_id] = stream

    def _abort(self, request_ids: list[str]) -> None:
        self._deliver(self._core.abort(request_ids))
        waiting = [(name, stream) for name in request_ids if (stream := self._compiling.pop(name, None)) is not None]
        self._send([(stream, EngineOutput(request_id=name, finish_reason="abort")) for name, stream in waiting])

    def _leave(self, streams: list[Stream]) -> None:
        for stream in streams:
            name = stream.request.request_id  # which may belong to a later request by now
            if self._compiling.get(name) is stream:
                del self._compiling[name]
            elif self._streams.get(name) is stream:
                del self._streams[name]
                self._core.abort([name])

    def _deliver(self, outputs: list[EngineOutput]) -> None:
        items: list[tuple[Stream, Item]] = []
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                items.append((stream, output))
                if output.finish_reason is not None:
                    del self._streams[output.request_id]
        self._send(items)

    def _send(self, items: list[tuple[Stream, Item]]) -> None:
        self._leave(self._outbox.send(items))

    def _end(self, error: BaseException) -> None:
        """Tells everybody who waits or has just asked."""
        with self._gate:
            self.ended.set_result(error)
        streams = [*self._streams.values(), *self._compiling.values()]
        self._streams, self._compiling = {}, {}
        self._send([(stream, error) for stream in streams])
        while not self._inbox.empty():
            if (act := self._inbox.get()) is not None:
                with suppress(EngineDead):  # abort() has nothing to end
                    act()
