"""The channel between an engine and workers on other nodes: one TCP port, encrypted and authenticated (CURVE)."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

import zmq

from headway.errors import EngineError
from headway.executor.channel.curve import Gate, connect
from headway.executor.channel.wire import Address


class Hub:
    """The engine's side: a thread owns the sockets, queues what comes in, and rings."""

    def __init__(self, host: str, ring: Callable[[], None]) -> None:
        """host: this node's address as the workers see it. ring: called on that thread once something was queued."""
        self._ring = ring
        self._incoming: deque[tuple[int, bytes | None]] = deque()
        self._outgoing: deque[tuple[int, bytes]] = deque()
        self._closing = False
        self._error: Exception | None = None
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._context = zmq.Context()
        self._gate = Gate(self._context)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an error for who is not there, instead of nothing
        self._gate.guard(self._socket)
        port = self._socket.bind_to_random_port("tcp://*")
        self.address = self._gate.address(f"tcp://{host}:{port}")
        self._thread = threading.Thread(target=self._run, name="headway-tcp", daemon=True)
        self._thread.start()

    def send(self, rank: int, message: bytes) -> None:
        """Queues a message for a rank from which one has come in."""
        self._outgoing.append((rank, message))
        os.eventfd_write(self._wake, 1)

    def receive(self) -> list[tuple[int, bytes | None]]:
        """What has come in: rank and message, or None where the rank could not be reached.

        Raises EngineError once the thread has failed.
        """
        if self._error is not None:
            raise EngineError(f"nothing passes to and from other nodes: {self._error!r}") from self._error
        return [self._incoming.popleft() for _ in range(len(self._incoming))]

    def close(self) -> None:
        """What was queued is still sent, for a second at most."""
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._context.term()
        os.close(self._wake)

    def _run(self) -> None:
        try:
            self._pass_on()
        except Exception as error:
            self._error = error
            self._ring()
        finally:
            self._socket.close()
            self._gate.socket.close()

    def _pass_on(self) -> None:
        poller = zmq.Poller()
        for source in (self._wake, self._gate.socket, self._socket):
            poller.register(source, zmq.POLLIN)
        while not self._closing or self._outgoing:
            ready = dict(poller.poll())
            if self._wake in ready:
                os.eventfd_read(self._wake)
            if self._gate.socket in ready:
                self._gate.answer()
            while self._outgoing:
                rank, message = self._outgoing.popleft()
                try:
                    self._socket.send_multipart([str(rank).encode(), message])
                except zmq.ZMQError as error:
                    if error.errno != zmq.EHOSTUNREACH:
                        raise
                    self._incoming.append((rank, None))
                    self._ring()
            if self._socket in ready:
                rank, message = self._socket.recv_multipart()
                self._incoming.append((int(rank), message))
                self._ring()


class RemoteEnd:
    """The side of a worker on another node, used by one thread."""

    def __init__(self, address: Address, rank: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, str(rank).encode())
        connect(self._socket, address)

    def receive(self) -> bytes:
        """The next message; waits for it."""
        return self._socket.recv()

    def send(self, message: bytes) -> None:
        self._socket.send(message)

    def close(self) -> None:
        self._socket.close()
        self._context.term()
