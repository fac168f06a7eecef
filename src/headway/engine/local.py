"""Replicas as processes of this node."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress

from headway.engine.supervise import Ended
from headway.engine.wire import EngineTicket, Ready, decode_to_starter, encode
from headway.executor.channel.wire import Failure
from headway.executor.child import spawn

Tell = Callable[[Ready | Ended], None]


class LocalLauncher:
    """See ``headway.engine.supervise.ReplicaLauncher``."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """The processes end when its thread does."""
        self._loop = loop
        self._processes: list[_Process] = []

    def start(self, ticket: EngineTicket, tell: Tell) -> None:
        self._processes = [process for process in self._processes if not process.ended.is_set()]
        self._processes.append(_Process(self._loop, ticket, tell))

    async def close(self, timeout: float) -> None:
        ends = [asyncio.ensure_future(process.ended.wait()) for process in self._processes]
        for process in self._processes:
            process.stop()
        if ends:
            await asyncio.wait(ends, timeout=timeout)
        for process in self._processes:
            process.kill()
        if ends:
            await asyncio.wait(ends)


class _Process:
    def __init__(self, loop: asyncio.AbstractEventLoop, ticket: EngineTicket, tell: Tell) -> None:
        self.ended = asyncio.Event()
        self._loop, self._tell = loop, tell
        self._child = spawn("headway.engine.process", encode(ticket))
        self._data = bytearray()
        self._failure: Failure | None = None
        self._child.link.setblocking(False)
        loop.add_reader(self._child.link, self._read)
        loop.add_reader(self._child.pidfd, self._end)

    def stop(self) -> None:
        with suppress(OSError):  # it has ended
            self._child.link.send(b"end")

    def kill(self) -> None:
        self._child.process.kill()

    def _read(self) -> None:
        """Its words: 4 bytes of length, then the message."""
        data = b""
        with suppress(ConnectionError):
            try:
                data = self._child.link.recv(1 << 20)
            except BlockingIOError:
                return
        if not data:
            self._loop.remove_reader(self._child.link)
        self._data += data
        while len(self._data) >= 4 and len(self._data) >= (end := 4 + int.from_bytes(self._data[:4], "little")):
            message = decode_to_starter(bytes(self._data[4:end]))
            del self._data[:end]
            if isinstance(message, Ready):
                self._tell(message)
            else:
                self._failure = message

    def _end(self) -> None:
        self._read()  # what it wrote last
        self._loop.remove_reader(self._child.link)
        self._loop.remove_reader(self._child.pidfd)
        status = self._child.process.wait()
        os.close(self._child.pidfd)
        self._child.link.close()
        self.ended.set()
        why = f"its process ended with status {status}" if self._failure is None else self._failure.message
        self._tell(Ended(why, self._failure))
