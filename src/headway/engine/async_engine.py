"""The engine for asyncio: one thread runs the loop, any number of event loops wait for outputs.

    caller ── inbox (a queue) ──> headway-engine thread: core.step() ── outputs ──> caller
                                            one call_soon_threadsafe per event loop and step

The thread sleeps in the inbox while there is nothing to do, but for a look at the workers now and then. Grammars are
compiled on another thread, one at a time, and come back through the inbox: no step waits for them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Literal

from headway.engine.constraints import constraint
from headway.engine.core import EngineCore
from headway.engine.grammar import Matcher
from headway.engine.metrics import EngineMetrics
from headway.engine.port import EngineClient, Health, Item, Stream, send
from headway.errors import EngineDead, EngineError, HeadwayError, RequestError
from headway.messages import EngineOutput

if TYPE_CHECKING:
    from headway.engine.upkeep import Weights

HEALTH_S = 1.0
"""How long an idle engine may go on without knowing that it has lost a worker."""


@dataclass(frozen=True, slots=True)
class _Leave:
    """Callers stopped listening."""

    streams: list[Stream]


@dataclass(frozen=True, slots=True)
class _Abort:
    """Someone ends a request by name; whoever listens gets its last output."""

    request_ids: list[str]


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A stream's constraint is ready, or cannot be honoured."""

    stream: Stream
    result: Matcher | BaseException | None


@dataclass(frozen=True, slots=True)
class _Action:
    """Something to do with the core."""

    run: Callable[[EngineCore], None]
    done: Future[None]


_Message = list[Stream] | _Leave | _Abort | _Compiled | _Action


class AsyncEngine(EngineClient):
    """Owns the core."""

    def __init__(self, core: EngineCore) -> None:
        super().__init__()
        self._core = core
        self._inbox: SimpleQueue[_Message | None] = SimpleQueue()
        self._streams: dict[str, Stream] = {}
        self._compiling: dict[str, Stream] = {}
        self._compiler = ThreadPoolExecutor(1, "headway-grammar")
        self._dead: BaseException | None = None
        # Orders a caller's look at _dead and its message: none is left in the inbox once the thread has ended.
        self._gate = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="headway-engine", daemon=True)
        self._thread.start()

    def enter(self, streams: list[Stream]) -> None:
        self._post(streams)

    def leave(self, streams: list[Stream]) -> None:
        self._post(_Leave(streams), dead_is_fine=True)

    async def update_weights(self, weights: Weights) -> None:
        await self._between_steps(lambda core: core.upkeep.update_weights(weights))

    async def sleep(self, level: Literal[1, 2]) -> None:
        await self._between_steps(lambda core: core.upkeep.sleep(level))

    async def wake_up(self) -> None:
        await self._between_steps(lambda core: core.upkeep.wake_up())

    async def _between_steps(self, run: Callable[[EngineCore], None]) -> None:
        """Runs something on the engine's thread. Raises what it raises."""
        done: Future[None] = Future()
        self._post(_Action(run, done))
        await asyncio.wrap_future(done)

    def abort(self, request_ids: list[str]) -> None:
        self._post(_Abort(request_ids))

    def replica_metrics(self) -> list[EngineMetrics]:
        return [self._core.metrics()]

    def health(self) -> list[Health]:
        return [Health(0, self._dead is None, "" if self._dead is None else str(self._dead))]

    def close(self, timeout: float = 5.0) -> None:
        with self._gate:
            self._inbox.put(None)
        self._thread.join(timeout)
        self._compiler.shutdown(cancel_futures=True)
        self._core.close(timeout)

    def _post(self, message: _Message, *, dead_is_fine: bool = False) -> None:
        with self._gate:
            if self._dead is None:
                self._inbox.put(message)
            elif not dead_is_fine:
                raise EngineDead(f"the engine does not run: {self._dead}") from self._dead

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
                message = self._inbox.get(block=not self._core.has_work(), timeout=HEALTH_S)
            except Empty:
                if self._core.has_work():
                    return True
                self._core.check()
                continue
            if message is None:
                return False
            self._take(message)

    def _take(self, message: _Message) -> None:
        if isinstance(message, list):
            for stream in message:
                self._enter(stream)
        elif isinstance(message, _Abort):
            self._abort(message.request_ids)
        elif isinstance(message, _Leave):
            for stream in message.streams:
                self._drop(stream)
        elif isinstance(message, _Compiled):
            self._add_compiled(message)
        else:
            self._act(message)

    def _enter(self, stream: Stream) -> None:
        if constraint(stream.request) is None:
            self._add(stream)
        else:
            self._compile(stream)

    def _act(self, action: _Action) -> None:
        if not action.done.set_running_or_notify_cancel():
            return
        try:
            action.run(self._core)
        except Exception as error:
            action.done.set_exception(error)
        else:
            action.done.set_result(None)

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
            self._inbox.put(_Compiled(stream, done.exception() or done.result()))

    def _add_compiled(self, message: _Compiled) -> None:
        stream, result = message.stream, message.result
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

    def _drop(self, stream: Stream) -> None:
        # The name may belong to a later request by now.
        name = stream.request.request_id
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
        for stream in send(items):
            self._drop(stream)

    def _end(self, error: BaseException) -> None:
        """Tells everybody who waits or has just asked."""
        with self._gate:
            self._dead = error
            streams = [*self._streams.values(), *self._compiling.values()]
            while not self._inbox.empty():
                message = self._inbox.get()
                if isinstance(message, list):
                    streams += message
                elif isinstance(message, _Action) and message.done.set_running_or_notify_cancel():
                    message.done.set_exception(error)
        self._streams, self._compiling = {}, {}
        self.ended.set_result(error)
        self._send([(stream, error) for stream in streams])
