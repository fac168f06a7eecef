"""Connections whose clients get on with it: what uvicorn bounds neither in time nor in memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from headway.engine.port import Pause

MAX_HEAD_BYTES = 64 << 10
"""Of a request, without one of its body between: its head, trailers, the extensions of a chunk."""
LEAST_BYTES = 16 << 10
"""Of a request that takes longer than client_timeout, in each such time."""
MOST_DROPPED_BYTES = 128 << 20
"""Of a body that comes after the answer."""
MOST_PIPELINED = 128
"""Requests on a connection that have no answer yet."""
EXCHANGE = "headway.exchange"
"""In the scope of a POST: its Exchange."""


class _HeadHeld:
    """In place of a transport: keeps the head of an answer until there is more, as each write wakes the client."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle, self._transport = cycle, cycle.transport
        self._head = b""

    def write(self, data: bytes) -> None:
        if self._head:
            self._cycle.transport = self._transport
            self._transport.write(self._head + data)
        self._head = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Exchange:
    """A request and its answer, past what ASGI's messages cost."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._left: Callable[[], None] | None = None

    def watch(self, left: Callable[[], None]) -> None:
        """left: to be called if the client leaves before the end. Once the body has been read."""
        self._left = left
        self._cycle.flow.resume_reading()

    def unwatch(self) -> None:
        self._left = None

    def lose(self) -> None:
        self._cycle.disconnected = True
        self._cycle.message_event.set()
        if self._left is not None:
            self._left()

    def hold_head(self) -> None:
        """To be called before an answer with a body begins."""
        self._cycle.transport = _HeadHeld(self._cycle)  # pyright: ignore[reportAttributeAccessIssue]

    def write(self, body: bytes) -> Pause | None:
        """More of an answer that has begun and has no length."""
        if self._cycle.disconnected:
            return None
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return self._cycle.flow.drain if self._cycle.flow.write_paused else None


class Connection(HttpToolsProtocol):
    """client_timeout: seconds for a request to come, or LEAST_BYTES of it; and for the client to take what waits."""

    def __init__(self, client_timeout: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timeout = client_timeout
        self._bare = self._received = self._dropped = 0
        self._unanswered: deque[Exchange] = deque()
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for exchange in self._unanswered:  # of which uvicorn tells the last
            exchange.lose()
        self._request_is_there()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        if not self._unanswered:
            self._expect_request()
        self._received += len(data)
        self._bare += len(data)
        super().data_received(data)
        if self._bare > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_request()
        self._dropped = 0
        if len(self._unanswered) >= MOST_PIPELINED:
            raise ValueError("too many requests wait for an answer")  # which is answered as what is no request is

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        exchange = Exchange(self.cycle)
        self._unanswered.append(exchange)
        if self.scope["method"] == "POST":
            self.scope[EXCHANGE] = exchange  # pyright: ignore[reportGeneralTypeIssues]

    def on_response_complete(self) -> None:
        self._unanswered.popleft()
        super().on_response_complete()

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._bare = 0
        if self.cycle.response_complete:
            self._dropped += len(body)
            if self._dropped > MOST_DROPPED_BYTES:
                self.transport.abort()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._bare = 0
        self._request_is_there()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(self._timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()

    def _expect_request(self) -> None:
        if self._reading is None:
            self._received = 0
            self._reading = self.loop.call_later(self._timeout, self._check_reading)

    def _request_is_there(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _check_reading(self) -> None:
        if self._received >= LEAST_BYTES or self.flow.read_paused:
            self._reading = None
            self._expect_request()
        else:
            self.transport.abort()


def connections(client_timeout: float) -> Any:
    """What uvicorn takes for a class of protocols."""
    return partial(Connection, client_timeout)
