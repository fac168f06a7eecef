"""headway serve: one process, one engine, one port."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict

import uvicorn
import uvloop

from headway.config import EngineArgs
from headway.errors import ConfigError
from headway.llm import AsyncLLM
from headway.server.app import make_app
from headway.server.options import ServeOptions
from headway.server.state import State


def run(options: ServeOptions, args: EngineArgs) -> int:
    """Exit status 0 after SIGTERM or Ctrl-C, 1 if the engine has failed."""
    listener = _listen(options)
    with listener:
        llm = AsyncLLM(**asdict(args))
        try:
            return uvloop.run(_serve(llm, options, listener))
        finally:
            llm.close()


class _Server(uvicorn.Server):
    """Signals are ours."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


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
    )
    server = _Server(config)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    serving = asyncio.create_task(server.serve([listener]))
    host, port = listener.getsockname()[:2]
    print(f"headway: http://{host}:{port} serves {state.names[0]}", file=sys.stderr, flush=True)
    await asyncio.wait({serving, asyncio.create_task(stop.wait())}, return_when=asyncio.FIRST_COMPLETED)
    try:
        await asyncio.wait_for(state.drain(), options.shutdown_timeout)
    except asyncio.TimeoutError:
        print(f"headway: {state.running} requests did not end in time", file=sys.stderr)
    server.should_exit = True
    server.config.timeout_graceful_shutdown = 1
    await serving
    return 0


def _listen(options: ServeOptions) -> socket.socket:
    """Before the model loads: a port that is taken is said at once."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
    except OSError as error:
        listener.close()
        raise ConfigError("port", options.port, f"cannot listen on {options.host}: {error.strerror}") from error
    return listener
