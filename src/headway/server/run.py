"""headway serve: one process, one engine, one port."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import ssl
import sys
from collections.abc import Coroutine, Generator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import uvicorn
import uvloop

from headway.config import EngineArgs
from headway.errors import ConfigError
from headway.llm import AsyncLLM
from headway.server.app import make_app
from headway.server.options import ServeOptions
from headway.server.state import State

CLOSE_S = 1
"""For what is still on its way to clients at the end."""


def run(options: ServeOptions, args: EngineArgs) -> int:
    """Exit status 0 after SIGTERM or Ctrl-C, 1 if the engine has failed."""
    if args.optimize_for is None:
        args = replace(args, optimize_for="latency")
    with _listening(options) as listener:
        llm = AsyncLLM(**asdict(args))
        try:
            return uvloop.run(_serve(llm, options, listener))
        finally:
            llm.close()


class _Server(uvicorn.Server):
    """Signals are ours. ready: said once it listens."""

    def __init__(self, config: uvicorn.Config, ready: str) -> None:
        super().__init__(config)
        self._ready = ready

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._ready, file=sys.stderr, flush=True)


async def _serve(llm: AsyncLLM, options: ServeOptions, listener: socket.socket) -> int:
    state = State(llm, options, [llm.config.model.served_model_name])
    config = uvicorn.Config(
        make_app(state),
        http="httptools",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        root_path=options.root_path,
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
        ssl_ca_certs=options.ssl_ca_certs,
        ssl_cert_reqs=ssl.CERT_REQUIRED if options.ssl_ca_certs else ssl.CERT_NONE,
        timeout_graceful_shutdown=CLOSE_S,
    )
    server = _Server(config, f"headway: {_url(options, listener)} serves {state.names[0]}")
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)
    serving = asyncio.create_task(server.serve([listener]))
    await _first(serving, signals.get())
    if not serving.done():
        await _first(state.drain(), signals.get(), asyncio.sleep(options.shutdown_timeout))
        if state.running:
            print(f"headway: ends with {state.running} requests unfinished", file=sys.stderr)
        server.should_exit = True
    await serving
    return 0


async def _first(*these: Coroutine[Any, Any, object] | asyncio.Task[None]) -> None:
    """Until one of them ends; the coroutines among the others are cancelled."""
    tasks = [one if isinstance(one, asyncio.Task) else asyncio.ensure_future(one) for one in these]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for given, task in zip(these, tasks):
        if given is not task:
            task.cancel()


def _url(options: ServeOptions, listener: socket.socket) -> str:
    if options.uds is not None:
        return f"unix:{options.uds}"
    host, port = listener.getsockname()[:2]
    scheme = "http" if options.ssl_certfile is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


@contextmanager
def _listening(options: ServeOptions) -> Generator[socket.socket]:
    """Before the model loads: a port that is taken is said at once."""
    if options.uds is None:
        with _listen(options) as listener:
            yield listener
        return
    with _listen_unix(options.uds) as listener:
        try:
            yield listener
        finally:
            os.unlink(options.uds)


def _listen(options: ServeOptions) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
    except OSError as error:
        listener.close()
        raise ConfigError("port", options.port, f"cannot listen on {options.host}: {error.strerror}") from error
    return listener


def _listen_unix(path: str) -> socket.socket:
    """A socket that a server left behind is taken over; one that a server listens on is not."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        if os.path.exists(path):
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(path) != errno.ECONNREFUSED:
                    raise FileExistsError(errno.EEXIST, "it exists, and is no socket that was left behind")
            os.unlink(path)
        listener.bind(path)
    except OSError as error:
        listener.close()
        raise ConfigError("uds", path, f"cannot listen there: {error.strerror}") from error
    return listener
