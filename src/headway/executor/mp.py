"""One worker process a rank, on the engine's node.

A process gets its descriptors by inheritance and its ticket through a pipe, whose other end closes when the engine's
process ends, however it ends; the kernel's parent-death signal does the same where the pipe was copied by a fork.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from headway.config import EngineConfig
from headway.errors import EngineDead
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
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[int] = []
        self._pidfds: list[int] = []
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
        for process in self._processes:
            process.kill()
        self._thread.join()

    def _run(self, tickets: list[Ticket], died: Callable[[int, int | None], None], started: Future[None]) -> None:
        try:
            for ticket in tickets:
                self._spawn(ticket)
                if self._closing:
                    raise EngineDead("the executor was closed")
        except BaseException as error:
            for process in self._processes:
                process.kill()
            started.set_exception(error)
        else:
            started.set_result(None)
        self._await_ends(died)
        for pipe in self._pipes:
            os.close(pipe)

    def _spawn(self, ticket: Ticket) -> None:
        read_end, write_end = os.pipe()
        self._pipes.append(write_end)
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "headway.executor.worker_process", str(read_end)],
                stdin=subprocess.DEVNULL,
                pass_fds=[read_end, *ticket.fds],
                env=own_modules(),
                start_new_session=True,  # Ctrl-C in a terminal is for the engine's process to act on
            )
        finally:
            os.close(read_end)
        self._pidfds.append(os.pidfd_open(process.pid))  # before anybody can kill it: Popen.kill may reap
        self._processes.append(process)
        data = ticket.encode()
        with suppress(BrokenPipeError):  # it has died already, which is told like any other death
            os.write(write_end, len(data).to_bytes(4, "little") + data)

    def _await_ends(self, died: Callable[[int, int | None], None]) -> None:
        poller = select.poll()
        ranks = {pidfd: rank for rank, pidfd in enumerate(self._pidfds)}
        for pidfd in ranks:
            poller.register(pidfd, select.POLLIN)
        while ranks:
            for pidfd, _ in poller.poll():
                poller.unregister(pidfd)
                os.close(pidfd)
                rank = ranks.pop(pidfd)
                died(rank, self._processes[rank].wait())


def own_modules() -> dict[str, str]:
    """This process's environment, with its own search path for modules, and nothing from the current directory."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
