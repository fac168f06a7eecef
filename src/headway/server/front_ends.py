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

import msgspec

from headway.engine.supervise import Backoff, Supervisor
from headway.executor.child import Child, spawn
from headway.llm.replicas import Seat
from headway.server.front_end import FrontEndTicket
from headway.server.metrics import Board
from headway.server.options import ServeOptions
from headway.server.serve import Wishes, first

LOOK_S = 0.1
"""How old the engines' numbers on the board may get."""
GRACE_S = 5.0
"""How long a front end may take beyond the time that its requests have."""


class FrontEnds:
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
        self._ending = False

    async def run(self) -> int:
        """Until SIGTERM or Ctrl-C: 0; or until the engines have failed for good, or a front end does not start: 1."""
        wishes, engines = Wishes().on_signals(), asyncio.wrap_future(self._engines.ended)
        looking = asyncio.create_task(self._look())
        keepers = [asyncio.create_task(self._keep(number)) for number in range(self._options.api_server_count)]
        try:
            await first(engines, wishes.next(), *keepers)
            failed = [keeper.result() for keeper in keepers if keeper.done()]
            if engines.done():
                failed = [f"the engine has failed: {engines.result()}"]
            for why in failed[:1]:
                print(f"headway: ends, as {why}", file=sys.stderr)
            await self._end(keepers, wishes)
        finally:
            looking.cancel()
            for child in self._children.values():
                child.process.kill()
        return int(bool(failed))

    async def _look(self) -> None:
        while True:
            self._board.look(self._engines)
            await asyncio.sleep(LOOK_S)

    async def _keep(self, number: int) -> str:
        """Starts a front end, and again whenever it ends; returns why it does not."""
        backoff = Backoff()
        while True:
            status = await self._one(number)
            why = f"front end {number} ended with status {status}"
            if self._ending:
                return why
            if number in self._silent:
                return f"{why} before it listened"
            delay = backoff.next()
            print(f"headway: {why}; it starts again in {delay:g} s", file=sys.stderr)
            await asyncio.sleep(delay)
            backoff.started()

    async def _one(self, number: int) -> int:
        """From its start to its end: the exit status."""
        loop = asyncio.get_running_loop()
        with self._supervisor.seat() as link:
            fds = link.fileno(), self._listener.fileno(), self._memory
            ticket = FrontEndTicket(number, self._options, self._seat, *fds)
            child = spawn("headway.server.front_end", msgspec.msgpack.encode(ticket), fds)
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
        self._board.unfinished[number] = 0
        return child.process.wait()

    def _listens(self, number: int) -> None:
        if number in self._silent:
            self._silent.remove(number)
            if not self._silent:
                self._ready()

    async def _end(self, keepers: list[asyncio.Task[str]], wishes: Wishes) -> None:
        """Once running requests are through, or at a second wish."""
        self._ending = True
        self._listener.close()  # the front ends' own hold it until they end
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
