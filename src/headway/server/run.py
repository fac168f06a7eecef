"""headway serve: one process, or one that keeps engines and front ends."""

from __future__ import annotations

import asyncio
import resource
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial

import uvloop

from headway.config import EngineArgs
from headway.engine.supervise import Backoff
from headway.errors import EngineError
from headway.llm import AsyncLLM
from headway.llm.frontend import Resolved, find, start
from headway.llm.replicas import start_engines
from headway.server.front_ends import FrontEnds
from headway.server.listen import listening, url_of
from headway.server.metrics import Board
from headway.server.options import ServeOptions
from headway.server.serve import Wishes, first, serve
from headway.server.state import State


def run(options: ServeOptions, args: EngineArgs) -> int:
    """Exit status 0 after SIGTERM or Ctrl-C, 1 if the engine has failed for good."""
    if args.optimize_for is None:
        args = replace(args, optimize_for="latency")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (most, most)
    )  # connections: many a system gives 1024 to who does not ask
    with listening(options) as listener:
        found = find(**asdict(args))
        said = f"headway: {url_of(options, listener)} serves {found.config.model.served_model_name}"
        ready = partial(print, said, file=sys.stderr, flush=True)
        if options.api_server_count > 1:
            supervisor, seat = start_engines(found, options.on_engine_death)
            try:
                return asyncio.run(FrontEnds(options, listener, supervisor, seat, ready).run())
            finally:
                supervisor.close()
        llm = AsyncLLM.over(*start(found, options.on_engine_death))
        state = State(llm, options, [found.config.model.served_model_name], Board(1, len(llm.health())))
        try:
            return uvloop.run(_serve(state, found, listener, ready))
        finally:
            state.llm.close()


async def _serve(state: State, found: Resolved, listener: socket.socket, ready: Callable[[], None]) -> int:
    wishes = Wishes().on_signals()
    keeping = asyncio.create_task(_keep(state, found))
    serving = asyncio.create_task(serve(state, listener, wishes, ready))
    await first(keeping, serving)
    failed = keeping.done()
    if failed:
        print(f"headway: ends, as the engine has failed: {keeping.result()}", file=sys.stderr)
        wishes.add()
    await serving
    keeping.cancel()
    return int(failed)


async def _keep(state: State, found: Resolved) -> object:
    """Has an engine that failed made anew, if that is asked for; returns why it is not."""
    backoff, again = Backoff(), state.options.on_engine_death == "restart"
    why: object = await state.llm.ended()
    while again:
        delay = backoff.next()
        print(f"headway: the engine has failed: {why}; it starts again in {delay:g} s", file=sys.stderr)
        with suppress(EngineError):  # it has told
            await asyncio.to_thread(state.llm.close)
        await asyncio.sleep(delay)
        backoff.started()
        try:
            state.llm = AsyncLLM.over(*await asyncio.to_thread(start, found))
        except Exception as error:
            why = error
        else:
            print("headway: the engine runs again", file=sys.stderr)
            why = await state.llm.ended()
    return why
