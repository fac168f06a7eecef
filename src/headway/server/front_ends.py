"""The process that keeps front ends, each in a process of its own, over the same engines. It serves no HTTP itself.

supervisor of the engines ── Status ──> front ends: which replicas run, and where
this process ── a byte for each wish to end ──> front ends      <── a byte, once they listen ──
Board: what all of them count
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress

from headway.engine.supervise import Backoff, Supervisor
from headway.executor.child import Child, spawn
from headway.llm.replicas import Seat
from headway.server.front_end import FrontEndTicket, encode
from headway.server.metrics import Board
from headway.server.options import ServeOptions
from headway.server.serve import Wishes, first

LOOK_S = 0.1
"""How old the engines' numbers on the board may get."""
GRACE_S = 5.0
"""How long a front end may take beyond the time that its requests have."""


async def keep_front_ends(
    options: ServeOptions, listener: socket.socket, supervisor: Supervisor, seat: Seat, ready: Callable[[], None]
) -> int:
    """Until SIGTERM or Ctrl-C: 0; or until the engines have failed for good, or a front end does not start: 1."""
    try:
        return await _FrontEnds(options, listener, supervisor, seat, ready).run()
    finally:
        supervisor.close()


class _FrontEnds:
    """Used on one event loop; what it starts ends with that loop's thread."""

    def __init__(
        self,
        options: ServeOptions,
        listener: socket.socket,
        supervisor: Supervisor,
        seat: Seat,
        ready: Callable[[], None],
    ) -> None:
        self._options, self._listener = options, listener
        self._supervisor, self._seat, self._ready = supervisor, seat, ready
        self._engines = supervisor.client()
        self._memory = os.memfd_create("headway-board")
        self._board = Board(options.api_server_count, len(supervisor.ready), self._memory)
        self._children: dict[int, Child] = {}
        self._silent = set(range(options.api_server_count))  # have never listened
        self._failed: asyncio.Future[str] = asyncio.Future()
        self._ending = False

    async def run(self) -> int:
        loop, wishes = asyncio.get_running_loop(), Wishes().on_signals()
        self._engines.ended.add_done_callback(
            lambda ended: loop.call_soon_threadsafe(self._fail, f"the engine has failed: {ended.result()}")
        )
        looking = loop.create_task(self._look())
        keepers = [loop.create_task(self._keep(number)) for number in range(self._options.api_server_count)]
        try:
            await first(self._failed, wishes.next(), *keepers)
            if self._failed.done():
                print(f"headway: ends, as {self._failed.result()}", file=sys.stderr)
            await self._end(keepers, wishes)
        finally:
            looking.cancel()
            for child in self._children.values():
                child.process.kill()
        return int(self._failed.done())

    def _fail(self, why: str) -> None:
        if not self._failed.done():
            self._failed.set_result(why)

    async def _look(self) -> None:
        while True:
            self._board.look(self._engines)
            await asyncio.sleep(LOOK_S)

    async def _keep(self, number: int) -> None:
        """Starts a front end, and again whenever it ends."""
        backoff = Backoff()
        while True:
            status = await self._one(number)
            if self._ending:
                return
            if number in self._silent:
                self._fail(f"front end {number} ended with status {status} before it listened")
                return
            delay = backoff.next()
            why = f"ended with status {status}; it starts again in {delay:g} s"
            print(f"headway: front end {number} {why}", file=sys.stderr)
            await asyncio.sleep(delay)
            backoff.started()

    async def _one(self, number: int) -> int:
        """From its start to its end: the exit status."""
        loop = asyncio.get_running_loop()
        with self._supervisor.seat() as link:
            fds = link.fileno(), self._listener.fileno(), self._memory
            ticket = FrontEndTicket(number, self._options, self._seat, *fds)
            child = spawn("headway.server.front_end", encode(ticket), fds)
        self._children[number] = child
        child.link.setblocking(False)
        with suppress(ConnectionError):
            if await loop.sock_recv(child.link, 1):
                self._listens(number)
        ended = loop.create_future()
        loop.add_reader(child.pidfd, ended.set_result, None)
        await ended
        loop.remove_reader(child.pidfd)
        os.close(child.pidfd)
        child.link.close()
        del self._children[number]
        return child.process.wait()

    def _listens(self, number: int) -> None:
        if number in self._silent:
            self._silent.remove(number)
            if not self._silent:
                self._ready()

    async def _end(self, keepers: list[asyncio.Task[None]], wishes: Wishes) -> None:
        """Once running requests are through, or at a second wish."""
        self._ending = True
        for number, keeper in enumerate(keepers):
            if number not in self._children:
                keeper.cancel()

        async def tell() -> None:
            while True:
                for child in self._children.values():
                    with suppress(OSError):  # it has ended
                        child.link.send(b".")
                await wishes.next()

        telling = asyncio.create_task(tell())
        await asyncio.wait(keepers, timeout=self._options.shutdown_timeout + GRACE_S)
        telling.cancel()
        for child in self._children.values():
            child.process.kill()
        await asyncio.wait(keepers)
        for keeper in keepers:
            if not keeper.cancelled():
                keeper.result()
