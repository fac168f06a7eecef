"""One worker process a rank, on the engine's node. They end with the engine's process (child.py)."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from concurrent.futures import Future

from headway.config import EngineConfig
from headway.errors import EngineDead
from headway.executor.child import Child, spawn
from headway.executor.launcher import WORKER, Placement, Ticket
from headway.executor.remote import RemoteExecutor


class MpExecutor(RemoteExecutor):
    """See ``headway.executor.port.Executor``."""

    def __init__(self, config: EngineConfig, worker: str = WORKER) -> None:
        super().__init__(config, MpLauncher(), worker)


class MpLauncher:
    """See ``headway.executor.launcher.Launcher``. One thread starts the processes and waits for their ends: the kernel
    sends the parent-death signal when the *thread* that started a process ends."""

    name = "mp"

    def __init__(self) -> None:
        self._children: list[Child] = []
        self._thread: threading.Thread | None = None
        self._closing = False

    def place(self) -> Placement:
        return Placement()

    def start(self, tickets: list[Ticket], died: Callable[[int, int | None], None]) -> None:
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(tickets, died, started), name="headway-mp", daemon=True)
        try:
            self._thread.start()
            started.result()
        except BaseException:  # Ctrl-C too: the descriptors in the tickets are no longer needed once this has ended
            self.close(0.0)
            raise

    def close(self, timeout: float) -> None:
        if self._thread is None:
            return
        self._thread.join(timeout)
        self._closing = True
        self._kill()
        self._thread.join()

    def _run(self, tickets: list[Ticket], died: Callable[[int, int | None], None], started: Future[None]) -> None:
        try:
            for ticket in tickets:
                self._children.append(spawn("headway.executor.worker_process", ticket.encode(), ticket.fds))
                if self._closing:
                    raise EngineDead("the executor was closed")
        except BaseException as error:
            self._kill()
            started.set_exception(error)
        else:
            started.set_result(None)
        self._await_ends(died)
        for child in self._children:
            child.link.close()

    def _kill(self) -> None:
        for child in self._children:
            child.process.kill()

    def _await_ends(self, died: Callable[[int, int | None], None]) -> None:
        poller = select.poll()
        ranks = {child.pidfd: rank for rank, child in enumerate(self._children)}
        for pidfd in ranks:
            poller.register(pidfd, select.POLLIN)
        while ranks:
            for pidfd, _ in poller.poll():
                poller.unregister(pidfd)
                os.close(pidfd)
                rank = ranks.pop(pidfd)
                died(rank, self._children[rank].process.wait())
