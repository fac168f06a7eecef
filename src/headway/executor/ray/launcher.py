"""Ranks as Ray actors: Ray places, names, watches and reaps them; it carries no step."""

from __future__ import annotations

import os
import secrets
import select
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from headway.config import EngineConfig
from headway.errors import EngineError, WorkerError
from headway.executor.launcher import Placement, Ticket
from headway.executor.ray.actor import RankActor
from headway.executor.ray.cluster import connection
from headway.executor.ray.placement import Group, Seat, in_rank_order

_HEEDED_MS = 1000


class RayLauncher:
    """See ``headway.executor.launcher.Launcher``."""

    name = "ray"

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._connected = False
        self._group: Group | None = None
        self._actors: list[Any] = []
        self._pidfds: list[int] = []  # of the ranks on this node
        self._thread: threading.Thread | None = None

    def place(self) -> Placement:
        config = self._config.ray
        self._connected = connection.open(config.address, sum(bundle.get("CPU", 0) for bundle in config.bundles))
        self._group = Group(config)
        here = ray.get_runtime_context().get_node_id()
        seats = in_rank_order(self._group.wait(), here, self._config.parallel.tensor_parallel_size)
        engine = secrets.token_hex(4)
        self._actors = [
            actor_on(self._group, seat, RankActor, f"headway-{engine}-rank{rank}") for rank, seat in enumerate(seats)
        ]
        hosts = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        remote = frozenset(rank for rank, seat in enumerate(seats) if seat.node != here)
        store = None
        if remote and len(seats) > 1:
            (port,) = self._get([self._actors[0].free_port.remote()])
            store = f"{hosts[seats[0].node]}:{port}"
        return Placement(remote=remote, host=hosts[here], store=store)

    def start(self, tickets: list[Ticket], died: Callable[[int, int | None], None]) -> None:
        calls = [actor.prepare.remote(ticket.encode(), os.getpid()) for actor, ticket in zip(self._actors, tickets)]
        pids = self._get(calls)
        for ticket, pid in zip(tickets, pids):
            if ticket.memory is not None:
                with suppress(ProcessLookupError):  # its death is told below
                    self._pidfds.append(os.pidfd_open(pid))
        running = {actor.run.remote(): rank for rank, actor in enumerate(self._actors)}
        self._thread = threading.Thread(target=_watch, args=(running, died), name="headway-ray-watch", daemon=True)
        self._thread.start()

    def close(self, timeout: float) -> None:
        if self._thread is not None:
            self._thread.join(timeout)
        if ray.is_initialized():
            for actor in self._actors:
                ray.kill(actor)
        self._actors = []
        self._reap()
        if self._thread is not None:
            self._thread.join()
        if self._group is not None:
            self._group.remove()
            self._group = None
        if self._connected:
            self._connected = False
            connection.close()

    def _reap(self) -> None:
        """Ends the processes of this node that do not heed Ray, such as stopped ones."""
        while self._pidfds:
            pidfd = self._pidfds[-1]
            ended = select.poll()
            ended.register(pidfd, select.POLLIN)
            if not ended.poll(_HEEDED_MS):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                ended.poll()
            os.close(self._pidfds.pop())

    def _get(self, calls: Sequence[Any]) -> list[Any]:
        """The results, call r of rank r. Raises EngineError."""
        timeout = self._config.parallel.start_timeout_s or None
        results: list[Any] = []
        for rank, call in enumerate(calls):
            try:
                results.append(ray.get(call, timeout=timeout))
            except GetTimeoutError as error:
                raise EngineError(
                    f"rank {rank}: its actor did not start within {timeout} s (start_timeout_s)"
                ) from error
            except RayError as error:
                cause = getattr(error, "cause", None) or error
                raise WorkerError(rank, type(cause).__name__, str(cause), str(error)) from error
        return results


def actor_on(group: Group, seat: Seat, kind: type, name: str, concurrency: int = 1) -> Any:
    """Takes what the seat offers, all of it: that is how Ray knows which GPUs the rank sees."""
    others = {r: amount for r, amount in seat.resources.items() if r not in ("CPU", "GPU", "memory")}
    options: dict[str, Any] = {
        "name": name,
        "max_concurrency": concurrency,
        "num_cpus": seat.resources.get("CPU", 0),
        "num_gpus": seat.resources.get("GPU", 0),
        "memory": seat.resources.get("memory"),
        "resources": others,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group.handle, seat.bundle),
    }
    if path := os.environ.get("PYTHONPATH"):  # a checkout, say; not always, for a process of its own takes a second
        options["runtime_env"] = {"env_vars": {"PYTHONPATH": path}}
    return ray.remote(kind).options(**options).remote()


def _watch(running: dict[Any, int], died: Callable[[int, int | None], None]) -> None:
    """Tells each rank's end."""
    while running:
        try:
            ready, _ = ray.wait(list(running))
            statuses = [_status(call) for call in ready]
        except (Exception, SystemExit):  # the connection to Ray was closed, by whomever: the actors end with it
            ready, statuses = list(running), [None] * len(running)
        for call, status in zip(ready, statuses):
            died(running.pop(call), status)


def _status(call: Any) -> int | None:
    """Ray does not tell what a process that was killed ended with: None."""
    try:
        return ray.get(call)
    except RayTaskError as error:
        print(error, file=sys.stderr)
        return 1
    except RayError:
        return None
