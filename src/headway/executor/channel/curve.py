"""Who may connect: ZeroMQ's CURVE, encrypted and authenticated, with keys that are made for one socket."""

from __future__ import annotations

import zmq
from zmq.utils import z85

from headway.executor.channel.wire import Address

_BEAT_MS = 5_000
_LINGER_MS = 1_000


class Gate:
    """Guards one listening socket of a context. ``socket`` is where ZeroMQ asks who may come in: whoever polls it
    calls ``answer`` when it is readable."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.socket = context.socket(zmq.REP)
        self.socket.bind("inproc://zeromq.zap.01")  # must be there before who asks
        self._server_key, self._server_secret = zmq.curve_keypair()
        self._public_key, self._secret_key = zmq.curve_keypair()
        self._allowed = z85.decode(self._public_key)

    def guard(self, socket: zmq.Socket[bytes], beats: bool = True) -> None:
        """Before it is bound. beats: a connection may be lost, which silence tells."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._server_secret)
        _common_options(socket, beats)

    def address(self, endpoint: str) -> Address:
        """For those that may come in."""
        return Address(endpoint, self._server_key, self._public_key, self._secret_key)

    def answer(self) -> None:
        """ZAP (rfc.zeromq.org/spec/27): whether a client's key is the one we gave out."""
        version, request, *_, mechanism, key = self.socket.recv_multipart()
        status = b"200" if mechanism == b"CURVE" and key == self._allowed else b"400"
        self.socket.send_multipart([version, request, status, b"", b"", b""])


def connect(socket: zmq.Socket[bytes], address: Address) -> None:
    socket.setsockopt(zmq.CURVE_SERVERKEY, address.server_key)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, address.public_key)
    socket.setsockopt(zmq.CURVE_SECRETKEY, address.secret_key)
    _common_options(socket, address.endpoint.startswith("tcp:"))
    socket.connect(address.endpoint)


def _common_options(socket: zmq.Socket[bytes], beats: bool) -> None:
    """On one node a silent process may just have been stopped; its end is told by the kernel."""
    if beats:
        socket.setsockopt(zmq.HEARTBEAT_IVL, _BEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3 * _BEAT_MS)
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
