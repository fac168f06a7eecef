"""What RemoteExecutor needs of whoever places the worker processes (mp, ray), and what it gives to each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from headway.config import EngineConfig
from headway.executor.channel.shared import Layout
from headway.executor.channel.wire import Address
from headway.messages import RankGroup

WORKER = "headway.worker:Worker"


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Where the ranks go.

    remote: the ranks on other nodes than the engine's, which talk over TCP. host: the engine's address as they see it.
    store: "host:port" of a free port on rank 0's node, for what the ranks tell each other; needed with remote ranks.
    """

    remote: frozenset[int] = frozenset()
    host: str = "127.0.0.1"
    store: str | None = None


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a process rank ``rank``; crosses as MessagePack (``encode``, ``Ticket.decode``).

    worker: its class, as module:Class. memory: the channel's file descriptor, with its layout, on the engine's node;
    address: the engine's, elsewhere. Descriptors (memory, group.memory) are numbers of the engine's process until
    ``with_fds`` replaces them.
    """

    rank: int
    config: EngineConfig
    worker: str = WORKER
    group: RankGroup | None = None
    memory: int | None = None
    layout: Layout | None = None
    address: Address | None = None

    @property
    def fds(self) -> list[int]:
        """Open descriptors that the process must get; none on other nodes."""
        shared = None if self.group is None else self.group.memory
        return [fd for fd in (self.memory, shared) if fd is not None]

    def with_fds(self, fds: list[int]) -> Ticket:
        """The same with the numbers that ``self.fds`` have in the worker's process."""
        new = iter(fds)
        memory = None if self.memory is None else next(new)
        group = self.group
        if group is not None and group.memory is not None:
            group = msgspec.structs.replace(group, memory=next(new))
        return msgspec.structs.replace(self, memory=memory, group=group)

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @staticmethod
    def decode(data: bytes) -> Ticket:
        return msgspec.msgpack.decode(data, type=Ticket)


class Launcher(Protocol):
    """Places the worker processes of one engine, starts them, tells when one has died, ends them.

    A started process calls ``headway.executor.worker_process.run(ticket)``, which returns when the engine says so.
    """

    name: str

    def place(self) -> Placement:
        """Called first. May wait for resources, up to its own time limit; raises headway's errors."""
        ...

    def start(self, tickets: list[Ticket], died: Callable[[int, int | None], None]) -> None:
        """Starts rank r with tickets[r]. The descriptors in the tickets stay open until this returns.

        died(rank, status), status as in WorkerDied, is called from any thread, once a rank, as soon as its process has
        ended for whatever reason; also for ranks that ended because they were told to. ``died`` never blocks.
        """
        ...

    def close(self, timeout: float) -> None:
        """Waits ``timeout`` seconds for the processes to end, as they have been told to, and kills those that have not.

        Returns when all are gone and what place() took is given back. Idempotent; also after place() or start() failed.
        """
        ...
