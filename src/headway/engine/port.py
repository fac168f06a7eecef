"""What the text side needs of an engine, wherever it runs: in this process (AsyncEngine) or in others (Replicas)."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from headway.engine.metrics import EngineMetrics
from headway.errors import EngineDead
from headway.messages import EngineOutput, Request

if TYPE_CHECKING:
    from headway.engine.upkeep import Weights

Item = EngineOutput | BaseException
Put = Callable[[str, Item], None]
Pause = Callable[[], Awaitable[object]]
"""What a taker returns that takes nothing more until it has been called and waited for."""
Take = Callable[[EngineOutput], Pause | None]


class Health(msgspec.Struct, frozen=True):
    """Of one replica. why: it does not run, if it does not."""

    replica: int
    up: bool
    why: str = ""


@dataclass(slots=True, eq=False)
class Stream:
    """A request and its caller's end: ``put``, which is called on the caller's event loop; without one, anywhere."""

    request: Request
    loop: asyncio.AbstractEventLoop | None
    put: Put


class Enough(Exception):
    """Raised by a Take that wants nothing more."""


class EngineClient(ABC):
    """May be used from any thread and any event loop. A dead engine raises EngineDead, which says why.

    ended: is set, to the reason, once the engine has failed for good or was closed.
    """

    def __init__(self) -> None:
        self.ended: Future[BaseException] = Future()
        self.ended.set_running_or_notify_cancel()  # who no longer waits for it does not cancel it
        self._outbox = Outbox()
        self._gate = threading.RLock()  # orders a caller's look at ``ended`` and its message

    async def generate(self, *requests: Request) -> AsyncGenerator[EngineOutput, None]:
        """The requests' outputs as the engine gives them, until each has one with a finish_reason.

        What has come of a request since its last output is one: who is slow gets tokens together.

        Closing the iterator early aborts what still runs. Raises RequestError for a bad request, and what ended the
        engine if it fails.
        """
        inbox = _Inbox()
        with self._entered(requests, inbox) as running:
            while running:
                for output in await inbox.next(running):
                    yield output

    async def follow(self, requests: Iterable[Request], take: Take) -> None:
        """As generate(), with what take makes of the outputs: most of them without a switch of tasks, as it is called
        where they arrive.
        """
        inbox = _Inbox(take)
        with suppress(Enough), self._entered(requests, inbox) as running:
            while running:
                for output in await inbox.next(running):
                    if (pause := take(output)) is not None:
                        await pause()

    @contextmanager
    def _entered(self, requests: Iterable[Request], inbox: _Inbox) -> Generator[dict[str, Stream]]:
        """Those of the requests that have not ended, by name. They end with it."""
        loop = asyncio.get_running_loop()
        running = {request.request_id: Stream(request, loop, inbox.put) for request in requests}
        try:
            self.enter(list(running.values()))
            yield running
        finally:
            if running:
                self.leave(list(running.values()))

    def submit(self, requests: Iterable[Request], put: Put) -> None:
        """As generate(), without an iterator for each: put is called on this event loop with a request's id and each of
        its outputs in turn, or what ended it.
        """
        loop = asyncio.get_running_loop()
        self.enter([Stream(request, loop, put) for request in requests])

    def enter(self, streams: list[Stream]) -> None:
        """From now on their callers get outputs."""
        self._post(self._enter, streams)

    def leave(self, streams: list[Stream]) -> None:
        """Their callers have stopped listening; what still runs of them is aborted."""
        with suppress(EngineDead):
            self._post(self._leave, streams)

    def abort(self, request_ids: list[str]) -> None:
        """Ends requests; whoever listens gets a last output with finish_reason "abort". Unknown ids are ignored."""
        self._post(self._abort, request_ids)

    @abstractmethod
    async def update_weights(self, weights: Weights) -> None:
        """As LLM.update_weights, but refused with EngineError while requests run; so are the other two."""

    @abstractmethod
    async def sleep(self, level: Literal[1, 2]) -> None: ...

    @abstractmethod
    async def wake_up(self) -> None: ...

    def metrics(self) -> EngineMetrics:
        """Of all replicas."""
        return sum(self.replica_metrics(), EngineMetrics())

    @abstractmethod
    def replica_metrics(self) -> list[EngineMetrics]:
        """Of each, with what it counted before it died."""

    @abstractmethod
    def health(self) -> list[Health]: ...

    @abstractmethod
    def close(self, timeout: float = 5.0) -> None:
        """Idempotent. Whoever still waits gets EngineDead."""

    def _post(self, act: Callable[..., None], *args: Any) -> None:
        with self._gate:
            if self.ended.done():
                error = self.ended.result()
                raise EngineDead(f"the engine does not run: {error}") from error
            self._soon(act, *args)

    @abstractmethod
    def _soon(self, act: Callable[..., None], *args: Any) -> None:
        """Calls it where the engine's state belongs, in the order of these calls. The next three are called there."""

    @abstractmethod
    def _enter(self, streams: list[Stream]) -> None: ...

    @abstractmethod
    def _leave(self, streams: list[Stream]) -> None: ...

    @abstractmethod
    def _abort(self, request_ids: list[str]) -> None: ...


