"""ZeroMQ sockets on an event loop, without a coroutine for each message. Both ends are authenticated and encrypted.

On one node the endpoint has an abstract name: there is no file that a killed process could leave.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

import zmq

from headway.executor.channel.curve import Gate, connect
from headway.executor.channel.wire import Address


class _Watch:
    """Calls ``ready`` as long as a socket can be read.

    Its descriptor only tells of changes, and any call may take such a change in: hence another look after each send.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: zmq.Socket[bytes], ready: Callable[[], None]) -> None:
        self._loop, self._socket, self._ready = loop, socket, ready
        self._looks = False
        loop.add_reader(socket.fileno(), self._look)
        self.look_again()

    def look_again(self) -> None:
        if not self._looks:
            self._looks = True
            self._loop.call_soon(self._look)

    def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()

    def _look(self) -> None:
        self._looks = False
        while not self._socket.closed and self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # pyright: ignore
            self._ready()


class Listener:
    """An engine's end. host: of the interface to listen on; None: this node only."""

    def __init__(self, host: str | None) -> None:
        self._context = zmq.Context()
        self._gate = Gate(self._context)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an error for who is not there, instead of nothing
        self._gate.guard(self._socket, beats=host is not None)
        if host is None:
            endpoint = f"ipc://@headway-{secrets.token_hex(8)}"
            self._socket.bind(endpoint)
        else:
            endpoint = f"tcp://{host}:{self._socket.bind_to_random_port(f'tcp://{host}')}"
        self.address = self._gate.address(endpoint)
        self._watches: list[_Watch] = []

    def open(self, take: Callable[[bytes, bytes], None]) -> None:
        """take: is called on the running event loop with a client's name and its message."""
        loop = asyncio.get_running_loop()

        def receive() -> None:
            client, message = self._socket.recv_multipart()
            take(client, message)

        self._watches = [_Watch(loop, self._gate.socket, self._gate.answer), _Watch(loop, self._socket, receive)]

    def send(self, client: bytes, message: bytes) -> bool:
        """False: the client is gone."""
        try:
            self._socket.send_multipart([client, message], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        finally:
            self._watches[1].look_again()
        return True

    def close(self) -> None:
        """What was sent still goes out, for a second at most."""
        for watch in self._watches:
            watch.close()
        self._context.term()


class Dialer:
    """A client's end, on the event loop ``loop``. take: is called there with each message. lost: when the connection
    was, after which the other end does not know this one any more."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        address: Address,
        take: Callable[[bytes], None],
        lost: Callable[[], None],
    ) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        ends = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)

        def heard() -> None:
            ends.recv_multipart()
            lost()

        connect(self._socket, address)
        self._watches = [_Watch(loop, self._socket, lambda: take(self._socket.recv())), _Watch(loop, ends, heard)]

    def send(self, message: bytes) -> None:
        self._socket.send(message, zmq.NOBLOCK)
        self._watches[0].look_again()

    def close(self) -> None:
        """What was not sent yet is dropped."""
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.disable_monitor()
        for watch in self._watches:
            watch.close()
        self._context.term()
