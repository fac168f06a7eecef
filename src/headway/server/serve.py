"""One front end: HTTP over an AsyncLLM, on the running event loop."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from math import ceil
from typing import Any

import uvicorn

from headway.server.app import make_app
from headway.server.connection import connections
from headway.server.state import State

CLOSE_S = 1
"""For what is still on its way to clients at the end."""


class Wishes:
    """That the server ends: the first lets requests finish, the second does not. From any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[None] = asyncio.Queue()

    def on_signals(self) -> Wishes:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self.add)
        return self

    def add(self) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, None)

    async def next(self) -> None:
        await self._queue.get()


async def serve(state: State, listener: socket.socket, wishes: Wishes, ready: Callable[[], None]) -> None:
    """Until it is wished to end. ready: called once it listens."""
    options = state.options
    config = uvicorn.Config(
        make_app(state),
        http=connections(options.client_timeout),
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        root_path=options.root_path,
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
        ssl_ca_certs=options.ssl_ca_certs,
        ssl_cert_reqs=ssl.CERT_REQUIRED if options.ssl_ca_certs else ssl.CERT_NONE,
        timeout_keep_alive=ceil(options.client_timeout),
        timeout_graceful_shutdown=CLOSE_S,
    )
    server = _Server(config, ready)
    gc.set_threshold(20_000, 20, 50)  # requests are many objects and no cycles
    serving = asyncio.create_task(server.serve([listener]))
    await first(serving, wishes.next())
    if not serving.done():
        await first(state.drain(), wishes.next(), asyncio.sleep(options.shutdown_timeout))
        if state.tasks:
            print(f"headway: ends with {len(state.tasks)} requests unfinished", file=sys.stderr)
            state.cut()
        server.should_exit = True
    await serving
    if state.traces is not None:
        state.traces.close()


class _Server(uvicorn.Server):
    """Signals are ours."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()


async def first(*these: Coroutine[Any, Any, object] | asyncio.Future[Any]) -> None:
    """Until one of them ends; the coroutines among the others are cancelled."""
    tasks = [one if isinstance(one, asyncio.Future) else asyncio.ensure_future(one) for one in these]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for given, task in zip(these, tasks):
        if given is not task:
            task.cancel()
