"""What the ranks of an external launch say to each other besides the step: settings, divergence, failures, farewells.

    rank 1 ──┐                     connections of rank 0, which passes on what concerns all; the first ones meet through
    rank 2 ──┼── rank 0            the launcher's store
    rank 3 ──┘

A thread reads, and looks at the time limits. Frames are a length and MessagePack.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

import msgspec

from headway.errors import EngineDead, EngineError, HeadwayError, WorkerDied
from headway.executor.channel import wire
from headway.executor.failure import error_of

if TYPE_CHECKING:
    import torch.distributed

JOIN_TIMEOUT_S = 300.0  # for all ranks to come to the same line of the script
TICK_S = 0.25
_LENGTH = struct.Struct("<I")


class Hello(msgspec.Struct, tag=True, frozen=True):
    rank: int
    token: str


class Value(msgspec.Struct, tag=True, frozen=True):
    """A rank's part of an exchange."""

    turn: int
    data: bytes


class Values(msgspec.Struct, tag=True, frozen=True):
    """All ranks' parts, in rank order."""

    turn: int
    data: list[bytes]


class Steps(msgspec.Struct, tag=True, frozen=True):
    """The last steps that ``rank`` submitted: step to a digest of the plans up to it."""

    rank: int
    digests: dict[int, int]


class Result(msgspec.Struct, tag=True, frozen=True):
    """A step's StepResult, as MessagePack, for the ranks of earlier pipeline stages."""

    step: int
    data: bytes


class Failure(msgspec.Struct, tag=True, frozen=True):
    """Rank ``rank`` cannot go on; cause None: its process has ended."""

    rank: int
    cause: wire.Failure | None

    def error(self) -> HeadwayError:
        return WorkerDied(self.rank) if self.cause is None else error_of(self.rank, self.cause)


class Bye(msgspec.Struct, tag=True, frozen=True):
    """Rank ``rank`` has closed its engine."""

    rank: int


Message = Hello | Value | Values | Steps | Result | Failure | Bye
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


