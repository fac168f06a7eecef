"""One endpoint as an ASGI application: body in, answer or stream of events out, errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Generic, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from headway.engine.port import Pause
from headway.server.connection import EXCHANGE, Exchange
from headway.server.errors import RETRY, ApiError, api_error
from headway.server.protocol import decode
from headway.server.state import State

T = TypeVar("T")

Write = Callable[[bytes], Pause | None]
"""Of events, if there are any."""
Events = Callable[[Write], Awaitable[bytes]]
"""Writes events, and returns the last ones."""
Answer = bytes | Events
Headers = list[tuple[bytes, bytes]]

_JSON = (b"content-type", b"application/json")
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]

MOST_BODIES = 64
"""How many of the largest there is room for before they have come as a whole."""
SMALL_BYTES = 64 << 10
"""A body that finds room nevertheless."""


class Endpoint(Generic[T]):
    """A POST of JSON. answer: gives the body of the answer, or its events. A client that leaves cancels it."""

    def __init__(self, state: State, kind: type[T], answer: Callable[[State, T], Awaitable[Answer]]) -> None:
        self._state, self._answer = state, answer
        self._decoder = msgspec.json.Decoder(kind)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = scope.pop(EXCHANGE)
        reply = Reply(send, exchange)
        try:
            body = await read_body(scope, receive, self._state)
            state = _for_replica(self._state, scope["headers"])
            await _unless_gone(self._serve(state, body, reply), exchange)
        except _Gone:
            pass
        except asyncio.CancelledError:
            if not self._state.draining:
                raise
            await reply.fail(ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the server is shutting down"))
        except Exception as error:
            await reply.fail(error)

    async def _serve(self, state: State, body: bytes, reply: Reply) -> None:
        request = decode(self._decoder, body)
        with self._state.room():
            answer = await self._answer(state, request)
            if isinstance(answer, bytes):
                await reply.whole(HTTPStatus.OK, answer)
            else:
                await reply.stream(answer)


class Reply:
    """The answer to one request, on its way."""

    def __init__(self, send: Send, exchange: Exchange | None = None) -> None:
        self._send, self._exchange = send, exchange
        self._started, self._early = False, b""

    async def whole(self, status: HTTPStatus, body: bytes, headers: Headers | None = None) -> None:
        length = (b"content-length", str(len(body)).encode())
        await self._start(status, [_JSON, length, *(headers or ())])
        await self._send({"type": "http.response.body", "body": body})

    async def stream(self, events: Events) -> None:
        await self._send({"type": "http.response.body", "body": await events(self._write)})

    def _write(self, events: bytes) -> Pause | None:
        """Nothing is sent before the first event is there: until then an error still has a status."""
        if not events:
            return None
        if self._started:
            assert self._exchange is not None
            return self._exchange.write(events)
        begins, self._early = not self._early, self._early + events
        return self._begin if begins else None

    async def _begin(self) -> None:
        await self._start(HTTPStatus.OK, _EVENTS)
        self._started = True
        if (pause := self._write(self._early)) is not None:
            await pause()

    async def _start(self, status: HTTPStatus, headers: Headers) -> None:
        if self._exchange is not None:
            self._exchange.hold_head()
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def fail(self, error: Exception) -> None:
        told = api_error(error)
        if told.status == HTTPStatus.INTERNAL_SERVER_ERROR:
            logging.getLogger("headway").error("a request failed", exc_info=error)
        if self._started:
            await self._send({"type": "http.response.body", "body": b"data: " + told.body() + b"\n\n"})
        else:
            headers = [(name.encode(), value.encode()) for name, value in told.headers.items()]
            await self.whole(told.status, told.body(), headers)


def _for_replica(state: State, headers: Headers) -> State:
    """The state, or what a request that names its replica is to see of it."""
    for name, value in headers:
        if name == b"x-data-parallel-rank":
            if not value.isdigit() or len(value) > 9:
                message = f"X-data-parallel-rank={value.decode('latin-1')}: must be the number of a replica"
                raise ApiError(HTTPStatus.BAD_REQUEST, message, param="X-data-parallel-rank")
            return state.for_replica(int(value))
    return state


class _Gone(Exception):
    """The client has left."""


async def read_body(scope: Scope, receive: Receive, state: State) -> bytes:
    """What says that it is too large is refused unread; what turns out to be, then."""
    body, limit = bytearray(), state.options.max_body_bytes
    told = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    if int(told) > limit:
        raise _too_large(scope, limit)
    try:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            body += message["body"]
            state.reading += len(message["body"])
            if len(body) > limit:
                raise _too_large(scope, limit)
            if not message.get("more_body"):
                return bytes(body)
            if state.reading > MOST_BODIES * limit and len(body) > SMALL_BYTES:
                message = "as many large bodies are on their way as may"
                raise ApiError(HTTPStatus.TOO_MANY_REQUESTS, message, headers=RETRY)
    finally:
        state.reading -= len(body)


def _too_large(scope: Scope, limit: int) -> ApiError:
    """What still comes of the body is dropped: a connection that is closed meanwhile may lose the answer."""
    waits = any(name == b"expect" for name, _ in scope["headers"])  # then the body may come, or another request
    message = f"the body has more than max_body_bytes={limit}"
    headers = {"connection": "close"} if waits else None
    return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, headers=headers)


async def _unless_gone(work: Awaitable[None], exchange: Exchange) -> None:
    """Raises _Gone, and cancels the work, as soon as the client leaves."""
    task = asyncio.current_task()
    assert task is not None
    left = False

    def leave() -> None:
        nonlocal left
        left = True
        task.cancel()

    exchange.watch(leave)
    try:
        await work
    except asyncio.CancelledError:
        if left:
            raise _Gone from None
        raise
    finally:
        exchange.unwatch()