class _Inbox:
    """What a caller has not taken yet. direct: takes what comes while the caller waits, but for last outputs."""

    def __init__(self, direct: Take | None = None) -> None:
        self._direct = direct
        self._outputs: dict[str, EngineOutput] = {}
        self._error: BaseException | None = None
        self._pause: Pause | None = None
        self._waiting: asyncio.Future[None] | None = None

    def put(self, request_id: str, item: Item) -> None:
        waiting = None if self._waiting is None or self._waiting.done() else self._waiting
        if isinstance(item, BaseException):
            self._error = item
        elif waiting is not None and self._direct is not None and item.finish_reason is None:
            try:
                self._pause = self._direct(item)
            except Exception as error:
                self._error = error
            else:
                if self._pause is None:
                    return
        else:
            before = self._outputs.get(request_id)
            self._outputs[request_id] = item if before is None else _joined(before, item)
        if waiting is not None:
            waiting.set_result(None)

    async def next(self, running: dict[str, Stream]) -> Iterable[EngineOutput]:
        """Of each request one, waits for any; running loses those that end. Raises what came after them."""
        while not self._outputs:
            if self._error is not None:
                raise self._error
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
            if self._pause is not None:
                await self._pause()
                self._pause = None
        outputs, self._outputs = self._outputs.values(), {}
        for output in outputs:
            if output.finish_reason is not None:
                del running[output.request_id]
        return outputs


def _joined(first: EngineOutput, then: EngineOutput) -> EngineOutput:
    """Of one request."""
    return msgspec.structs.replace(
        then,
        token_ids=first.token_ids + then.token_ids,
        logprobs=then.logprobs if first.logprobs is None else first.logprobs + (then.logprobs or []),
        prompt_logprobs=first.prompt_logprobs or then.prompt_logprobs,
        num_cached_tokens=max(first.num_cached_tokens, then.num_cached_tokens),
    )


class Outbox:
    """Hands items to their callers: with one wake-up for all that an event loop has not taken yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Item]]] = {}

    def send(self, items: list[tuple[Stream, Item]]) -> list[Stream]:
        """Returns streams whose event loop is closed."""
        by_loop: dict[asyncio.AbstractEventLoop | None, list[tuple[Stream, Item]]] = {}
        for stream, item in items:
            by_loop.setdefault(stream.loop, []).append((stream, item))
        _put(by_loop.pop(None, []))
        lost: list[Stream] = []
        for loop, batch in by_loop.items():
            assert loop is not None
            with self._lock:
                waiting = self._waiting.setdefault(loop, batch)
                if waiting is not batch:
                    waiting += batch
            try:
                if waiting is batch or loop.is_closed():
                    loop.call_soon_threadsafe(self._hand_out, loop)
            except RuntimeError:  # that event loop is closed: its callers are gone
                del self._waiting[loop]
                lost += {stream for stream, _ in waiting}
        return lost

    def _hand_out(self, loop: asyncio.AbstractEventLoop) -> None:
        """What has come of a stream meanwhile is one output."""
        with self._lock:
            batch = self._waiting.pop(loop)
        outputs: dict[Stream, EngineOutput] = {}
        failed: list[tuple[Stream, Item]] = []
        for stream, item in batch:
            if isinstance(item, BaseException):
                failed.append((stream, item))
            else:
                before = outputs.get(stream)
                outputs[stream] = item if before is None else _joined(before, item)
        _put(outputs.items())
        _put(failed)


def _put(items: Iterable[tuple[Stream, Item]]) -> None:
    for stream, item in items:
        stream.put(stream.request.request_id, item)
