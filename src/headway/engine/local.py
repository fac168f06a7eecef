"""Replicas as processes of this node."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress

from headway.engine.supervise import Ended, Tell
from headway.engine.wire import EngineTicket, Ready, decode_to_starter, encode
from headway.executor.channel.ring import Unframer
from headway.executor.channel.wire import Failure
from headway.executor.child import spawn


class LocalRun:
    """See ``headway.engine.supervise.Run``. The process ends when the event loop's thread does."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ticket: EngineTicket, tell: Tell) -> None:
        self.ended = asyncio.Event()
        self._loop, self._tell = loop, tell
        self._child = spawn("headway.engine.process", encode(ticket))
        self._words = Unframer()
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
        try:
            data = self._child.link.recv(1 << 20)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self._loop.remove_reader(self._child.link)
        for word in self._words.feed(data):
            message = decode_to_starter(word)
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
