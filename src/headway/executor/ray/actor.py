"""What a Ray actor does for headway: it becomes one rank."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

from headway.executor.launcher import Ticket
from headway.executor.worker_process import run


class RankActor:
    """Its methods are called in this order, each once; ``run`` lasts as long as the engine."""

    def free_port(self) -> int:
        """A free port of this node."""
        with socket.create_server(("", 0)) as server:
            return server.getsockname()[1]

    def prepare(self, ticket: bytes, engine: int) -> int:
        """Takes the ticket, with its descriptors out of the engine's process (its id), on the same node; this one's id.

        The kernel lets only the engine's user do that.
        """
        of_engine = Ticket.decode(ticket)
        fds = [os.open(f"/proc/{engine}/fd/{fd}", os.O_RDWR) for fd in of_engine.fds]
        self._ticket = of_engine.with_fds(fds)
        settle(of_engine.config.device.threads)
        return os.getpid()

    def run(self) -> int:
        """The exit status that a process of its own would have."""
        return run(self._ticket)


def settle(threads: int) -> None:
    """Makes this process one of the model's. Before torch is imported."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # Ray's is the CPUs of the bundle; ours is what the config says
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)  # Ray's default is 15: every other process would outrank the model