class Peers:
    """One rank's connections. tick is called on the reader's thread every TICK_S seconds."""

    def __init__(self, rank: int, size: int, connections: dict[int, socket.socket]) -> None:
        """connections: by rank: to rank 0, or of rank 0 to all others."""
        self.rank, self.size = rank, size
        self._connections = connections
        self._send_lock = threading.Lock()
        self._changed = threading.Condition()
        self._values: dict[int, dict[int, bytes]] = {}
        self._turn = 0
        self._gone: dict[int, float] = {}
        self._error: HeadwayError | None = None
        self._closed = False
        self._on_news: Callable[[Steps | Result], None] | None = None
        self._on_error: Callable[[HeadwayError], None] | None = None
        self._tick: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._read, name="headway-peers", daemon=True)

    def listen(
        self,
        on_news: Callable[[Steps | Result], None],
        on_error: Callable[[HeadwayError], None],
        tick: Callable[[], None],
    ) -> None:
        """Starts the thread, on which all three are called; on_error at most once."""
        self._on_news, self._on_error, self._tick = on_news, on_error, tick
        self._thread.start()

    @property
    def gone(self) -> dict[int, float]:
        """Ranks that have closed their engine, and when (time.monotonic)."""
        return self._gone

    def exchange(self, data: bytes) -> list[bytes]:
        """What every rank gives to its call of the same turn, in rank order. Waits for them; raises what ends that."""
        with self._changed:
            turn, self._turn = self._turn, self._turn + 1
        if self.rank:
            self._send(0, Value(turn, data))
        else:
            self._take_value(0, Value(turn, data))
        with self._changed:
            self._changed.wait_for(lambda: len(self._values.get(turn, ())) == self.size or self._stopped())
            if len(self._values.get(turn, ())) < self.size:
                raise self._error or EngineDead(f"rank {min(self._gone, default=self.rank)} has closed its engine")
            values = self._values.pop(turn)
        return [values[rank] for rank in range(self.size)]

    def tell(self, news: Steps | Result) -> None:
        """Tells all other ranks."""
        self._to_all(news)

    def fail(self, failure: Failure) -> None:
        """Tells everybody, this rank too."""
        self._to_all(failure)
        self._end(failure.error())

    def close(self) -> None:
        """Idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._to_all(Bye(self.rank))
        for connection in self._connections.values():
            _shut(connection)

    # The reader's thread ----------------------------------------------------------------------------------------------

    def _read(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            next_tick = time.monotonic() + TICK_S
            while not self._closed:  # also without connections: what this rank waits for may never come
                for key, _ in selector.select(max(0.0, next_tick - time.monotonic())):
                    rank: int = key.data
                    message = _receive(self._connections[rank])
                    if message is None:
                        selector.unregister(key.fileobj)
                        self._lost(rank)
                    else:
                        self._take(rank, message)
                if self._tick is not None and time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + TICK_S
                    self._tick()
        for connection in self._connections.values():
            connection.close()

    def _take(self, sender: int, message: Message) -> None:
        if isinstance(message, Value):
            self._take_value(sender, message)
            return
        if isinstance(message, Values):
            with self._changed:
                self._values[message.turn] = dict(enumerate(message.data))
                self._changed.notify_all()
            return
        if not self.rank:
            self._to_all(message, but=sender)
        if isinstance(message, (Steps, Result)):
            assert self._on_news is not None
            self._on_news(message)
        elif isinstance(message, Failure):
            self._end(message.error())
        elif isinstance(message, Bye):
            with self._changed:
                self._gone[message.rank] = time.monotonic()
                self._changed.notify_all()

    def _take_value(self, sender: int, value: Value) -> None:
        with self._changed:
            values = self._values.setdefault(value.turn, {})
            values[sender] = value.data
            complete = len(values) == self.size
            if complete:
                self._changed.notify_all()
        if complete:
            self._to_all(Values(value.turn, [values[rank] for rank in range(self.size)]))

    def _lost(self, rank: int) -> None:
        if rank in self._gone or self._closed:
            return
        failure = Failure(rank, None)
        if not self.rank:
            self._to_all(failure, but=rank)
        self._end(failure.error())

    # Any thread -------------------------------------------------------------------------------------------------------

    def _stopped(self) -> bool:
        return self._error is not None or bool(self._gone) or self._closed

    def _end(self, error: HeadwayError) -> None:
        with self._changed:
            if self._error is not None or self._closed:
                return
            self._error = error
            self._changed.notify_all()
        if self._on_error is not None:
            self._on_error(error)

    def _to_all(self, message: Message, but: int | None = None) -> None:
        for rank in self._connections:
            if rank != but:
                self._send(rank, message)

    def _send(self, rank: int, message: Message) -> None:
        with contextlib.suppress(OSError), self._send_lock:  # of one that is gone, which the reader sees
            _send(self._connections[rank], message)


def join(key: str, rank: int, size: int) -> Peers:
    """Finds the other ranks of ``key`` through the launcher's store. EngineError if they do not come."""
    try:
        store = _store()
        key = f"{key}/{store.add(f'{key}/count/{rank}', 1)}"  # the script's first engine, its second, ...
        connections = _call(store, key, rank) if rank else _welcome(store, key, size)
    except (OSError, RuntimeError, ValueError) as error:
        raise EngineError(f"the ranks did not meet within {JOIN_TIMEOUT_S:.0f} s: {error}") from error
    for connection in connections.values():
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Peers(rank, size, connections)


@functools.cache
def _store() -> torch.distributed.Store:
    """The launcher's; where it has none rank 0 serves it, to the ranks of other engines too, as long as it lives."""
    import torch.distributed as dist

    return next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=JOIN_TIMEOUT_S))))[0]


def own_address() -> str:
    """This node's, as the launcher's other nodes see it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], 9))  # sends nothing
        return probe.getsockname()[0]


def _welcome(store: torch.distributed.Store, key: str, size: int) -> dict[int, socket.socket]:
    token = secrets.token_hex(16)
    connections: dict[int, socket.socket] = {}
    host = own_address()
    with socket.create_server((host, 0), backlog=size) as server:
        store.set(key, f"{host} {server.getsockname()[1]} {token}")
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while len(connections) < size - 1:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            connection, _ = server.accept()
            connection.settimeout(5.0)
            hello = _receive(connection)
            if isinstance(hello, Hello) and secrets.compare_digest(hello.token, token):
                connections[hello.rank] = connection
            else:
                connection.close()
    return connections


def _call(store: torch.distributed.Store, key: str, rank: int) -> dict[int, socket.socket]:
    host, port, token = store.get(key).decode().split()
    connection = socket.create_connection((host, int(port)), timeout=JOIN_TIMEOUT_S)
    _send(connection, Hello(rank, token))
    return {0: connection}


def _send(connection: socket.socket, message: Message) -> None:
    data = _encoder.encode(message)
    connection.sendall(_LENGTH.pack(len(data)) + data)


def _receive(connection: socket.socket) -> Message | None:
    """None at its end, or where somebody talks another language."""
    try:
        (length,) = _LENGTH.unpack(_read_exactly(connection, _LENGTH.size))
        return _decoder.decode(_read_exactly(connection, length))
    except (OSError, EOFError, msgspec.MsgspecError):
        return None


def _read_exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(min(size - len(data), 1 << 20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the other end was faster
        connection.shutdown(socket.SHUT_RDWR)
