"""Clients of an OpenAI server: so many at a time, each with one request after the other, at little cost of their own.

A stream's events are found in its bytes and not read: what a chunk says costs the server's machine nothing twice.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from itertools import pairwise
from time import perf_counter
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from headway.errors import EngineError

_EVENT, _DONE = b"data: ", b"data: [DONE]"


class Load(msgspec.Struct, kw_only=True, frozen=True):
    """What the clients saw. Seconds: from a request to its first event, between events, of whole answers.

    tokens: that the server says it has generated, in all.
    """

    elapsed_s: float
    tokens: int
    requests: int
    ttft_s: list[float]
    itl_s: list[float]
    e2e_s: list[float]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.elapsed_s


async def drive(url: str, path: str, bodies: list[bytes], concurrency: int, headers: dict[str, str]) -> Load:
    """Sends them all. Raises EngineError with what the server says if one is not answered."""
    queue = iter(bodies)
    clients = [_Client(url, path, headers) for _ in range(min(concurrency, len(bodies)))]
    began = perf_counter()
    await asyncio.gather(*(client.run(queue) for client in clients))
    return Load(
        elapsed_s=perf_counter() - began,
        tokens=sum(client.tokens for client in clients),
        requests=len(bodies),
        ttft_s=[gap for client in clients for gap in client.ttft_s],
        itl_s=[gap for client in clients for gap in client.itl_s],
        e2e_s=[gap for client in clients for gap in client.e2e_s],
    )


class _Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, url: str, path: str, headers: dict[str, str]) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        lines = [f"POST {parts.path.rstrip('/')}{path} HTTP/1.1", f"host: {parts.netloc}"]
        lines += ["content-type: application/json", *(f"{name}: {value}" for name, value in headers.items())]
        self._head = "\r\n".join(lines).encode() + b"\r\ncontent-length: %d\r\n\r\n"
        self.tokens = 0
        self._answered: asyncio.Future[None] | None = None
        self.ttft_s: list[float] = []
        self.itl_s: list[float] = []
        self.e2e_s: list[float] = []

    async def run(self, bodies: Iterator[bytes]) -> None:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(lambda: self, self._host, self._port)
        cast("socket.socket", transport.get_extra_info("socket")).setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for body in bodies:
                self._parser = httptools.HttpResponseParser(self)
                self._body, self._times = bytearray(), list[float]()
                self._answered = loop.create_future()
                sent = perf_counter()
                transport.write(self._head % len(body) + body)
                await self._answered
                self._count(sent)
        finally:
            transport.close()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(EngineError(f"the server closed a connection: {exc or 'without an answer'}"))

    def on_body(self, body: bytes) -> None:
        self._body += body
        if _EVENT in body:
            self._times.append(perf_counter())

    def on_message_complete(self) -> None:
        assert self._answered is not None
        self._answered.set_result(None)

    def _count(self, sent: float) -> None:
        status, ended = self._parser.get_status_code(), perf_counter()
        if status != 200:
            raise EngineError(f"the server answers with status {status}: {self._body[:300].decode(errors='replace')}")
        streamed = self._body.startswith(_EVENT)
        if streamed and not self._body.rstrip().endswith(_DONE):
            raise EngineError(f"a stream ended early: {self._body[-300:].decode(errors='replace')}")
        self.tokens += _generated(bytes(self._body), streamed)
        self.e2e_s.append(ended - sent)
        if self._times:
            self.ttft_s.append(self._times[0] - sent)
            self.itl_s += [after - before for before, after in pairwise(self._times[:-1])]  # the last is the usage


def _generated(body: bytes, streamed: bool) -> int:
    """By the usage, which a stream has in the event before its last."""
    answer: Any = json.loads(body.split(b"\n\n")[-3].removeprefix(_EVENT) if streamed else body)
    return answer["usage"]["completion_tokens"]
