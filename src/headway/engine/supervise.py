"""Replicas as processes: starts them, restarts those that die, tells clients, in this process or in others, of both.

supervisor ── EngineTicket ──> engine processes (a launcher starts them and tells of their ends)
           ── Status ──> clients: Replicas here, and over a socket each those of front ends in other processes
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from headway.engine.replicas import Replicas
from headway.engine.wire import EngineTicket, Ready, Status, encode
from headway.errors import EngineDead
from headway.executor.channel.wire import Failure
from headway.executor.failure import error_of

T = TypeVar("T")
OnDeath = Literal["restart", "exit"]

FIRST_DELAY_S, MOST_DELAY_S = 1.0, 30.0
STEADY_S = 60.0
"""What ran this long starts again as soon as what never died."""


class Backoff:
    """How long to wait before something that ended starts again."""

    def __init__(self) -> None:
        self._delay = FIRST_DELAY_S
        self.started()

    def started(self) -> None:
        self._started = time.monotonic()

    def next(self) -> float:
        """It has ended: the delay in seconds."""
        delay = FIRST_DELAY_S if time.monotonic() - self._started > STEADY_S else self._delay
        self._delay = min(2 * delay, MOST_DELAY_S)
        return delay


class Ended(msgspec.Struct, frozen=True):
    """A replica's process is gone. failure: what it said of that itself."""

    why: str
    failure: Failure | None = None


Tell = Callable[[Ready | Ended], None]


class Run(Protocol):
    """EngineService for one ticket, wherever that may be, from its start to its end. ended: is set when all is gone.

    Its methods are called on one event loop. tell: is called, on any thread, with Ready if it gets so far, and with
    Ended once.
    """

    ended: asyncio.Event

    def __init__(self, loop: asyncio.AbstractEventLoop, ticket: EngineTicket, tell: Tell) -> None:
        """Returns at once."""
        ...

    def stop(self) -> None: ...

    def kill(self) -> None: ...


class LoopThread:
    """An event loop on a thread of its own."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """From another thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def close(self) -> None:
        self.run(_cancel_all())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Replica:
    """ready: its first start."""

    def __init__(self, ticket: EngineTicket) -> None:
        self.ticket = ticket
        self.status = Status(ticket.replica, None, "it has not started yet")
        self.ready: Future[Ready] = Future()
        self.backoff = Backoff()


class Supervisor:
    """Owns the engine processes. on_death "exit": the first that dies is the end of all."""

    def __init__(self, ticket: EngineTicket, count: int, run: type[Run], on_death: OnDeath = "restart") -> None:
        """ticket: of replica 0. Returns once all replicas are ready; raises what the first that is not failed of."""
        self._thread = LoopThread("headway-supervise")
        self._loop, self._on_death = self._thread.loop, on_death
        self._run, self._runs = run, list[Run]()
        self._replicas = [_Replica(msgspec.structs.replace(ticket, replica=replica)) for replica in range(count)]
        self._listeners: list[Callable[[Status], None]] = []
        self._seats: list[socket.socket] = []
        self._closing = False
        try:
            self.ready = self._thread.run(self._start())
        except BaseException:
            self.close(0.0)
            raise

    def client(self) -> Replicas:
        """For callers in this process; its close() is the supervisor's too."""
        config = self.ready[0].config
        replicas = Replicas(len(self._replicas), self._loop, config.cache.enable_prefix_caching, self.close)
        self.listen(replicas.tell)
        return replicas

    def seat(self) -> socket.socket:
        """For a front end in another process, which inherits it: what to make join() of. It ends with the
        supervisor's process."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)

        def tell(status: Status) -> None:
            with suppress(OSError):  # that process is gone, which gone() hears
                ours.send(encode(status))

        def gone() -> None:
            self._loop.remove_reader(ours)
            self._listeners.remove(tell)
            self._seats.remove(ours)
            ours.close()

        self.listen(tell)
        self._seats.append(ours)
        self._loop.call_soon_threadsafe(self._loop.add_reader, ours, gone)
        return theirs

    def listen(self, tell: Callable[[Status], None]) -> None:
        """tell: is called with every replica's status now, and whenever one changes."""

        async def add() -> None:
            self._listeners.append(tell)
            for replica in self._replicas:
                tell(replica.status)

        self._thread.run(add())

    def close(self, timeout: float = 5.0) -> None:
        """Idempotent. Not from a listener."""
        if not self._closing:
            self._closing = True
            self._thread.run(self._stop(timeout))
            self._thread.close()
            for seat in self._seats:
                seat.close()

    async def _start(self) -> list[Ready]:
        for replica in self._replicas:
            self._launch(replica)
        starts: list[Awaitable[Ready]] = [asyncio.wrap_future(replica.ready) for replica in self._replicas]
        return await asyncio.gather(*starts)

    def _launch(self, replica: _Replica) -> None:
        if self._closing:
            return
        replica.backoff.started()

        def tell(event: Ready | Ended) -> None:
            with suppress(RuntimeError):  # the supervisor has ended
                self._loop.call_soon_threadsafe(self._heard, replica, event)

        self._runs = [run for run in self._runs if not run.ended.is_set()]
        try:
            self._runs.append(self._run(self._loop, replica.ticket, tell))
        except OSError as error:
            tell(Ended(f"it could not be started: {error}"))

    async def _stop(self, timeout: float) -> None:
        """Tells all to end, kills what has not within the timeout; returns when all are gone."""

        async def gone() -> None:
            for run in self._runs:
                await run.ended.wait()

        for run in self._runs:
            run.stop()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(gone(), timeout)
        for run in self._runs:
            run.kill()
        await gone()

    def _heard(self, replica: _Replica, event: Ready | Ended) -> None:
        number = replica.ticket.replica
        if isinstance(event, Ready):
            self._tell(replica, Status(number, event.address))
            if not replica.ready.done():
                replica.ready.set_result(event)
        elif not replica.ready.done():
            failure = event.failure
            error = EngineDead(f"replica {number}: {event.why}") if failure is None else error_of(0, failure)
            replica.ready.set_exception(error)
        elif not self._closing:
            self._restart(replica, event.why)

    def _restart(self, replica: _Replica, why: str) -> None:
        number = replica.ticket.replica
        if self._on_death == "exit":
            self._tell(replica, Status(number, None, why, final=True))
            return
        delay = replica.backoff.next()
        self._tell(replica, Status(number, None, f"{why}; it starts again in {delay:g} s"))
        self._loop.call_later(delay, self._launch, replica)

    def _tell(self, replica: _Replica, status: Status) -> None:
        if status.address is None:
            logging.getLogger("headway").warning("headway: replica %d: %s", status.replica, status.why)
        elif replica.ready.done():
            logging.getLogger("headway").warning("headway: replica %d runs again", status.replica)
        replica.status = status
        for tell in list(self._listeners):
            tell(status)
