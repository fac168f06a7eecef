"""An executor whose workers are processes: all that does not depend on who places them. See mail.py for the steps.

engine's threads ── Plan, Masks, Call, Close ──> every rank      the same to all, in order
                 <── Ready, StepResult, CallResult, Failure ──   each rank on its own
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import weakref
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace as replace_fields

from headway.config import EngineConfig
from headway.errors import EngineDead, EngineError
from headway.executor.channel.shared import EngineEnd, Layout
from headway.executor.launcher import WORKER, Launcher, Placement, Ticket
from headway.executor.mail import Mail
from headway.messages import RankGroup, StepPlan, StepResult, WorkerInfo

if TYPE_CHECKING:
    from headway.executor.channel.tcp import Hub


class RemoteExecutor:
    """See ``headway.executor.port.Executor``. An executor that is dropped without close() ends its workers too."""

    in_process = False

    def __init__(self, config: EngineConfig, launcher: Launcher, worker: str = WORKER) -> None:
        """worker: the class that each process makes its rank of, as module:Class."""
        self._config, self._launcher, self._worker = config, launcher, worker
        self._size = config.parallel.ranks
        self._mail: Mail | None = None
        self._hubs: list[Hub] = []  # one where there are other nodes
        self._closed = False
        self._finalizer: weakref.finalize[..., RemoteExecutor] | None = None

    def start(self) -> WorkerInfo:
        """Errors of headway's own propagate as they are, others as WorkerError; the first one ends all workers."""
        assert self._finalizer is None, "start() runs once"
        if self._closed:
            raise EngineDead("the executor was closed")
        self._finalizer = weakref.finalize(self, _drop, self._launcher, self._hubs)
        try:
            return self._start()
        except BaseException:
            self.close(0.0)
            raise

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        return self._running().submit(plan)

    def mask(self, step: int, masks: dict[int, bytes]) -> None:
        self._running().mask(step, masks)

    def call(self, method: str, *args: Any, timeout: float | None = None) -> list[Any]:
        """args and results: what MessagePack has (numbers, strings, bytes, lists, dicts)."""
        return self._running().call(method, args, timeout)

    def health(self) -> None:
        mail = self._mail
        if mail is not None:
            mail.take()
            if mail.error is not None and not self._closed:
                raise mail.error
        if self._closed or mail is None:
            raise EngineDead("the executor is not running")

    def close(self, timeout: float = 5.0) -> None:
        """Workers that do not end within the timeout are killed; those of a failed engine at once."""
        self._closed = True
        told = self._mail is not None and self._mail.close()
        _shut_down(self._launcher, self._hubs, timeout if told else 0.0)
        if self._finalizer is not None:
            self._finalizer.detach()  # not before: what interrupts the wait leaves the rest to the interpreter's exit

    def _start(self) -> WorkerInfo:
        placement = self._launcher.place()
        ranks = range(self._size)
        end = EngineEnd(Layout.of([r for r in ranks if r not in placement.remote]))
        group = None
        try:
            mail = self._mail = Mail(end, self._config.parallel)
            if placement.remote:
                from headway.executor.channel.tcp import Hub

                self._hubs.append(Hub(placement.host, mail.ring))
                mail.open_tcp(self._hubs[0], sorted(placement.remote))
            group = self._group(placement)
            self._launcher.start([self._ticket(r, end, group, placement) for r in ranks], mail.died)
        finally:
            end.close_fd()
            if group is not None and group.memory is not None:
                os.close(group.memory)
        timeout = self._config.parallel.start_timeout_s or None
        if not mail.wait(lambda: mail.error is not None or len(mail.infos) == self._size, timeout):
            silent = ", ".join(str(r) for r in ranks if r not in mail.infos)
            raise EngineError(f"rank {silent}: the model was not loaded within {timeout} s (start_timeout_s)")
        if mail.error is not None:
            raise mail.error
        return self._merged([mail.infos[r] for r in ranks])

    def _ticket(self, rank: int, end: EngineEnd, group: RankGroup | None, placement: Placement) -> Ticket:
        ticket = Ticket(rank=rank, config=replace(self._config, choices=()), worker=self._worker)
        if group is not None:
            ticket = replace_fields(ticket, group=replace_fields(group, rank=rank))
        if rank not in placement.remote:
            return replace_fields(ticket, memory=end.fd, layout=end.layout)
        return replace_fields(ticket, address=self._hubs[0].address)

    def _group(self, placement: Placement) -> RankGroup | None:
        """Rank 0's; the others differ in the rank only."""
        if self._size == 1:
            return None
        store = placement.store or _free_address()
        memory = None if placement.remote else os.memfd_create("headway-ranks")
        return RankGroup(rank=0, size=self._size, memory=memory, store=store, engine=secrets.token_hex(8))

    def _merged(self, infos: list[WorkerInfo]) -> WorkerInfo:
        """One info for all ranks: the fewest blocks, all bytes, the slowest start."""
        return replace_fields(
            infos[0],
            num_blocks=min(i.num_blocks for i in infos),
            weights_bytes=sum(i.weights_bytes for i in infos),
            kv_bytes=sum(i.kv_bytes for i in infos),
            pids=[pid for i in infos for pid in i.pids],
            startup_s={phase: max(i.startup_s.get(phase, 0.0) for i in infos) for phase in infos[0].startup_s},
        )

    def _running(self) -> Mail:
        if self._closed or self._mail is None:
            raise EngineDead("the executor is not running")
        return self._mail


def _shut_down(launcher: Launcher, hubs: list[Hub], timeout: float) -> None:
    launcher.close(timeout)
    while hubs:
        hubs.pop().close()


def _drop(launcher: Launcher, hubs: list[Hub]) -> None:
    """Of an executor that is garbage, which may be found on any thread, also on one that is to be waited for."""
    if threading.current_thread().daemon:  # those are
        threading.Thread(target=_shut_down, args=(launcher, hubs, 0.0), name="headway-drop").start()
    else:
        _shut_down(launcher, hubs, 0.0)


def _free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"
